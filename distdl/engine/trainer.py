"""The trainer: the phases of a run, on every rank.

Each phase does its collective work in buffers first. Then all ranks commit, and only then the phase changes the state.
So if a rank is lost, the survivors recover and do the same phase again (`parallel/recovery.py`).

All state is in `TrainingState`. Order, shards and random numbers are pure functions of config and step. So any number
of ranks can take a step, and take it again.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.config import TrainConfig
from distdl.data import MicroBatches, PreparedDataset, batch_order
from distdl.data.augmentation import Augmentation
from distdl.data.batch_order import BatchOrder
from distdl.engine import best
from distdl.engine.checks import corruption, nonfinite
from distdl.engine.console import Console
from distdl.engine.coordinator import Coordinator, RunFacts
from distdl.engine.evaluation import evaluate
from distdl.engine.events import RunListener
from distdl.engine.fault_injection import FaultPoints, fault_point
from distdl.engine.logbook import Logbook
from distdl.engine.metrics import METRIC_FIELDS, Sums
from distdl.engine.objective import losses
from distdl.engine.printed_lines import recovery_line
from distdl.engine.state import TrainingState
from distdl.engine.step import OptimizerStep, StepObserver, supervised
from distdl.engine.stop import StopRequest
from distdl.engine.storage.header import RunProgress
from distdl.engine.summary import Summary, summarize
from distdl.engine.timing.balance import BalancedDealer, Dealer
from distdl.engine.timing.timeline import Timeline
from distdl.engine.timing.trace import Trace
from distdl.errors import DivergedError, PeerLost
from distdl.parallel import (
    REDUCTIONS,
    Communicator,
    CompletedRecovery,
    Layout,
    Position,
    committed,
    end_rank_after_host_fault,
    from_rank_0,
    on_rank_0,
    recover,
    together,
)
from distdl.rng import Key
from distdl.schedules import make_schedule


class Phase(IntEnum):
    """The next activity of a run. After a step, due phases come in this order. Recovery compares the numbers."""

    COMPARE = 0
    VALIDATE = 1
    CHECKPOINT = 2
    TRAIN = 3
    TEST = 4
    FINISH = 5
    END = 6


class Trainer:
    """Takes the remaining steps of a run, on every rank. `open` it, then `run` it.

    The constructor is collective. It raises `UserError` on every rank if a host has no room for the partial sums.
    """

    def __init__(
        self,
        config: TrainConfig,
        communicator: Communicator,
        data: PreparedDataset,
        state: TrainingState,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.communicator = communicator
        self.data = data
        self.state = state
        self.stop = stop
        self.key = Key(config.seed)
        self.loss, self._training_loss = losses(config, data, state.network.stack.kernels)
        self._batch_order = BatchOrder(data.parts.training, config.batch_size, self.key)
        self.steps_per_epoch = self._batch_order.steps_per_epoch
        self.schedule = make_schedule(
            config.schedule,
            config.scaled_learning_rate,
            every_steps=config.lr_step_epochs * self.steps_per_epoch,
            factor=config.lr_step_factor,
            total_steps=config.epoch_count * self.steps_per_epoch,
            warmup_steps=config.warmup_steps,
        )
        augmentation = None if config.augment is None else Augmentation.parse(config.augment)
        row_loader = state.network.stack.kernels.row_loader
        self.micro_batches = MicroBatches(data, config.micro_batch_size, augmentation, row_loader)
        self.total_steps = config.epoch_count * self.steps_per_epoch
        self.last_step = self.total_steps if config.max_steps is None else min(self.total_steps, config.max_steps)
        self.phase = self._after_checkpoint()  # a run starts in the phase after a checkpoint
        self.recoveries: list[dict[str, Any]] = []
        self.listeners: list[RunListener] = []
        self.coordinator: Coordinator | None = None
        self._batch_sums = Sums(targets_per_sample=data.targets_per_sample)
        self._test: Sums | None = None
        self._build_for_group()

    def open(
        self, facts: RunFacts, folder: Path, logbook: Logbook, console: Console, coordinator: Coordinator | None
    ) -> None:
        """Attach the run: its facts, folder and logbook on every rank, and on rank 0 the coordinator."""
        self.facts, self.folder, self.logbook, self.console = facts, folder, logbook, console
        self.coordinator = coordinator
        self.listeners = [logbook] if coordinator is None else [logbook, coordinator]

    def close(self) -> None:
        """Release the run folder."""
        if self.coordinator is not None:
            self.coordinator.close()

    def _build_for_group(self) -> None:
        """Build everything that depends on the group of ranks; raise `UserError` on all if a host has no room."""
        config, communicator, state = self.config, self.communicator, self.state
        rank, ranks = communicator.rank, communicator.size
        leaves = self.micro_batches.count(min(config.batch_size, len(self.data.parts.training)))
        self._dealer = BalancedDealer(rank, ranks, leaves) if config.balance else Dealer(ranks)
        self.timeline = Timeline(communicator)
        self._trace = None if config.trace is None else Trace(self.timeline)
        self._finite_check = nonfinite.FiniteCheck(config, state, self._save_micro_batch)
        cross_check = [corruption.CrossCheck(config, state)] if config.cross_check else []
        observers: list[StepObserver] = [FaultPoints(state), *cross_check, self.timeline, self._finite_check]
        self.optimizer_step = OptimizerStep(
            communicator,
            state.network,
            state.optimizer,
            micro_batch_size=config.micro_batch_size,
            reduction=config.reduction,
            shards_of=self._dealer.shards,
            clip_norm=config.clip_norm,
            observers=[*observers, self.stop, self._dealer],
        )
        self._metric_reduction = REDUCTIONS[config.reduction](communicator, Layout(METRIC_FIELDS))
        self.samples_since_epoch = 0
        full, training = config.batch_size, len(self.data.parts.training)
        # The full batch and the ragged last one of an epoch both get their room before training.
        for samples in sorted({min(full, training), training % full or full}):
            self.optimizer_step.deal(samples)

    @property
    def work_done(self) -> tuple[int, int]:
        """The steps, and the micro-batches that this rank has loaded; for the watchdog."""
        return self.state.step, self.micro_batches.loaded

    def run(self) -> Summary:
        """Train to the last step; if the training is complete, score the test part; return the summary."""
        phases: dict[Phase, Callable[[], None]] = {
            Phase.TRAIN: self._train,
            Phase.COMPARE: self._compare_replicas,
            Phase.VALIDATE: self.validate,
            Phase.CHECKPOINT: self._checkpoint,
            Phase.TEST: self._score_test,
            Phase.FINISH: self._finish,
        }
        fault_point("training", owner=self.state)
        while self.phase is not Phase.END:
            try:
                phases[self.phase]()
            except PeerLost as lost:
                self.note(recover(self, lost, lambda action: fault_point(action.value, owner=self.state)))
            except (MemoryError, OSError) as error:
                end_rank_after_host_fault(self.communicator, error)
                raise
        if not self.recoveries:  # otherwise MPI might wait for the lost ranks
            with suppress(PeerLost):  # all work is done
                self.optimizer_step.close()
                self._metric_reduction.close()
        if not self._is_at_the_end:
            raise self.stop.error(self.state.step)
        return self.summary

    # -- which phase comes next

    def _after_comparison(self) -> Phase:
        if self.state.step % self.steps_per_epoch == 0:
            return Phase.VALIDATE
        return Phase.CHECKPOINT if self._checkpoint_is_due else Phase.TRAIN

    @property
    def _checkpoint_is_due(self) -> bool:
        """Whether a checkpoint follows this step. One also follows each validation."""
        every = self.config.checkpoint_every
        return self._stops_here or (every > 0 and self.state.step % every == 0)

    def _after_checkpoint(self) -> Phase:
        if not self._stops_here:
            return Phase.TRAIN
        return Phase.TEST if self.state.step >= self.total_steps or self._stops_early else Phase.FINISH

    @property
    def _stops_here(self) -> bool:
        return self._is_at_the_end or self.stop.agreed is not None

    @property
    def _is_at_the_end(self) -> bool:
        return self.state.step >= self.last_step or self._stops_early

    @property
    def _stops_early(self) -> bool:
        """Whether validation has not improved for as many epochs as `--early-stopping` allows."""
        return best.stops_early(self.config, self.state, self.steps_per_epoch)

    # -- the phases

    def _train(self) -> None:
        self.take_step()
        every = self.config.verify_every
        self.phase = Phase.COMPARE if every and self.state.step % every == 0 else self._after_comparison()

    def take_step(self) -> None:
        """Take one optimizer step and tell the listeners; `PeerLost` leaves the state as it was."""
        state, progress = self.state, self.state.progress
        rows = self._batch_order.rows(state.step)
        key = self.key.of("training", state.step)
        learning_rate = self.schedule(state.step) * best.plateau_share(self.config, progress.plateau_cuts)

        def load(index: int) -> tuple[NDArray[np.float32], NDArray[Any]]:
            loaded = self.micro_batches.load(rows, index, key.of(index, "augmentation"))
            fault_point("forward", owner=state)
            return loaded

        total = self.optimizer_step.take(
            supervised(state.network, self._training_loss, load, key),
            samples=len(rows),
            learning_rate=learning_rate,
            update_number=state.step + 1 - progress.skipped_steps,  # Adam's bias correction counts no skipped step
        )
        fault = self._finite_check.fault
        state.step_array += 1
        progress.train_seconds += self.timeline.step_seconds
        self.samples_since_epoch += len(rows)
        if fault is None:
            state.epoch_sums.add(total)
            self._batch_sums.set(float(total["loss_sum"][0]), int(total["counts"][0]), len(rows))
        else:
            progress.skipped_steps += 1
        for listener in self.listeners:
            if self._dealer.new_shares is not None:
                listener.shares_changed(state, self._dealer.new_shares)
            if fault is None:
                listener.stepped(state, self._batch_sums, learning_rate)
            else:
                listener.skipped(state, fault)

    def _compare_replicas(self) -> None:
        with committed(self.communicator):
            corruption.compare_replicas(self.communicator, self.state)
        self.phase = self._after_comparison()

    def validate(self) -> None:
        """Judge the epoch that this step has ended, and clear its sums."""
        state = self.state
        if state.epoch_sums.samples == 0:
            raise self._not_finite(f"every step of epoch {state.step // self.steps_per_epoch} was skipped")
        fault_point("validation", owner=state)
        with committed(self.communicator):
            validation = self.evaluate(self.data.parts.validation)
            fault_point("validation", when="after", owner=validation)
            spent = self.timeline.spent()
        fault_point("validation", when="committed", owner=validation)
        self._check_loss(validation, "validation")
        best.note_validation(self.config, state, validation, self.steps_per_epoch)
        counted = {"samples": self.samples_since_epoch, **self._dealer.epoch_record()}
        self.samples_since_epoch = 0
        for listener in self.listeners:
            listener.epoch_ended(state, validation, spent, counted)
        state.epoch_sums.set(0.0, 0, 0)
        self.phase = Phase.CHECKPOINT

    def _checkpoint(self) -> None:
        """Save the state, or raise `UserError` on every rank."""

        def save() -> bool:
            assert self.coordinator is not None
            return self.coordinator.keeper.save(self.state, last=self._stops_here)

        fault_point("checkpoint", owner=self.state)
        with committed(self.communicator):
            if self.config.verify_every:
                corruption.compare_replicas(self.communicator, self.state)
            together(self.communicator, self._check_weights)
            previous_is_saved = from_rank_0(self.communicator, save)
            fault_point("checkpoint", when="after", owner=self.state)
        fault_point("checkpoint", when="committed", owner=self.state)
        for listener in self.listeners:
            listener.checkpointed(self.state, previous_is_saved=previous_is_saved)
        self.phase = self._after_checkpoint()

    def _score_test(self) -> None:
        fault_point("test", owner=self.state)
        weights = best.weights_to_score(self.config, self.communicator, self.state, self.folder, self.console.warning)
        with committed(self.communicator), weights as step:
            test = self.evaluate(self.data.parts.test)
            fault_point("test", when="after", owner=test)
        fault_point("test", when="committed", owner=test)
        self._check_loss(test, "test")
        self._test, self.state.progress.test_step = test, step
        for listener in self.listeners:
            listener.tested(self.state, test)
        self.phase = Phase.FINISH

    def _finish(self) -> None:
        with committed(self.communicator):
            if self._trace is not None:
                self.timeline.spent()
                trace = self._trace.gather(self.state.step)
                if self.coordinator is not None and trace is not None:
                    self.coordinator.write_trace(trace)
            summary = summarize(
                self.communicator,
                self.state,
                self._test,
                self.config,
                training_samples=len(self.data.parts.training),
                recoveries=self.recoveries,
            )
            fault_point("finish", owner=self.state)
            for listener in self.listeners:
                listener.finished(self.state, self._test, asdict(summary))
            fault_point("finish", when="after", owner=self.state)
        self.summary = summary
        self.phase = Phase.END

    def evaluate(self, rows: NDArray[np.int64]) -> Sums:
        """Return the sums of loss and correct predictions over the rows, each counted once. Collective."""
        shards = self._dealer.shards(self.micro_batches.count(len(rows)))
        network, rank = self.state.network, self.communicator.rank
        return evaluate(network, self.loss, self.micro_batches, rows, shards, self._metric_reduction, rank=rank)

    # -- recovery

    @property
    def position(self) -> Position:
        """The position of this rank: the steps taken, and the next phase."""
        return [self.state.step, int(self.phase)]

    def catch_up(self, source: int) -> None:
        """Take the position and state of rank `source` if it is ahead of this rank. Collective."""
        communicator, state = self.communicator, self.state
        test = None if self._test is None else [float(self._test.loss_sum[0]), *map(int, self._test.counts)]
        mine = [self.position, state.progress.to_json(), self.stop.agreed, test, self.logbook.to_json()]
        position, progress, stop, test, logbook = communicator.bcast_json(mine, source)
        arrays = [(array, array.copy()) for _, array in state.named_arrays()]
        for _, received in arrays:
            communicator.bcast(received, source)
        if position <= self.position:
            return
        for array, received in arrays:
            array[...] = received
        state.progress, self.stop.agreed, self.phase = RunProgress.from_json(progress), stop, Phase(position[1])
        if test is not None:
            self._test = Sums(targets_per_sample=self.data.targets_per_sample)
            self._test.set(*test)
        self.logbook.take(logbook)

    def rebuild(self) -> None:
        """Build again what depends on the group. The lowest rank becomes the coordinator. Collective."""

        def take_over() -> None:
            if self.coordinator is None:
                self.coordinator = Coordinator.take_over(self.facts, self.folder, self.logbook, self.console)
                self.listeners.append(self.coordinator)

        self.communicator.notice_cores()
        self._build_for_group()
        on_rank_0(self.communicator, take_over)

    def note(self, recovery: CompletedRecovery, *, during_preparation: bool = False) -> None:
        """Add a recovery to the summary, and tell the listeners."""
        ranks, lost = self.communicator.size, recovery.lost_ranks
        in_step = self.phase is Phase.TRAIN and not during_preparation
        step = self.state.step + (1 if in_step else 0)
        when = None if during_preparation else f"{'in' if in_step else 'after'} step {step}"
        self.recoveries.append(
            {"step": step, "lost_ranks": lost, "seconds": round(recovery.seconds, 6), "ranks": ranks}
        )
        for listener in self.listeners:
            listener.recovered(recovery_line(lost, when, ranks, recovery.seconds), self.recoveries[-1])

    # -- details

    def _save_micro_batch(self, fault: nonfinite.Fault) -> str | None:
        """Save the micro-batch of a fault in the current step; return the file's name on all ranks. Collective."""

        def save() -> str | None:
            if self.coordinator is None:  # a dry run writes nothing
                return None
            assert fault.micro_batch is not None
            batch = self._batch_order.rows(self.state.step)
            rows = batch_order.micro_batch(batch, fault.micro_batch, self.config.micro_batch_size)
            return self.coordinator.save_micro_batch(fault, {"rows": rows, **self.data.samples(rows)})

        return from_rank_0(self.communicator, save)

    def _not_finite(self, what: str) -> DivergedError:
        return nonfinite.diverged(what, self.config, self.state)

    def _check_weights(self) -> None:
        if not all(nonfinite.is_finite(array) for _, array in self.state.named_arrays()):
            raise self._not_finite(f"the weights are not finite after step {self.state.step}")

    def _check_loss(self, sums: Sums, part: str) -> None:
        if not math.isfinite(sums.loss):
            raise self._not_finite(f"the {part} loss is {sums.loss} after step {self.state.step}")
