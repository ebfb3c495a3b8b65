"""The training that every rank does.

A step: each rank computes the micro-batches of its shard, the gradients are summed in the canonical tree, and
every replica takes the same optimizer step. All state lives in `TrainingState`; order, shards and random
numbers are pure functions of config and step, so a step can be done by any number of ranks, and again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import aligned_empty
from distdl.config import TrainConfig
from distdl.data import sources, split
from distdl.data.normalization import Normalization, measure
from distdl.engine import checkpoint as checkpoints
from distdl.engine.coordinator import Coordinator, Follower, Start, find_start
from distdl.engine.environment import blas_threads, describe
from distdl.engine.metrics import METRIC_FIELDS, Sums
from distdl.engine.progress import Progress, banner, shares_of
from distdl.engine.state import TrainingState
from distdl.errors import UserError
from distdl.launcher import survives_failures
from distdl.nn import Sequential, SoftmaxCrossEntropy, build_model, count_correct
from distdl.optim import optimizer_class
from distdl.parallel import REDUCTIONS, Communicator, Field, Layout, contiguous_shards, guard, share_arrays, together, world
from distdl.rng import Key
from distdl.schedules import make_schedule

#: Builds a network for inputs (H, W, C) and a number of classes.
BuildNetwork = Callable[[tuple[int, int, int], int], Sequential]


@dataclass(frozen=True)
class Summary:
    """What came out of a run; the content of ``summary.json``."""

    ranks: int
    steps: int
    epochs: int
    train_loss: float | None
    validation_accuracy: float | None
    test_accuracy: float | None
    train_seconds: float
    samples_per_second: float
    weights_sha256: str
    state_sha256: str
    recoveries: list[dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """The dataset as every rank has it: shared pixels, and the rows of each part."""

    images: NDArray[Any]
    labels: NDArray[np.int64]
    parts: split.Split
    normalization: Normalization
    classes: int


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
    communicator = world() if communicator is None else communicator
    with guard(communicator):
        config = TrainConfig.from_json(communicator.bcast_json(config.to_json()))
        config = together(communicator, config.checked)
        with blas_threads(config.threads_per_rank), np.errstate(over="ignore", invalid="ignore"):
            trainer = _prepared(config, communicator, build_network, dataset)
            return trainer.run()


def _prepared(
    config: TrainConfig, communicator: Communicator, build_network: BuildNetwork | None, dataset: sources.Dataset | None
) -> Trainer:
    """Do all that can fail because of what the user gave, and leave nothing behind where it does."""
    coordinates = communicator.rank == 0
    together(communicator, lambda: _check_ranks(config, communicator.size))
    start = together(communicator, lambda: find_start(config) if coordinates else None)
    arrays = together(communicator, lambda: _read(config, dataset) if coordinates else {})
    data = _shared(communicator, arrays)
    del arrays
    height, width, channels = data.images.shape[1:]

    def build() -> Sequential:
        build = build_network or (lambda shape, classes: build_model(config.model, shape, classes))
        network = build((height, width, channels), data.classes)
        if network.output_shape != (data.classes,):
            raise UserError(f"the network puts out {network.output_shape}, the dataset has {data.classes} classes")
        return network

    network = together(communicator, build)
    network.initialize(Key(config.seed).of("initialization"))
    optimizer = optimizer_class(config.optimizer)(
        network.parameters.size, weight_decay=config.weight_decay, decay_slices=network.decay_slices
    )
    state = TrainingState(network, optimizer)
    together(communicator, lambda: _restore(state, start))
    _hand_out(communicator, state)

    environment = describe(communicator)
    steps_per_epoch = split.steps_per_epoch(len(data.parts.training), config.batch_size)
    progress = Progress(live=communicator.size == 1)
    if coordinates:
        described = (
            f"{config.dataset} ({len(data.parts.training)} training, {len(data.parts.validation)} validation, "
            f"{len(data.parts.test)} test) · {config.model} ({network.parameter_count:,} parameters) · "
            f"{config.optimizer} lr {config.lr:g} · seed {config.seed}"
        )
        _print_banner(progress, config, communicator.size, environment, described)

    def open_run() -> Follower:
        if start is None:
            return Follower()
        return Coordinator(config, start, environment, steps_per_epoch, progress)

    coordinator = together(communicator, open_run)
    return Trainer(config, communicator, data, state, coordinator)


def _check_ranks(config: TrainConfig, ranks: int) -> None:
    if ranks > config.micro_batches:
        raise UserError(
            f"{ranks} ranks cannot share a batch of {config.micro_batches} micro-batches (--batch-size "
            f"{config.batch_size}, --micro-batch-size {config.micro_batch_size}): start at most "
            f"{config.micro_batches} ranks, or give a larger batch or smaller micro-batches"
        )


def _read(config: TrainConfig, dataset: sources.Dataset | None) -> dict[str, NDArray[Any]]:
    """Load the dataset, split it, and measure its training part: the coordinator's work."""
    if dataset is None:
        dataset = sources.load(config.dataset, config.data_dir)
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


def _restore(state: TrainingState, start: Start | None) -> None:
    if start is not None and start.checkpoint is not None:
        checkpoints.restore(start.checkpoint, state.named_arrays(), str(start.path))
        state.progress.update(start.checkpoint.header["progress"])


def _hand_out(communicator: Communicator, state: TrainingState) -> None:
    """Give every rank the state of rank 0."""
    state.progress = communicator.bcast_json(state.progress)
    for array in (
        state.network.parameters,
        *state.optimizer.state.values(),
        state.step_array,
        state.epoch_sums.loss_sum,
        state.epoch_sums.counts,
    ):
        communicator.bcast(array)


def _print_banner(
    progress: Progress, config: TrainConfig, ranks: int, environment: dict[str, Any], described: str
) -> None:
    survives = "no, because this version does not recover in place; --resume goes on from the last checkpoint"
    if survives_failures():
        survives = "no, because this version does not use the launcher's fault tolerance yet; --resume goes on"
    batch = f"batch {config.batch_size} = {config.micro_batches} micro-batches of {config.micro_batch_size}"
    for line in banner(
        environment, described, config.threads_per_rank, batch, shares_of(config.micro_batches, ranks), survives
    ):
        progress.line(line)
    if config.reduction != "tree":
        progress.line(f"--reduction {config.reduction}: bits may differ from those of another number of ranks")


class Trainer:
    """Takes the steps that are left, on every rank alike."""

    def __init__(
        self,
        config: TrainConfig,
        communicator: Communicator,
        data: Data,
        state: TrainingState,
        coordinator: Follower,
    ) -> None:
        self.config = config
        self.communicator = communicator
        self.data = data
        self.state = state
        self.coordinator = coordinator
        self.key = Key(config.seed)
        self.objective = SoftmaxCrossEntropy()
        self.steps_per_epoch = split.steps_per_epoch(len(data.parts.training), config.batch_size)
        self.schedule = make_schedule(
            config.schedule,
            config.learning_rate,
            every_steps=config.lr_step_epochs * self.steps_per_epoch,
            factor=config.lr_step_factor,
        )
        gradient = Field("gradient", "f4", state.network.gradients.size)
        self._gradients = REDUCTIONS[config.reduction](communicator, Layout([gradient, *METRIC_FIELDS]))
        self._metrics = REDUCTIONS[config.reduction](communicator, Layout(METRIC_FIELDS))
        self._leaf = Sums()
        self._batch = Sums()
        self._images: dict[int, NDArray[np.float32]] = {}
        self._order = (-1, np.empty(0, np.int64))
        self._seconds = {"train_seconds": 0.0, "wait_seconds": 0.0}

    def run(self) -> Summary:
        """Train to the last step, score the test part where training is complete, and return the summary."""
        state, config = self.state, self.config
        last_step = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            last_step = min(last_step, config.max_steps)
        while state.step < last_step:
            self.step()
            epoch_ended = state.step % self.steps_per_epoch == 0
            if epoch_ended:
                self._end_epoch()
            every = config.checkpoint_every
            if epoch_ended or state.step == last_step or (every and state.step % every == 0):
                self.coordinator.checkpoint(state, last=state.step == last_step)
        complete = state.step >= config.epochs * self.steps_per_epoch
        test = self.evaluate(self.data.parts.test) if complete else None
        summary = self._summary(test)
        self.coordinator.finished(state, test, asdict(summary))
        return summary

    def step(self) -> None:
        """Take one optimizer step."""
        started, waited = time.perf_counter(), self.communicator.seconds_waiting
        state, network = self.state, self.state.network
        epoch, position = divmod(state.step, self.steps_per_epoch)
        rows = split.batch_rows(self._epoch_rows(epoch), position, self.config.batch_size)
        key = self.key.of("training", state.step)

        shards = self._shards(len(rows))
        self._gradients.begin(shards)
        for index in shards[self.communicator.rank]:
            images, labels = self._micro_batch(rows, index)
            logits = network.forward(images, training=True, key=key.of(index))
            self._leaf.set(self.objective.forward(logits, labels), count_correct(logits, labels), len(labels))
            network.backward(self.objective.backward())
            self._gradients.add(index, {"gradient": network.gradients, **vars(self._leaf)})
        total = self._gradients.total()

        self._check_finite(float(total["loss_sum"][0]))
        gradient = total["gradient"]
        gradient /= len(rows)
        learning_rate = self.schedule(state.step)
        state.optimizer.update(network.parameters, gradient, learning_rate, state.step + 1)
        state.step_array += 1
        state.epoch_sums.add(total)
        seconds = time.perf_counter() - started
        state.progress["train_seconds"] += seconds
        self._seconds["train_seconds"] += seconds
        self._seconds["wait_seconds"] += self.communicator.seconds_waiting - waited
        self._batch.set(float(total["loss_sum"][0]), int(total["counts"][0]), len(rows))
        self.coordinator.stepped(state, self._batch, learning_rate)

    def evaluate(self, rows: NDArray[np.int64]) -> Sums:
        """Return the sums of loss and right answers over the given rows, each counted once. Collective."""
        shards = self._shards(len(rows))
        self._metrics.begin(shards)
        for index in shards[self.communicator.rank]:
            images, labels = self._micro_batch(rows, index)
            logits = self.state.network.forward(images)
            self._leaf.set(self.objective.forward(logits, labels), count_correct(logits, labels), len(labels))
            self._metrics.add(index, vars(self._leaf))
        sums = Sums()
        sums.add(self._metrics.total())
        return sums

    def _end_epoch(self) -> None:
        state = self.state
        validation = self.evaluate(self.data.parts.validation)
        progress = state.progress
        if progress["best_step"] is None or validation.accuracy > progress["best_accuracy"]:
            progress["best_step"], progress["best_accuracy"] = state.step, validation.accuracy
        progress["train_loss"] = state.epoch_sums.loss
        progress["validation_accuracy"] = validation.accuracy
        self.coordinator.epoch_ended(state, validation, self._seconds)
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        state.epoch_sums.set(0.0, 0, 0)

    def _summary(self, test: Sums | None) -> Summary:
        state = self.state
        receipt = state.weights_sha256()
        receipts = self.communicator.allgather_json(receipt)
        assert len(set(receipts)) == 1, f"the replicas differ: {dict(enumerate(receipts))}"
        epochs, steps = divmod(state.step, self.steps_per_epoch)
        samples = epochs * len(self.data.parts.training) + steps * self.config.batch_size
        seconds = state.progress["train_seconds"]
        return Summary(
            ranks=self.communicator.size,
            steps=state.step,
            epochs=epochs,
            train_loss=state.progress["train_loss"],
            validation_accuracy=state.progress["validation_accuracy"],
            test_accuracy=None if test is None else test.accuracy,
            train_seconds=seconds,
            samples_per_second=samples / seconds if seconds else 0.0,
            weights_sha256=receipt,
            state_sha256=state.state_sha256(),
            recoveries=[],
        )

    def _epoch_rows(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            training = self.data.parts.training
            self._order = (epoch, training[split.epoch_order(self.key, epoch, len(training))])
        return self._order[1]

    def _shards(self, samples: int) -> list[range]:
        count = split.micro_batch_count(samples, self.config.micro_batch_size)
        return contiguous_shards(count, self.communicator.size)

    def _micro_batch(self, rows: NDArray[np.int64], index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the normalized images (N, H, W, C) and the labels (N,) of one micro-batch."""
        rows = split.micro_batch(rows, index, self.config.micro_batch_size)
        if len(rows) not in self._images:
            self._images[len(rows)] = aligned_empty((len(rows), *self.data.images.shape[1:]))
        images = self.data.normalization.apply(self.data.images[rows], out=self._images[len(rows)])
        return images, self.data.labels[rows]

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            error = UserError(
                f"the loss is {loss} at step {self.state.step + 1}: training has diverged; give a smaller --lr than "
                f"{self.config.lr:g}, and --resume from the last checkpoint or start again"
            )
            error.agreed = True  # computed from the same sum on every rank
            raise error
