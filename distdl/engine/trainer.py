"""The training that every rank does.

A step: each rank computes the micro-batches of its shard, the gradients are summed in the canonical tree, and
every replica takes the same optimizer step. All state lives in `TrainingState`; order, shards and random
numbers are pure functions of config and step, so a step can be done by any number of ranks, and again.

A run is a sequence of phases: steps, validations, checkpoints, the test, the end. Each does its collective work in
buffers first, then all ranks that are left `commit`, and only then it touches what lives on. So when a rank is lost,
the others `recover` and do the same phase again (`parallel/recovery.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.config import TrainConfig, is_own
from distdl.data import MicroBatches, PreparedDataset, split
from distdl.data.augmentation import Augmentation
from distdl.engine.checks import corruption, nonfinite
from distdl.engine.coordinator import Follower
from distdl.engine.metrics import METRIC_FIELDS, Sums
from distdl.engine.state import TrainingState
from distdl.engine.stop import StopRequest
from distdl.engine.timing.balance import BalancedDealer, Dealer
from distdl.engine.timing.timeline import Timeline
from distdl.engine.timing.trace import Trace
from distdl.errors import DivergedError, PeerLost
from distdl.nn import Sequential, make_loss
from distdl.optim import clip_by_norm
from distdl.parallel import (
    REDUCTIONS,
    Communicator,
    CompletedRecovery,
    Field,
    Layout,
    Position,
    Record,
    Shard,
    committed,
    die_of_the_host,
    recover,
    together,
)
from distdl.rng import Key
from distdl.schedules import make_schedule


@dataclass(frozen=True)
class Summary:
    """What came out of a run; the content of ``summary.json``."""

    ranks: int
    steps: int
    epochs: int
    train_loss: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    """None where answers are numbers."""
    test_loss: float | None
    """None where the training is not complete."""
    test_accuracy: float | None
    train_seconds: float
    samples_per_second: float
    weights_sha256: str
    state_sha256: str
    recoveries: list[dict[str, Any]]


class Phase(IntEnum):
    """What a run does next after so many steps; in this order where it is several."""

    COMPARE = 0
    VALIDATE = 1
    CHECKPOINT = 2
    TRAIN = 3
    TEST = 4
    FINISH = 5
    END = 6


class Trainer:
    """Takes the steps that are left, on every rank alike.

    Making one is collective, and raises `UserError` on every rank where a host has no room for the partial sums.
    """

    def __init__(
        self,
        config: TrainConfig,
        communicator: Communicator,
        data: PreparedDataset,
        state: TrainingState,
        coordinator: Follower,
    ) -> None:
        self.config = config
        self.communicator = communicator
        self.data = data
        self.state = state
        self.coordinator = coordinator
        self.key = Key(config.seed)
        self.loss = make_loss(data.loss_named(config.loss))
        self.steps_per_epoch = split.steps_per_epoch(len(data.parts.training), config.batch_size)
        self.schedule = make_schedule(
            config.schedule,
            config.scaled_learning_rate,
            every_steps=config.lr_step_epochs * self.steps_per_epoch,
            factor=config.lr_step_factor,
            total_steps=config.epoch_count * self.steps_per_epoch,
            warmup_steps=config.warmup_steps,
        )
        self.stop = StopRequest()
        augmentation = None if config.augment is None else Augmentation.parse(config.augment)
        self.micro_batches = MicroBatches(data, config.micro_batch_size, augmentation)
        self._leaf = Sums()
        self._batch = Sums(targets_per_sample=data.targets_per_sample)
        self._order = (-1, np.empty(0, np.int64))
        last_step = config.epoch_count * self.steps_per_epoch
        self.last_step = last_step if config.max_steps is None else min(last_step, config.max_steps)
        self.phase = self._after_checkpoint()
        self.recoveries: list[dict[str, Any]] = []
        self._test: Sums | None = None
        self._make_buffers()

    def _make_buffers(self) -> None:
        """Make all that depends on the group of ranks; `UserError` on all where a host has no room. Collective."""
        config, communicator = self.config, self.communicator
        rank, ranks = communicator.rank, communicator.size
        self._dealer = BalancedDealer(rank, ranks, config.micro_batches) if config.balance else Dealer(rank, ranks)
        fields = [*_fields_of(self.state.network), *METRIC_FIELDS, *self._dealer.fields, *self.stop.fields]
        self._gradients = REDUCTIONS[config.reduction](communicator, Layout(fields))
        self._metrics = REDUCTIONS[config.reduction](communicator, Layout(METRIC_FIELDS))
        self.timeline = Timeline(communicator)
        self._trace = None if config.trace is None else Trace(self.timeline)
        self._samples = 0
        self._micro_batches_begun = 0
        full, training = config.batch_size, len(self.data.parts.training)
        for samples in sorted({min(full, training), training % full or full}):
            self._gradients.begin(self._shards(samples))  # which makes room for their partial sums

    @property
    def work_done(self) -> tuple[int, int]:
        """The steps, and what moves within them: the micro-batches that this rank has begun; for the watchdog."""
        return self.state.step, self._micro_batches_begun

    def run(self) -> Summary:
        """Train to the last step, score the test part where training is complete, and return the summary."""
        phases = {
            Phase.TRAIN: self._train,
            Phase.COMPARE: self._compare_replicas,
            Phase.VALIDATE: self._end_epoch,
            Phase.CHECKPOINT: self._checkpoint,
            Phase.TEST: self._score_test,
            Phase.FINISH: self._finish,
        }
        while self.phase is not Phase.END:
            try:
                phases[self.phase]()
            except PeerLost as lost:
                self.note(recover(self, lost))
            except (MemoryError, OSError) as error:
                die_of_the_host(self.communicator, error)
                raise
        if not self.recoveries:  # or MPI might wait for who was lost
            with suppress(PeerLost):  # all is done
                for reduction in (self._gradients, self._metrics):
                    reduction.close()
        if not self._is_at_the_end:
            self.stop.stop(self.state.step)
        return self.summary

    def _train(self) -> None:
        self.step()
        every = self.config.verify_every
        self.phase = Phase.COMPARE if every and self.state.step % every == 0 else self._after_comparison()

    def _compare_replicas(self) -> None:
        with committed(self.communicator):
            corruption.compare_replicas(self.communicator, self.state)
        self.phase = self._after_comparison()

    def _after_comparison(self) -> Phase:
        step, every = self.state.step, self.config.checkpoint_every
        if step % self.steps_per_epoch == 0:
            return Phase.VALIDATE
        return Phase.CHECKPOINT if self._stops_here or (every and step % every == 0) else Phase.TRAIN

    def _after_checkpoint(self) -> Phase:
        if not self._stops_here:
            return Phase.TRAIN
        return Phase.TEST if self._is_complete else Phase.FINISH

    @property
    def _stops_here(self) -> bool:
        return self._is_at_the_end or self.stop.agreed is not None

    @property
    def _is_at_the_end(self) -> bool:
        return self.state.step >= self.last_step or self._stops_early

    @property
    def _is_complete(self) -> bool:
        return self.state.step >= self.config.epoch_count * self.steps_per_epoch or self._stops_early

    @property
    def _stops_early(self) -> bool:
        """Whether validation has not become better for as many epochs as `--early-stopping` allows."""
        best, patience = self.state.progress["best_step"], self.config.early_stopping
        epochs, steps = divmod(self.state.step, self.steps_per_epoch)
        return bool(patience) and best is not None and not steps and epochs - best // self.steps_per_epoch >= patience

    @property
    def position(self) -> Position:
        """Where the run stands: the steps taken, and what comes next."""
        return [self.state.step, int(self.phase)]

    def take(self, source: int) -> None:
        """Go to the position of rank `source`, if that is ahead, with its state. Collective."""
        communicator, state = self.communicator, self.state
        test = None if self._test is None else [float(self._test.loss_sum[0]), *map(int, self._test.counts)]
        journal = self.coordinator.journal
        journaled = None if journal is None else journal.to_json()
        mine = [self.position, state.progress, self.stop.agreed, test, journaled]
        position, progress, stop, test, journaled = communicator.bcast_json(mine, source)
        arrays = [(array, array.copy()) for _, array in state.named_arrays()]
        for _, received in arrays:
            communicator.bcast(received, source)
        if position > self.position:
            for array, received in arrays:
                array[...] = received
            state.progress, self.stop.agreed, self.phase = progress, stop, Phase(position[1])
            if test is not None:
                self._test = Sums(targets_per_sample=self.data.targets_per_sample)
                self._test.set(*test)
            if journal is not None:
                journal.take(journaled)

    def rebuild(self) -> None:
        """Make anew what depends on the group; the lowest rank becomes the coordinator. Collective."""

        def take_over() -> None:
            if self.communicator.rank == 0:
                self.coordinator = self.coordinator.promoted()

        self.communicator.notice_cores()
        self._make_buffers()
        together(self.communicator, take_over)

    def note(self, loss: CompletedRecovery, *, prepared: bool = True) -> None:
        """Take down a recovery, and let the coordinator say so."""
        ranks, in_step = self.communicator.size, prepared and self.phase is Phase.TRAIN
        step = self.state.step + in_step
        when = f"{'in' if in_step else 'after'} step {step}" if prepared else "while the run was prepared"
        self.recoveries.append(
            {"step": step, "lost_ranks": loss.lost_ranks, "seconds": round(loss.seconds, 6), "ranks": ranks}
        )
        self.coordinator.recovered(
            f"{_ranks(loss.lost_ranks)} {'was' if len(loss.lost_ranks) == 1 else 'were'} lost {when}; "
            f"{ranks} rank{'s go' if ranks > 1 else ' goes'} on ({loss.seconds:.2f} s)"
        )

    def step(self) -> None:
        """Take one optimizer step; `PeerLost` leaves the state as it was."""
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
        with committed(self.communicator):
            if self.config.audit and (state.step + 1) % self.config.audit == 0:
                own_model = is_own(self.config.model)
                corruption.audit(self.communicator, self._gradients, shards, compute, state, own_model=own_model)
            self.timeline.enter_reduction()
            total = self._gradients.total()
            self.timeline.leave_reduction()
            fault = None
            if (what := nonfinite.average(total, len(rows), network.gradients)) is not None:
                fault, total = self._not_finite(what, rows, shards, key)

        learning_rate = self.schedule(state.step)
        if fault is None:
            for where in state.optimizer.frozen:  # so that it does not count where gradients are clipped
                network.gradients[where] = 0
            if self.config.clip_norm is not None:
                clip_by_norm(network.gradients, self.config.clip_norm)
            update = state.step + 1 - state.progress.get("skipped_steps", 0)  # what Adam's correction counts
            state.optimizer.update(network.parameters, network.gradients, learning_rate, update)
            if "statistics" in total:
                network.update_buffers(total["statistics"])
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
        record = {"gradient": network.gradients, "statistics": network.statistics}
        record |= {**vars(self._leaf), **self.stop.values()}
        for place, index in enumerate(shard):
            self._micro_batches_begun += 1
            images, labels = self.micro_batches.load(rows, index, key.of(index, "augmentation"))
            changed = place == 0  # by the update at the end of the step before
            outputs = network.forward(images, training=True, key=key.of(index))
            self._leaf.set(self.loss.forward(outputs, labels), self.loss.count_correct(outputs, labels), len(labels))
            network.backward(self.loss.backward())
            record.update(self._dealer.values(whole=len(labels) == self.config.micro_batch_size))
            yield index, record

    def _not_finite(
        self, what: str, rows: NDArray[np.int64], shards: Sequence[Shard], key: Key
    ) -> tuple[nonfinite.Fault, Record]:
        """Trace what is not finite in the current step's sum, save it, and stop if so configured. Collective.

        What is finite when computed again always ends the run: no bit may depend on what a machine did wrong.
        """
        corruption.compare_replicas(self.communicator, self.state)  # weights that one rank alone has
        self.state.network.gradients.fill(0)  # between parameters too, where no backward pass writes
        fault, total = nonfinite.trace(
            self.communicator,
            self._gradients,
            shards,
            partial(self._computed, rows, key),
            step=self.state.step + 1,
            what=what,
        )
        if fault.transient:
            raise corruption.agreed(f"{fault}; go on")
        if fault.micro_batch is not None:
            rows = split.micro_batch(rows, fault.micro_batch, self.config.micro_batch_size)
            saved = self.coordinator.not_finite(fault, {"rows": rows, **self.data.samples(rows)})
            fault = replace(fault, saved_in=self.communicator.bcast_json(saved))
        if self.config.on_nonfinite == "skip":
            return fault, total
        raise self._diverged(str(fault))

    def evaluate(self, rows: NDArray[np.int64]) -> Sums:
        """Return the sums of loss and right answers over the given rows, each counted once. Collective."""
        shards = self._shards(len(rows))
        self._metrics.begin(shards)
        for place, index in enumerate(shards[self.communicator.rank]):
            self._micro_batches_begun += 1
            images, labels = self.micro_batches.load(rows, index)
            outputs = self.state.network.forward(images)
            self._leaf.set(self.loss.forward(outputs, labels), self.loss.count_correct(outputs, labels), len(labels))
            self._metrics.add(index, vars(self._leaf))
        sums = Sums(targets_per_sample=self.data.targets_per_sample)
        sums.add(self._metrics.total())
        return sums

    def _end_epoch(self) -> None:
        state = self.state
        if state.epoch_sums.samples == 0:
            raise self._diverged(f"every step of epoch {state.step // self.steps_per_epoch} was skipped")
        with committed(self.communicator):
            validation = self.evaluate(self.data.parts.validation)
            spent = self.timeline.spent()
        self._check_loss(validation, "validation")
        progress = state.progress
        if progress["best_step"] is None or validation.score > progress["best_score"]:
            progress["best_step"], progress["best_score"] = state.step, validation.score
        progress["train_loss"] = state.epoch_sums.loss
        progress["validation_loss"] = validation.loss
        progress["validation_accuracy"] = validation.accuracy
        counted = {"samples": self._samples, **self._dealer.epoch_record()}
        self._samples = 0
        self.coordinator.epoch_ended(state, validation, spent, counted)
        state.epoch_sums.set(0.0, 0, 0)
        self.phase = Phase.CHECKPOINT

    def _check_loss(self, sums: Sums, part: str) -> None:
        if not math.isfinite(sums.loss):
            raise self._diverged(f"the {part} loss is {sums.loss} after step {self.state.step}")

    def _score_test(self) -> None:
        with committed(self.communicator):
            test = self.evaluate(self.data.parts.test)
        self._check_loss(test, "test")
        self._test = test
        self.coordinator.tested(self.state, test)
        self.phase = Phase.FINISH

    def _finish(self) -> None:
        with committed(self.communicator):
            if self._trace is not None:
                self.timeline.spent()
                self.coordinator.traced(self._trace.gather(self.state.step))
            summary = self._summary(self._test)
            self.coordinator.finished(self.state, self._test, asdict(summary))
        self.summary = summary
        self.phase = Phase.END

    def _checkpoint(self) -> None:
        """Save the state, or raise `UserError` on every rank alike. Collective."""

        def save() -> bool:
            if not all(nonfinite.is_finite(array) for _, array in self.state.named_arrays()):
                raise self._diverged(f"the weights are not finite after step {self.state.step}")
            return self.coordinator.checkpoint(self.state, last=self._stops_here)

        with committed(self.communicator):
            if self.config.verify_every:
                corruption.compare_replicas(self.communicator, self.state)
            before_is_saved = self.communicator.bcast_json(together(self.communicator, save))
        self.coordinator.checkpointed(before_is_saved=before_is_saved)
        self.phase = self._after_checkpoint()

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
            validation_loss=state.progress["validation_loss"],
            validation_accuracy=state.progress["validation_accuracy"],
            test_loss=None if test is None else test.loss,
            test_accuracy=None if test is None else test.accuracy,
            train_seconds=seconds,
            samples_per_second=samples / seconds if seconds else 0.0,
            weights_sha256=receipt,
            state_sha256=state.state_sha256(),
            recoveries=self.recoveries,
        )

    def _epoch_rows(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            training = self.data.parts.training
            self._order = (epoch, training[split.epoch_order(self.key, epoch, len(training))])
        return self._order[1]

    def _shards(self, samples: int) -> Sequence[Shard]:
        return self._dealer.shards(self.micro_batches.count(samples))

    def _diverged(self, what: str) -> DivergedError:
        """Return the error for sums that are no numbers; every rank has the same sums."""
        if self.state.step == self.state.progress.get("skipped_steps", 0):
            advice = "no update was made before; look at the data, the initial weights and the model, not at --lr"
        else:
            given = {"--lr": self.config.lr, "--weight-decay": self.config.weight_decay}
            given["--l1-decay"] = self.config.l1_decay
            smaller = " or ".join(f"{flag} than {value:g}" for flag, value in given.items() if value)
            advice = f"training has diverged; start a new run with a smaller {smaller}"
        error = DivergedError(f"{what}: {advice}")
        error.agreed = True
        return error


def _fields_of(network: Sequential) -> list[Field]:
    """Return what a network adds to the record of a micro-batch: its gradient, and what its buffers are made from."""
    gradient = Field("gradient", "f4", network.gradients.size)
    return [gradient, *([Field("statistics", "f8", network.statistics.size)] if network.statistics.size else [])]


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
