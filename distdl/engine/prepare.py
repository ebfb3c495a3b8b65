"""From a config to a trained network: everything that happens once, before the first step.

All errors in what the user gave are found here and agreed by all ranks, before anything is written. If a rank is lost
meanwhile, the survivors begin the preparation again, in the same run folder.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from distdl.config import TrainConfig
from distdl.data import Dataset, PreparedDataset, split
from distdl.engine import transfer
from distdl.engine.checks.watchdog import Watchdog
from distdl.engine.console import Console, banner, shares_of
from distdl.engine.coordinator import Coordinator, RunFacts
from distdl.engine.environment import describe, numerics
from distdl.engine.fault_injection import reached
from distdl.engine.logbook import Logbook
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.engine.stop import StopRequest
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import FoundCheckpoint
from distdl.engine.storage.run_folder import StartingPoint, find_start
from distdl.engine.timing import balance
from distdl.engine.timing.trace import check_writable
from distdl.engine.trainer import Summary, Trainer
from distdl.engine.user_code import BuildNetwork, check_equal_networks, load_dataset, network_builder
from distdl.errors import DamagedFileError, UserError
from distdl.job.warden import Warden
from distdl.nn import BatchNorm, Sequential
from distdl.optim import optimizer_class
from distdl.parallel import (
    Communicator,
    Survivors,
    from_rank_0,
    guard,
    on_rank_0,
    share_arrays,
    together,
    world,
)
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

    `build_network` and `dataset` replace the model and dataset that the config names. They must be the same on every
    rank; only rank 0 reads the dataset. `console` prints. `stop` is a stop request that the caller keeps.

    Collective. Raises `UserError` on every rank for errors in what the user gave, `DivergedError` if numbers are no
    longer finite. Any other exception on any rank ends the whole job.
    """
    communicator = world() if communicator is None else communicator
    stop = StopRequest() if stop is None else stop
    with stop.listening(), guard(communicator):
        survivors = Survivors(communicator)
        config = survivors.run(partial(_agree_on_config, config, build_network, dataset))
        watchdog = survivors.run(partial(Watchdog, stall_seconds=config.stall_warning))
        this_rank = survivors.communicator.world_ranks[survivors.communicator.rank]
        with numerics(config.threads_per_rank), watchdog, Warden(f"rank {this_rank}", config.detect_hangs):
            preparation = Preparation(config, build_network, dataset, console, stop)
            trainer = survivors.run(preparation.trainer)
            watchdog.progress = lambda: trainer.work_done
            try:
                preparation.introduce(trainer)
                for recovery in survivors.recoveries:
                    trainer.note(recovery, prepared=False)
                return trainer.run()
            finally:
                trainer.close()


def _agree_on_config(
    config: TrainConfig, build_network: BuildNetwork | None, dataset: Dataset | None, communicator: Communicator
) -> TrainConfig:
    """Return the checked config of rank 0 on all ranks. Collective."""
    config = together(communicator, lambda: labelled(config, build_network, dataset).checked())
    communicator.spin_seconds = balance.SPIN_SECONDS if config.balance else Communicator.spin_seconds
    return TrainConfig.from_json(communicator.bcast_json(config.to_json()))


class Preparation:
    """Prepares a run, from nothing on each attempt. An attempt fails if a rank is lost; the survivors begin again.

    Only the run folder, once all ranks know it, and the coordinator of the latest attempt are kept between attempts.
    """

    def __init__(
        self,
        config: TrainConfig,
        build_network: BuildNetwork | None,
        dataset: Dataset | None,
        console: Console | None,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.build_network = build_network
        self.dataset = dataset
        self.console = console
        self.stop = stop
        self.folder: Path | None = None
        self.is_repeated = False
        self.coordinator: Coordinator | None = None
        self.transferred: transfer.Transfer | None = None

    def trainer(self, communicator: Communicator) -> Trainer:
        """Return an opened trainer. If the user's input is wrong, leave nothing behind. Collective."""
        self.close()  # the coordinator of an earlier attempt
        try:
            return self._prepare(communicator)
        except UserError:
            self.close()
            raise
        finally:
            self.is_repeated = True

    def _prepare(self, communicator: Communicator) -> Trainer:
        config = self.config
        together(communicator, lambda: _check_ranks(config, communicator.size))
        if config.trace is not None:
            on_rank_0(communicator, partial(check_writable, config.trace))
        start = on_rank_0(communicator, lambda: find_start(config, self.folder, after_failure=self.is_repeated))

        data = self._share_data(communicator)
        state = together(communicator, lambda: self._build_state(data))
        check_equal_networks(communicator, config.model, state.network)
        facts = RunFacts(config, describe(communicator), from_rank_0(communicator, data.sha256))
        steps_per_epoch = split.steps_per_epoch(len(data.parts.training), config.batch_size)
        on_rank_0(communicator, lambda: self._restore(state, start, facts.data_sha256, steps_per_epoch))
        state.send_from_rank_0(communicator)

        console = self.console = self.console or Console(live=communicator.size == 1)
        logbook = Logbook(config, steps_per_epoch, console, keeps=communicator.survives_failures)
        trainer = Trainer(config, communicator, data, state, self.stop)
        self._open_folder(communicator, facts, start, logbook)
        assert self.folder is not None
        trainer.open(facts, self.folder, logbook, console, self.coordinator)
        return trainer

    def _share_data(self, communicator: Communicator) -> PreparedDataset:
        """Read and split the dataset on rank 0; return it on all ranks, one copy per host. Collective."""
        arrays = on_rank_0(communicator, lambda: read_data(self.config, self.dataset).to_arrays())
        reached("data")
        shared = share_arrays(communicator, arrays or {})
        reached("data", when="after")
        return PreparedDataset.from_arrays(shared)

    def _build_state(self, data: PreparedDataset) -> TrainingState:
        """Return the state before the first step: the initialized network, its optimizer, empty sums."""
        config, (height, width, channels) = self.config, data.images.shape[1:]
        if config.augment is not None:
            Transforms.parse(config.augment).check_fit(height, width)
        build = network_builder(config.model, config.model_settings, self.build_network)
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

    def _restore(
        self, state: TrainingState, start: StartingPoint | None, data_sha256: str, steps_per_epoch: int
    ) -> None:
        """Fill the state from the checkpoint of a resumed run, or from `--init-from`; on rank 0."""
        assert start is not None
        if start.found is not None:
            restore(state, start.found, data_sha256, self.config, steps_per_epoch)
        elif self.config.init_from is not None:
            self.transferred = transfer.copy_weights(self.config.init_from, state.network, self.config.model)

    def _open_folder(
        self, communicator: Communicator, facts: RunFacts, start: StartingPoint | None, logbook: Logbook
    ) -> None:
        """Claim the run folder and write its first files, on rank 0. Collective."""
        console = self.console
        assert console is not None

        def claim() -> str:
            assert start is not None
            self.coordinator = Coordinator.claim(facts, start, logbook, console)
            reached("run-folder")
            return str(self.coordinator.folder.absolute())

        def write_first_files() -> None:
            assert self.coordinator is not None
            self.coordinator.open_run()
            reached("run-folder", when="after")

        self.folder = Path(from_rank_0(communicator, claim))
        communicator.barrier()  # all ranks know the folder: if rank 0 is lost from here on, the next attempt uses it
        on_rank_0(communicator, write_first_files)
        logbook.lengths = communicator.bcast_json(logbook.lengths)

    def close(self) -> None:
        """Release the run folder."""
        if self.coordinator is not None:
            self.coordinator.close()
            self.coordinator = None

    def introduce(self, trainer: Trainer) -> None:
        """Print the banner on rank 0, and tell all listeners of the start."""
        if trainer.communicator.rank == 0:
            self._print_banner(trainer)
        for listener in trainer.listeners:
            listener.started()

    def _print_banner(self, trainer: Trainer) -> None:
        config, data, communicator, console = self.config, trainer.data, trainer.communicator, trainer.console
        parameters = trainer.state.network.parameter_count
        described = (
            f"{config.dataset} ({len(data.parts.training)} training, {len(data.parts.validation)} validation, "
            f"{len(data.parts.test)} test) · {config.model} ({parameters:,} parameters) · "
            f"{config.optimizer} lr {config.lr:g} · seed {config.seed}"
        )
        for line in banner(
            trainer.facts.environment,
            described,
            config.threads_per_rank,
            f"batch {config.batch_size} = {config.micro_batches} micro-batches of {config.micro_batch_size}",
            shares_of(config.micro_batches, communicator.size) + (" at first (--balance)" if config.balance else ""),
            _survives(communicator),
        ):
            console.line(line)
        if config.reduction != "tree":
            moves = ", and with --balance from run to run" if config.balance else ""
            console.line(
                f"--reduction {config.reduction}: bits may differ from those of another number of ranks{moves}"
            )
        if self.transferred is not None:
            for complaint in self.transferred.complaints:
                console.warning(f"{complaint}; the one before it is used")
            console.line(str(self.transferred))
        if frozen := sum(where.stop - where.start for where in trainer.state.optimizer.frozen):
            console.line(f"frozen: {frozen:,} of {parameters:,} parameters (--freeze {config.freeze})")


def labelled(config: TrainConfig, build_network: BuildNetwork | None, dataset: Dataset | None) -> TrainConfig:
    """Return the config with the names of the model and dataset that a script has given."""
    if build_network is not None:
        name = getattr(build_network, "__qualname__", type(build_network).__qualname__)
        config = replace(config, model=f"{build_network.__module__}:{name}")
    if dataset is not None and not isinstance(dataset, Dataset):
        raise UserError(
            f"the dataset is a {type(dataset).__name__}, expected a distdl.data.sources.Dataset(name, images, labels, "
            "classes, test_start)"
        )
    return config if dataset is None else replace(config, dataset=dataset.name)


def read_data(config: TrainConfig, dataset: Dataset | None) -> PreparedDataset:
    """Load the dataset, split it, and measure its training part."""
    dataset = load_dataset(config.dataset, config.data_dir) if dataset is None else dataset.checked()
    return PreparedDataset.prepare(dataset, config.seed)


# -- checks


def outputs_of(config: TrainConfig, data: Dataset | PreparedDataset) -> tuple[int, ...]:
    """Return the shape of the outputs of a sample that the data and the loss need."""
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
    """Raise `UserError` if the outputs of a network have another shape than the data and the loss need."""
    expected = outputs_of(config, data)
    if output_shape != expected:
        what = "classes" if data.targets_per_sample else "numbers"
        raise UserError(
            f"the network {config.model} returns outputs {output_shape} for a sample, expected {expected}: "
            f"{config.dataset} has {data.classes} {what}" + (" for each pixel" if len(expected) > 1 else "")
        )


def _check_moments(config: TrainConfig, network: Sequential) -> None:
    """Raise `UserError` if batch normalization would see a single number per micro-batch: that is its own mean."""
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


def restore(
    state: TrainingState, found: FoundCheckpoint, data_sha256: str, config: TrainConfig, steps_per_epoch: int
) -> None:
    """Copy a checkpoint into the state; raise `UserError` if the run cannot continue from it."""
    header = found.header()
    checkpoints.restore(found.checkpoint, state.named_arrays(), str(found.path))
    state.progress = header.progress
    if header.data_sha256 != data_sha256:
        raise UserError(
            f"cannot resume from {found.path}: it was trained on other images, labels or split than these; give the "
            "same data, or start a new run"
        )
    batch_size = header.config["batch_size"]
    samples = state.step % steps_per_epoch * batch_size
    correct, counted = state.epoch_sums.counts.tolist()
    skipped, rest = divmod(samples - counted, batch_size)
    if (
        rest
        or not 0 <= skipped <= state.progress.skipped_steps
        or not 0 <= correct <= counted * state.epoch_sums.targets_per_sample
        or not np.isfinite(state.epoch_sums.loss_sum[0])
    ):
        raise DamagedFileError(f"{found.path} is damaged: its sums of the epoch are not those of {samples} samples")
    if config.max_steps is not None and state.step > config.max_steps:
        raise UserError(
            f"cannot resume from {found.path}: it has taken {state.step} steps, and --max-steps is "
            f"{config.max_steps}; give more, leave the flag out, or start a new run"
        )
    epochs = config.epoch_count
    if state.step > epochs * steps_per_epoch:
        raise UserError(
            f"cannot resume from {found.path}: it has taken {state.step} steps, and --epochs {epochs} are "
            f"{epochs * steps_per_epoch}; give --epochs {-(-state.step // steps_per_epoch)} or more, or start a new run"
        )


def _survives(communicator: Communicator) -> str:
    if communicator.survives_failures:
        return "yes"
    if communicator.size == 1:
        return "no, because there is one rank; --resume continues from the last checkpoint"
    return (
        "no, because only Open MPI 5 started as mpirun --with-ft ulfm continues without a rank; "
        "--resume continues from the last checkpoint"
    )
