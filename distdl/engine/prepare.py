"""From a config to a trained network: everything that happens once, before the first step.

What can fail because of what the user gave happens here, agreed by all ranks, before anything is written. If a rank is
lost meanwhile, the others begin again, in the same run folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distdl.config import TrainConfig
from distdl.data import Dataset, PreparedDataset, split
from distdl.engine import transfer
from distdl.engine.checks.watchdog import Watchdog
from distdl.engine.console import Console, banner, shares_of
from distdl.engine.coordinator import Coordinator, Follower
from distdl.engine.environment import describe, numerics
from distdl.engine.logbook import Journal
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.engine.stop import StopRequest
from distdl.engine.storage import checkpoints
from distdl.engine.storage.run_folder import Start, find_start
from distdl.engine.takeover import Successor
from distdl.engine.timing import balance
from distdl.engine.timing.trace import check_writable
from distdl.engine.trainer import Summary, Trainer
from distdl.engine.user_code import BuildNetwork, agree_on, load_dataset, network_builder
from distdl.errors import DamagedFileError, UserError
from distdl.job.warden import Warden
from distdl.nn import BatchNorm, Sequential
from distdl.optim import optimizer_class
from distdl.parallel import Communicator, guard, share_arrays, survive, together, world
from distdl.rng import Key
from distdl.transforms import Transforms


def train(
    config: TrainConfig,
    communicator: Communicator | None = None,
    *,
    build_network: BuildNetwork | None = None,
    dataset: Dataset | None = None,
    console: Console | None = None,
    stop: StopRequest | None = None,
) -> Summary:
    """Train as `config` says, on all ranks of `communicator` (`world()` if not given), and return the summary.

    `build_network` and `dataset` take the place of the model and dataset that the config names; they must be
    the same on every rank, and only rank 0 looks at the dataset. `console` prints, in place of lines on the terminal;
    `stop` is listened to by whoever gives it. Collective. Raises `UserError`, on every rank, for what the user gave
    (`DivergedError` where the numbers have become infinite); any other exception on any rank ends the whole job.
    """
    communicator = world() if communicator is None else communicator
    given, stop = config, StopRequest() if stop is None else stop

    def agree_on_config(communicator: Communicator) -> TrainConfig:
        config = together(communicator, lambda: labelled(given, build_network, dataset).checked())
        communicator.spin_seconds = balance.SPIN_SECONDS if config.balance else Communicator.spin_seconds
        return TrainConfig.from_json(communicator.bcast_json(config.to_json()))

    with stop.listening(), guard(communicator):
        lost_at_start, communicator.recovery_at_start = communicator.recovery_at_start, None
        communicator, config, lost_first = survive(communicator, agree_on_config)
        stall_warning = config.stall_warning
        communicator, watchdog, lost_second = survive(communicator, lambda left: Watchdog(left, stall_warning))
        warden = Warden(f"rank {communicator.world_ranks[communicator.rank]}", config.detect_hangs)
        with numerics(config.threads_per_rank), watchdog, warden:
            preparation = _Preparation(config, build_network, dataset, console)
            _, trainer, lost_then = survive(communicator, preparation.trainer)
            trainer.stop = stop
            watchdog.progress = lambda: trainer.work_done
            try:
                preparation.introduce(trainer)
                for loss in filter(None, (lost_at_start, lost_first, lost_second, lost_then)):
                    trainer.note(loss, prepared=False)
                return trainer.run()
            finally:
                trainer.coordinator.close()


@dataclass
class _Preparation:
    """What is the same each time that a run is prepared, and what is known from the time before."""

    config: TrainConfig
    build_network: BuildNetwork | None
    dataset: Dataset | None
    printer: Console | None = None
    #: The run folder, once it is made; known to all ranks before anything is written there.
    folder: Path | None = None
    #: Whether an attempt before has come to nothing, because a rank was lost.
    again: bool = False
    environment: dict[str, Any] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(live=False))
    #: The coordinator, or the follower, of the newest attempt.
    opened: list[Follower] = field(default_factory=list)
    #: What `--init-from` had for the weights; rank 0 knows, where it was read.
    taken: transfer.Taken | None = None

    def trainer(self, communicator: Communicator) -> Trainer:
        """Do all that can fail because of what the user gave, and leave nothing behind where it does. Collective."""
        self.close()  # what an attempt before has opened
        try:
            return _prepared(self, communicator)
        except UserError:
            self.close()
            raise
        finally:
            self.again = True

    def close(self) -> None:
        """Let go of the run folder."""
        while self.opened:
            self.opened.pop().close()

    def introduce(self, trainer: Trainer) -> None:
        """Print the banner."""
        config, data = self.config, trainer.data
        if trainer.communicator.rank == 0:
            parameters = trainer.state.network.parameter_count
            described = (
                f"{config.dataset} ({len(data.parts.training)} training, {len(data.parts.validation)} validation, "
                f"{len(data.parts.test)} test) · {config.model} ({parameters:,} parameters) · "
                f"{config.optimizer} lr {config.lr:g} · seed {config.seed}"
            )
            _print_banner(self.console, config, trainer.communicator, self.environment, described)
            if self.taken is not None:
                for complaint in self.taken.complaints:
                    self.console.warning(f"{complaint}; the one before it is used")
                self.console.line(str(self.taken))
            if frozen := sum(where.stop - where.start for where in trainer.state.optimizer.frozen):
                self.console.line(f"frozen: {frozen:,} of {parameters:,} parameters (--freeze {config.freeze})")
        trainer.coordinator.started()


def _prepared(preparation: _Preparation, communicator: Communicator) -> Trainer:
    """Prepare a run on the ranks there are."""
    config, dataset, build_network = preparation.config, preparation.dataset, preparation.build_network
    coordinates = communicator.rank == 0
    together(communicator, lambda: _check_ranks(config, communicator.size))
    together(communicator, lambda: check_writable(config.trace) if coordinates and config.trace is not None else None)
    folder, again = preparation.folder, preparation.again
    start = together(communicator, lambda: find_start(config, folder, again=again) if coordinates else None)
    arrays = together(communicator, lambda: read_data(config, dataset).to_arrays() if coordinates else {})
    data = PreparedDataset.from_arrays(share_arrays(communicator, arrays))
    del arrays
    height, width, channels = data.images.shape[1:]

    def build() -> TrainingState:
        if config.augment is not None:
            Transforms.parse(config.augment).check_fit(height, width)
        build = network_builder(config.model, config.model_settings, build_network)
        try:
            network = build((height, width, channels), outputs_of(config, data)[-1])
            network.initialize(Key(config.seed).of("initialization"))
            optimizer = optimizer_class(config.optimizer)(
                network.parameters.size,
                weight_decay=config.weight_decay,
                l1=config.l1_decay,
                decay_slices=network.decay_slices,
                frozen=transfer.frozen_slices(network, config.freeze),
            )
        except MemoryError:
            raise UserError(
                f"there is not enough memory for --model {config.model} on images of {height}x{width}x{channels}: "
                "use smaller images, or fewer ranks on this machine"
            ) from None
        check_outputs(config, network.output_shape, data)
        _check_moments(config, network)
        return TrainingState(network, optimizer, epoch_sums=Sums(targets_per_sample=data.targets_per_sample))

    state = together(communicator, build)
    agree_on(communicator, config.model, state.network)
    steps_per_epoch = split.steps_per_epoch(len(data.parts.training), config.batch_size)
    data_sha256 = communicator.bcast_json(data.sha256() if coordinates else "")
    source = config.init_from if start is not None and start.checkpoint is None else None
    preparation.taken = together(
        communicator, lambda: None if source is None else transfer.take(source, state.network, config.model)
    )
    together(communicator, lambda: _restore(state, start, data_sha256, config, steps_per_epoch))
    _hand_out(communicator, state)

    environment = describe(communicator)
    console = preparation.printer or Console(live=communicator.size == 1)
    journal = Journal(config, steps_per_epoch, keeps=communicator.survives_failures)

    trainer = Trainer(config, communicator, data, state, Follower())

    def claim_folder() -> str | None:
        if start is None:
            preparation.opened.append(Follower(journal, succeed))
            return None
        coordinator = Coordinator(config, start, environment, data_sha256, console, journal)
        preparation.opened.append(coordinator)
        return str(coordinator.folder.absolute())

    def succeed() -> Coordinator:
        assert preparation.folder is not None
        return Successor(config, preparation.folder, environment, data_sha256, console, journal)

    preparation.folder = Path(communicator.bcast_json(together(communicator, claim_folder)))
    communicator.barrier()  # now all know it: should the coordinator be lost, whoever begins again goes on with it
    together(communicator, preparation.opened[0].open_run)
    journal.lengths = communicator.bcast_json(journal.lengths)
    preparation.environment, preparation.console = environment, console
    trainer.coordinator = preparation.opened[0]
    return trainer


def labelled(config: TrainConfig, build_network: BuildNetwork | None, dataset: Dataset | None) -> TrainConfig:
    """Return the config that names what a script has given in place of the config's own model and dataset."""
    if build_network is not None:
        name = getattr(build_network, "__qualname__", type(build_network).__qualname__)
        config = replace(config, model=f"{build_network.__module__}:{name}")
    if dataset is not None and not isinstance(dataset, Dataset):
        raise UserError(
            f"the dataset is a {type(dataset).__name__}, expected a distdl.data.sources.Dataset(name, images, labels, "
            "classes, test_start)"
        )
    return config if dataset is None else replace(config, dataset=dataset.name)


def outputs_of(config: TrainConfig, data: Dataset | PreparedDataset) -> tuple[int, ...]:
    """Return the shape of a sample's outputs that the data and the loss ask for."""
    if config.loss == "binary_cross_entropy":
        if data.targets_per_sample != 1 or data.classes != 2:
            raise UserError(
                f"--loss binary_cross_entropy is for one label of two classes a sample: {config.dataset} has labels "
                f"{data.labels.dtype} {data.labels.shape} of {data.classes} classes; leave the flag out"
            )
        return (1,)
    if config.loss not in {"auto", data.default_loss}:
        kind = "numbers" if data.targets_per_sample == 0 else "labels"
        raise UserError(f"--loss {config.loss} does not go with {config.dataset}, which has {kind}; leave the flag out")
    return (*(data.labels.shape[1:] if data.targets_per_sample else ()), data.classes)


def check_outputs(config: TrainConfig, output_shape: tuple[int, ...], data: PreparedDataset) -> None:
    """Raise `UserError` where a network's outputs have another shape than the data and the loss ask for."""
    expected = outputs_of(config, data)
    if output_shape != expected:
        what = "classes" if data.targets_per_sample else "numbers"
        raise UserError(
            f"the network {config.model} puts out {output_shape} for a sample, expected {expected}: {config.dataset} "
            f"has {data.classes} {what}" + (" for each pixel" if len(expected) > 1 else "")
        )


def _check_moments(config: TrainConfig, network: Sequential) -> None:
    """Raise `UserError` where each micro-batch would be a single number to BatchNorm: it is its own mean."""
    if config.micro_batch_size > 1:
        return
    if any(isinstance(layer, BatchNorm) and layer.pixels == 1 for layer in network.every_layer()):
        raise UserError(
            f"the network {config.model} normalizes each feature over a micro-batch (BatchNorm), and with "
            "--micro-batch-size 1 that is one number, which leaves 0: give 2 or more"
        )


def _check_ranks(config: TrainConfig, ranks: int) -> None:
    if ranks > config.micro_batches:
        raise UserError(
            f"{ranks} ranks cannot share a batch of {config.micro_batches} micro-batches (--batch-size "
            f"{config.batch_size}, --micro-batch-size {config.micro_batch_size}): start at most "
            f"{config.micro_batches} ranks, or give a larger batch or smaller micro-batches"
        )


def read_data(config: TrainConfig, dataset: Dataset | None) -> PreparedDataset:
    """Load the dataset, split it, and measure its training part: the coordinator's work."""
    dataset = load_dataset(config.dataset, config.data_dir) if dataset is None else dataset.checked()
    return PreparedDataset.prepare(dataset, config.seed)


def _restore(
    state: TrainingState, start: Start | None, data_sha256: str, config: TrainConfig, steps_per_epoch: int
) -> None:
    """Put the checkpoint's content into the state; raise `UserError` where the run cannot go on from there."""
    if start is None or start.checkpoint is None:
        return
    checkpoints.restore(start.checkpoint, state.named_arrays(), str(start.path))
    state.progress.update(start.checkpoint.header["progress"])
    if start.checkpoint.header["data_sha256"] != data_sha256:
        raise UserError(
            f"cannot resume from {start.path}: it was trained on other images, labels or split than these; give the "
            "same data, or start a new run"
        )
    batch_size = start.checkpoint.header["config"]["batch_size"]
    samples = state.step % steps_per_epoch * batch_size
    correct, counted = state.epoch_sums.counts.tolist()
    skipped, rest = divmod(samples - counted, batch_size)
    if (
        rest
        or not 0 <= skipped <= state.progress.get("skipped_steps", 0)
        or not 0 <= correct <= counted * state.epoch_sums.targets_per_sample
        or not np.isfinite(state.epoch_sums.loss_sum[0])
    ):
        raise DamagedFileError(f"{start.path} is damaged: its sums of the epoch are not those of {samples} samples")
    if config.max_steps is not None and state.step > config.max_steps:
        raise UserError(
            f"cannot resume from {start.path}: it has taken {state.step} steps, and --max-steps is "
            f"{config.max_steps}; give more, leave the flag out, or start a new run"
        )
    epochs = config.epoch_count
    if state.step > epochs * steps_per_epoch:
        raise UserError(
            f"cannot resume from {start.path}: it has taken {state.step} steps, and --epochs {epochs} are "
            f"{epochs * steps_per_epoch}; give --epochs {-(-state.step // steps_per_epoch)} or more, or start a new run"
        )


def _hand_out(communicator: Communicator, state: TrainingState) -> None:
    """Give every rank the state of rank 0."""
    state.progress = communicator.bcast_json(state.progress)
    for _, array in state.named_arrays():
        communicator.bcast(array)


def _survives(communicator: Communicator) -> str:
    if communicator.survives_failures:
        return "yes"
    if communicator.size == 1:
        return "no, because there is one rank; --resume goes on from the last checkpoint"
    return (
        "no, because only Open MPI 5 started as mpirun --with-ft ulfm goes on without a rank; "
        "--resume goes on from the last checkpoint"
    )


def _print_banner(
    console: Console, config: TrainConfig, communicator: Communicator, environment: dict[str, Any], described: str
) -> None:
    batch = f"batch {config.batch_size} = {config.micro_batches} micro-batches of {config.micro_batch_size}"
    for line in banner(
        environment,
        described,
        config.threads_per_rank,
        batch,
        shares_of(config.micro_batches, communicator.size) + (" at first (--balance)" if config.balance else ""),
        _survives(communicator),
    ):
        console.line(line)
    if config.reduction != "tree":
        moves = ", and with --balance from run to run" if config.balance else ""
        console.line(f"--reduction {config.reduction}: bits may differ from those of another number of ranks{moves}")
