"""The training that every rank does.

A step: each rank computes the micro-batches of its shard, the gradients are summed in the canonical tree, and
every replica takes the same optimizer step. All state lives in `TrainingState`; order, shards and random
numbers are pure functions of config and step, so a step can be done by any number of ranks, and again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import aligned_empty
from distdl.config import TrainConfig
from distdl.data import split
from distdl.data.normalization import Normalization
from distdl.engine import corruption, nonfinite
from distdl.engine.balance import BalancedDealer, Dealer
from distdl.engine.coordinator import Follower
from distdl.engine.metrics import METRIC_FIELDS, Sums
from distdl.engine.state import TrainingState
from distdl.engine.stop import StopRequest
from distdl.engine.timeline import Timeline
from distdl.engine.trace import Trace
from distdl.errors import CorruptionError, DistdlError, UserError
from distdl.nn import SoftmaxCrossEntropy, count_correct
from distdl.parallel import REDUCTIONS, Communicator, Field, Layout, Record, Shard, together
from distdl.rng import Key
from distdl.schedules import make_schedule


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

    def samples(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the images, as the dataset has them, and the labels of some rows."""
        return {"images": self.images[rows], "labels": self.labels[rows]}


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
        rank, ranks = communicator.rank, communicator.size
        self._dealer = BalancedDealer(rank, ranks, config.micro_batches) if config.balance else Dealer(rank, ranks)
        self.stop = StopRequest()
        gradient = Field("gradient", "f4", state.network.gradients.size)
        fields = [gradient, *METRIC_FIELDS, *self._dealer.fields, *self.stop.fields]
        self._gradients = REDUCTIONS[config.reduction](communicator, Layout(fields))
        self._metrics = REDUCTIONS[config.reduction](communicator, Layout(METRIC_FIELDS))
        self._leaf = Sums()
        self._batch = Sums()
        self._images: dict[int, NDArray[np.float32]] = {}
        self._order = (-1, np.empty(0, np.int64))
        self.timeline = Timeline(communicator)
        self._samples = 0

    def run(self) -> Summary:
        """Train to the last step, score the test part where training is complete, and return the summary."""
        state, config = self.state, self.config
        trace = None if config.trace is None else Trace(self.timeline)
        last_step = config.epoch_count * self.steps_per_epoch
        if config.max_steps is not None:
            last_step = min(last_step, config.max_steps)
        while state.step < last_step and self.stop.agreed is None:
            self.step()
            if config.verify_every and state.step % config.verify_every == 0:
                corruption.compare_replicas(self.communicator, state)
            epoch_ended = state.step % self.steps_per_epoch == 0
            if epoch_ended:
                self._end_epoch()
            every = config.checkpoint_every
            last = state.step == last_step or self.stop.agreed is not None
            if epoch_ended or last or (every and state.step % every == 0):
                self._checkpoint(last=last)
        complete = state.step >= config.epoch_count * self.steps_per_epoch
        test = self._judged(self.data.parts.test, "test") if complete else None
        if trace is not None:
            self.timeline.spent()
            self.coordinator.traced(trace.gather(state.step))
        summary = self._summary(test)
        self.coordinator.finished(state, test, asdict(summary))
        if state.step < last_step:
            self.stop.stop(state.step)
        return summary

    def step(self) -> None:
        """Take one optimizer step."""
        self.timeline.begin()
        state, network = self.state, self.state.network
        epoch, position = divmod(state.step, self.steps_per_epoch)
        rows = split.batch_rows(self._epoch_rows(epoch), position, self.config.batch_size)
        key = self.key.of("training", state.step)

        shards = self._shards(len(rows))
        self._gradients.begin(shards)
        self._dealer.begin()
        compute = partial(self._computed, rows, key)
        for index, record in compute(shards[self.communicator.rank]):
            self._gradients.add(index, record)
        if self.config.audit and (state.step + 1) % self.config.audit == 0:
            corruption.audit(self.communicator, self._gradients, shards, compute, state)
        self.timeline.enter_reduction()
        total = self._gradients.total()
        self.timeline.leave_reduction()
        fault = None
        if (what := nonfinite.what_is_not_finite(total)) is not None:
            fault, total = self._not_finite(what, rows, shards, key)

        learning_rate = self.schedule(state.step)
        if fault is None:
            gradient = np.divide(total["gradient"], len(rows), out=network.gradients)
            state.optimizer.update(network.parameters, gradient, learning_rate, state.step + 1)
            state.epoch_sums.add(total)
        else:
            state.progress["skipped_steps"] = state.progress.get("skipped_steps", 0) + 1
        state.step_array += 1
        self.stop.observe(total)
        self._samples += len(rows)
        state.progress["train_seconds"] += self.timeline.end()
        shares = self._dealer.stepped(shards, total)
        if shares is not None:
            self.coordinator.redealt(shares)
        if fault is None:
            self._batch.set(float(total["loss_sum"][0]), int(total["counts"][0]), len(rows))
            self.coordinator.stepped(state, self._batch, learning_rate)
        else:
            self.coordinator.skipped(state, fault)

    def _computed(
        self, rows: NDArray[np.int64], key: Key, shard: Shard
    ) -> Iterator[tuple[int, Mapping[str, NDArray[Any]]]]:
        """Compute the micro-batches of a shard; yield the index and the record of each, valid until the next."""
        network = self.state.network
        for place, index in enumerate(shard):
            images, labels = self._micro_batch(rows, index)
            changed = place == 0  # by the update at the end of the step before
            logits = network.forward(images, training=True, key=key.of(index), parameters_changed=changed)
            self._leaf.set(self.objective.forward(logits, labels), count_correct(logits, labels), len(labels))
            network.backward(self.objective.backward())
            timed = self._dealer.values(whole=len(labels) == self.config.micro_batch_size)
            yield index, {"gradient": network.gradients, **vars(self._leaf), **timed, **self.stop.values()}

    def _not_finite(
        self, what: str, rows: NDArray[np.int64], shards: Sequence[Shard], key: Key
    ) -> tuple[nonfinite.Fault, Record]:
        """Trace what is not finite in the current step's sum, save it, and stop if so configured. Collective."""
        fault, total = nonfinite.trace(
            self.communicator,
            self._gradients,
            shards,
            partial(self._computed, rows, key),
            step=self.state.step + 1,
            what=what,
        )
        saved = None
        if fault.micro_batch is not None:
            rows = split.micro_batch(rows, fault.micro_batch, self.config.micro_batch_size)
            saved = self.coordinator.not_finite(fault, {"rows": rows, **self.data.samples(rows)})
        if self.config.on_nonfinite == "skip":
            return fault, total
        saved = self.communicator.bcast_json(saved)
        where = "" if saved is None else f"; the micro-batch is saved in {saved}"
        if fault.transient:
            error: DistdlError = CorruptionError(f"{fault}{where}; go on from the last checkpoint with --resume")
            error.agreed = True
            raise error
        raise self._diverged(f"{fault}{where}")

    def evaluate(self, rows: NDArray[np.int64]) -> Sums:
        """Return the sums of loss and right answers over the given rows, each counted once. Collective."""
        shards = self._shards(len(rows))
        self._metrics.begin(shards)
        for place, index in enumerate(shards[self.communicator.rank]):
            images, labels = self._micro_batch(rows, index)
            logits = self.state.network.forward(images, parameters_changed=place == 0)
            self._leaf.set(self.objective.forward(logits, labels), count_correct(logits, labels), len(labels))
            self._metrics.add(index, vars(self._leaf))
        sums = Sums()
        sums.add(self._metrics.total())
        return sums

    def _end_epoch(self) -> None:
        state = self.state
        if state.epoch_sums.samples == 0:
            raise self._diverged(f"every step of epoch {state.step // self.steps_per_epoch} was skipped")
        validation = self._judged(self.data.parts.validation, "validation")
        progress = state.progress
        if progress["best_step"] is None or validation.accuracy > progress["best_accuracy"]:
            progress["best_step"], progress["best_accuracy"] = state.step, validation.accuracy
        progress["train_loss"] = state.epoch_sums.loss
        progress["validation_accuracy"] = validation.accuracy
        counted = {"samples": self._samples, **self._dealer.epoch_record()}
        self._samples = 0
        self.coordinator.epoch_ended(state, validation, self.timeline.spent(), counted)
        state.epoch_sums.set(0.0, 0, 0)

    def _judged(self, rows: NDArray[np.int64], part: str) -> Sums:
        """Return the sums over a part of the dataset, whose loss must be a number. Collective."""
        sums = self.evaluate(rows)
        if not math.isfinite(sums.loss):
            raise self._diverged(f"the {part} loss is {sums.loss} after step {self.state.step}")
        return sums

    def _checkpoint(self, *, last: bool) -> None:
        """Save the state, or raise `UserError` on every rank alike. Collective."""

        def save() -> None:
            if not all(nonfinite.is_finite(array) for _, array in self.state.named_arrays()):
                raise self._diverged(f"the weights are not finite after step {self.state.step}")
            self.coordinator.checkpoint(self.state, last=last)

        if self.config.verify_every:
            corruption.compare_replicas(self.communicator, self.state)
        together(self.communicator, save)

    def _summary(self, test: Sums | None) -> Summary:
        state = self.state
        receipt = state.weights_sha256()
        receipts = self.communicator.allgather_json(receipt)
        if len(set(receipts)) > 1:
            raise corruption.found(
                self.communicator, corruption.odd_ones_out(receipts), "the weights differ at the end"
            )
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

    def _shards(self, samples: int) -> Sequence[Shard]:
        return self._dealer.shards(split.micro_batch_count(samples, self.config.micro_batch_size))

    def _micro_batch(self, rows: NDArray[np.int64], index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the normalized images (N, H, W, C) and the labels (N,) of one micro-batch."""
        rows = split.micro_batch(rows, index, self.config.micro_batch_size)
        if len(rows) not in self._images:
            self._images[len(rows)] = aligned_empty((len(rows), *self.data.images.shape[1:]))
        images = self.data.normalization.apply(self.data.images[rows], out=self._images[len(rows)])
        return images, self.data.labels[rows]

    def _diverged(self, what: str) -> UserError:
        """Return the error for sums that are no numbers; every rank has the same sums."""
        error = UserError(f"{what}: training has diverged; start a new run with a smaller --lr than {self.config.lr:g}")
        error.agreed = True
        return error
