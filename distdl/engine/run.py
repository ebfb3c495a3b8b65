"""From a config to a trained network: everything that happens once, before the first step.

What can fail because of what the user gave happens here, agreed by all ranks, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import sha256_of_arrays
from distdl.config import TrainConfig
from distdl.data import sources, split
from distdl.data.normalization import Normalization, measure
from distdl.engine import balance
from distdl.engine import checkpoint as checkpoints
from distdl.engine.coordinator import Coordinator, Follower
from distdl.engine.environment import describe, numerics
from distdl.engine.progress import Progress, banner, shares_of
from distdl.engine.run_folder import Start, find_start
from distdl.engine.state import TrainingState
from distdl.engine.stop import StopRequest
from distdl.engine.trace import check_writable
from distdl.engine.trainer import Data, Summary, Trainer
from distdl.errors import UserError
from distdl.launcher import survives_failures
from distdl.nn import Sequential, build_model
from distdl.optim import optimizer_class
from distdl.parallel import Communicator, guard, share_arrays, together, world
from distdl.rng import Key

#: Builds a network for inputs (H, W, C) and a number of classes.
BuildNetwork = Callable[[tuple[int, int, int], int], Sequential]


def train(
    config: TrainConfig,
    communicator: Communicator | None = None,
    *,
    build_network: BuildNetwork | None = None,
    dataset: sources.Dataset | None = None,
) -> Summary:
    """Train as `config` says, on all ranks of `communicator` (`world()` if not given), and return the summary.

    `build_network` and `dataset` take the place of the model and dataset that the config names; they must be
    the same on every rank, and only rank 0 looks at the dataset. Collective. Raises `UserError`, on every rank,
    for what the user gave; any other exception on any rank ends the whole job.
    """
    stop = StopRequest()
    with stop.listening(), guard(communicator := world() if communicator is None else communicator):
        config = together(communicator, _labelled(config, build_network, dataset).checked)
        config = TrainConfig.from_json(communicator.bcast_json(config.to_json()))
        communicator.spin_seconds = balance.SPIN_SECONDS if config.balance else Communicator.spin_seconds
        with numerics(config.threads_per_rank):
            trainer = _prepared(config, communicator, build_network, dataset)
            trainer.stop = stop
            with closing(trainer.coordinator):
                return trainer.run()


def _prepared(
    config: TrainConfig,
    communicator: Communicator,
    build_network: BuildNetwork | None,
    dataset: sources.Dataset | None,
) -> Trainer:
    """Do all that can fail because of what the user gave, and leave nothing behind where it does."""
    coordinates = communicator.rank == 0
    together(communicator, lambda: _check_ranks(config, communicator.size))
    together(communicator, lambda: check_writable(config.trace) if coordinates and config.trace is not None else None)
    start = together(communicator, lambda: find_start(config) if coordinates else None)
    arrays = together(communicator, lambda: _read(config, dataset) if coordinates else {})
    data = _shared(communicator, arrays)
    del arrays
    height, width, channels = data.images.shape[1:]

    def build() -> TrainingState:
        build = build_network or (lambda shape, classes: build_model(config.model, shape, classes))
        try:
            network = build((height, width, channels), data.classes)
            network.initialize(Key(config.seed).of("initialization"))
            optimizer = optimizer_class(config.optimizer)(
                network.parameters.size, weight_decay=config.weight_decay, decay_slices=network.decay_slices
            )
        except MemoryError:
            raise UserError(
                f"there is not enough memory for --model {config.model} on images of {height}x{width}x{channels}: "
                "use smaller images, or fewer ranks on this machine"
            ) from None
        if network.output_shape != (data.classes,):
            raise UserError(f"the network puts out {network.output_shape}, the dataset has {data.classes} classes")
        return TrainingState(network, optimizer)

    state = together(communicator, build)
    steps_per_epoch = split.steps_per_epoch(len(data.parts.training), config.batch_size)
    data_sha256 = _sha256_of(data) if coordinates else ""
    together(communicator, lambda: _restore(state, start, data_sha256, config.epoch_count, steps_per_epoch))
    _hand_out(communicator, state)

    environment = describe(communicator)
    progress = Progress(live=communicator.size == 1)

    def open_run() -> Follower:
        if start is None:
            return Follower()
        return Coordinator(config, start, environment, data_sha256, steps_per_epoch, progress)

    coordinator = together(communicator, open_run)
    if coordinates:
        described = (
            f"{config.dataset} ({len(data.parts.training)} training, {len(data.parts.validation)} validation, "
            f"{len(data.parts.test)} test) · {config.model} ({state.network.parameter_count:,} parameters) · "
            f"{config.optimizer} lr {config.lr:g} · seed {config.seed}"
        )
        _print_banner(progress, config, communicator.size, environment, described)
    coordinator.started()
    return Trainer(config, communicator, data, state, coordinator)


def _labelled(config: TrainConfig, build_network: BuildNetwork | None, dataset: sources.Dataset | None) -> TrainConfig:
    """Return the config that names what a script has given in place of the config's own model and dataset."""
    if build_network is not None:
        name = getattr(build_network, "__qualname__", type(build_network).__qualname__)
        config = replace(config, model=f"{build_network.__module__}:{name}")
    return config if dataset is None else replace(config, dataset=dataset.name)


def _check_ranks(config: TrainConfig, ranks: int) -> None:
    if ranks > config.micro_batches:
        raise UserError(
            f"{ranks} ranks cannot share a batch of {config.micro_batches} micro-batches (--batch-size "
            f"{config.batch_size}, --micro-batch-size {config.micro_batch_size}): start at most "
            f"{config.micro_batches} ranks, or give a larger batch or smaller micro-batches"
        )


def _read(config: TrainConfig, dataset: sources.Dataset | None) -> dict[str, NDArray[Any]]:
    """Load the dataset, split it, and measure its training part: the coordinator's work."""
    dataset = sources.load(config.dataset, config.data_dir) if dataset is None else dataset.checked()
    parts = split.split(dataset.labels, dataset.test_start, Key(config.seed))
    normalization = measure(dataset.images, parts.training)
    return {
        "images": dataset.images,
        "labels": dataset.labels,
        "classes": np.array([dataset.classes]),
        **{name: getattr(parts, name) for name in ("training", "validation", "test")},
        **{name: getattr(normalization, name) for name in ("mean", "deviation")},
    }


def _shared(communicator: Communicator, arrays: dict[str, NDArray[Any]]) -> Data:
    shared = share_arrays(communicator, arrays)
    return Data(
        shared["images"],
        shared["labels"],
        split.Split(shared["training"], shared["validation"], shared["test"]),
        Normalization(shared["mean"], shared["deviation"]),
        int(shared["classes"][0]),
    )


def _sha256_of(data: Data) -> str:
    """Return the hash of all that a training takes from its dataset: a tenth of a second for MNIST."""
    return sha256_of_arrays([("images", data.images), ("labels", data.labels), *vars(data.parts).items()])


def _restore(state: TrainingState, start: Start | None, data_sha256: str, epochs: int, steps_per_epoch: int) -> None:
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


def _print_banner(
    progress: Progress, config: TrainConfig, ranks: int, environment: dict[str, Any], described: str
) -> None:
    survives = "no, because this version does not recover in place; --resume goes on from the last checkpoint"
    if survives_failures():
        survives = "no, because this version does not use the launcher's fault tolerance yet; --resume goes on"
    batch = f"batch {config.batch_size} = {config.micro_batches} micro-batches of {config.micro_batch_size}"
    for line in banner(
        environment,
        described,
        config.threads_per_rank,
        batch,
        shares_of(config.micro_batches, ranks) + (" at first (--balance)" if config.balance else ""),
        survives,
    ):
        progress.line(line)
    if config.reduction != "tree":
        moves = ", and with --balance from run to run" if config.balance else ""
        progress.line(f"--reduction {config.reduction}: bits may differ from those of another number of ranks{moves}")
