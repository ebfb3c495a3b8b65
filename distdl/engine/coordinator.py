"""The coordinator: what rank 0 does besides training. Run folder, metrics, checkpoints, what a person sees.

Other ranks have a `Follower` in its place, which does nothing at the same points; so the trainer never asks
who it is. What can fail because of what the user gave happens before training, agreed by all ranks. Where the
coordinator may be lost, followers keep what the logs should hold, and the lowest that is left is `promoted`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.config import TrainConfig
from distdl.engine.checks.nonfinite import Fault
from distdl.engine.console import Console, describe_shares
from distdl.engine.logbook import Journal, Records
from distdl.engine.metrics import JsonLines, Sums
from distdl.engine.state import TrainingState
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoint_writer import CheckpointWriter, Outcome
from distdl.engine.storage.checkpoints import Checkpoint
from distdl.engine.storage.files import indented_json, remove_temporaries, write_durably
from distdl.engine.storage.run_folder import Start, claim
from distdl.engine.timing.timeline import Spent
from distdl.engine.timing.trace import write as write_trace
from distdl.errors import DamagedFileError, UserError

#: Checkpoints in a row that may fail to be written before the run gives up.
MISSES_ALLOWED = 3
#: Between two lines that say how micro-batches are dealt now, and between two warnings of skipped steps.
SECONDS_BETWEEN_SHARES = 5.0
SECONDS_BETWEEN_SKIPS = 5.0
#: Micro-batches whose loss or gradient was not finite, of one run.
MOST_SAVED = 10


class Follower:
    """What ranks other than 0 do at the points where the coordinator acts: nothing, or keep what it logs.

    `succeed` makes the coordinator that this rank becomes when all ranks before it are lost.
    """

    def __init__(self, journal: Journal | None = None, succeed: Callable[[], Coordinator] | None = None) -> None:
        self.journal = journal
        self._succeed = succeed

    def promoted(self) -> Follower:
        """Return what this rank is once it is rank 0."""
        return self if self._succeed is None else self._succeed()

    def _records(self, make: Callable[[Journal], Records]) -> None:
        """Take in the records that `make` makes."""
        if self.journal is not None and self.journal.keeps:
            make(self.journal)

    def open_run(self) -> None:
        """Write what a run folder holds from the start."""

    def started(self) -> None:
        """Say where the run goes on from, below the banner."""

    def stepped(self, state: TrainingState, batch: Sums, learning_rate: float) -> None:
        """React to a step that has just been taken; `batch` holds the sums of its samples."""
        self._records(lambda journal: journal.stepped(state, batch, learning_rate))

    def not_finite(self, fault: Fault, samples: Mapping[str, NDArray[Any]]) -> str | None:  # noqa: ARG002
        """Save the micro-batch that a step's fault came from, for inspection; return where, if it was saved."""
        return None

    def skipped(self, state: TrainingState, fault: Fault) -> None:
        """React to a step that has just been taken without an update of the weights."""
        self._records(lambda journal: journal.skipped(state, fault))

    def redealt(self, shares: Sequence[int]) -> None:
        """Say that from the next step on each rank computes so many micro-batches of a full batch."""

    def epoch_ended(
        self,
        state: TrainingState,
        validation: Sums,
        spent: Spent,  # noqa: ARG002
        counted: Mapping[str, Any],  # noqa: ARG002
    ) -> None:
        """React to the end of an epoch, after validation and before the epoch's sums are cleared.

        `spent` and `counted`, the samples and shares, tell of the steps since the last such point, or the start.
        """
        self._records(lambda journal: journal.epoch_ended(state, validation))

    def checkpoint(self, state: TrainingState, *, last: bool = False) -> bool:  # noqa: ARG002
        """Save the state; return whether the checkpoint before was saved. On the last chance, a failure is an error."""
        return False

    def checkpointed(self, *, before_is_saved: bool) -> None:
        """React to a checkpoint that the coordinator has begun to write."""
        if self.journal is not None:
            self.journal.checkpointed(before_is_saved=before_is_saved)

    def tested(self, state: TrainingState, test: Sums) -> None:
        """React to the score of the test part."""
        self._records(lambda journal: journal.tested(state, test))

    def recovered(self, what: str) -> None:
        """Say that ranks were lost and the others go on."""

    def traced(self, trace: Mapping[str, Any] | None) -> None:
        """Write the trace of all ranks, which rank 0 alone has."""

    def finished(self, state: TrainingState, test: Sums | None, summary: dict[str, Any]) -> None:
        """Write the summary and print the receipt."""

    def close(self) -> None:
        """Let go of the run folder."""


class Coordinator(Follower):
    """Keeps the run folder and speaks to the person.

    Raises `UserError` where the folder cannot be made or is in use. Nothing is written into it before `open_run`.
    """

    def __init__(
        self,
        config: TrainConfig,
        start: Start,
        environment: Mapping[str, Any],
        data_sha256: str,
        console: Console,
        journal: Journal,
    ) -> None:
        self._set_up(config, environment, data_sha256, console, journal)
        self._start = start
        self._opening = ExitStack()
        self.folder, self._lock = self._opening.enter_context(claim(start))
        self._checkpoints = self.folder / "checkpoints"
        self._logs: dict[str, JsonLines] = {}

    def open_run(self) -> None:
        """Write what the folder holds from the start; take away all of it, and raise `UserError`, if that fails."""
        config, start, journal = self.config, self._start, self._records_of
        with self._opening:
            for folder in (self.folder, self._checkpoints):
                remove_temporaries(folder)
            if start.checkpoint is not None and start.path is not None:
                self._bring_along(start.checkpoint, start.path, start.origin)
            write_durably(self.folder / "config.toml", config.to_toml().encode())
            write_durably(self.folder / "env.json", indented_json(self._environment))
            lengths: dict[str, int] = {}
            if start.checkpoint is not None:
                # Before the logs are cut: no checkpoint may ever be later than they are.
                checkpoints.remove_later(self._checkpoints, start.checkpoint.header["step"])
                lengths = start.checkpoint.header["log_bytes"]
            names = ["timing", *journal.names]
            self._logs = {name: JsonLines(self.folder / f"{name}.jsonl", lengths.get(name, 0)) for name in names}
            journal.lengths = {name: self._logs[name].length for name in journal.names}
            (self.folder / "summary.json").unlink(missing_ok=True)  # whoever finds one knows that the run has ended

    def _set_up(
        self,
        config: TrainConfig,
        environment: Mapping[str, Any],
        data_sha256: str,
        console: Console,
        journal: Journal,
    ) -> None:
        super().__init__(journal)
        self.config = config
        self.console = console
        self._records_of = journal
        self._steps_per_epoch = journal.steps_per_epoch
        self._misses, self._last_miss = 0, ""
        self._newest_is_saved = False
        self._writer = CheckpointWriter(config.keep_checkpoints)
        self._log_is_refused = False
        self._data_sha256 = data_sha256
        self._environment = environment
        self._kernel_families = environment["kernel_families"]
        self._versions = environment["versions"]
        self._shares_to_say: Sequence[int] | None = None
        self._say_shares_after = 0.0
        self._say_skip_after = 0.0

    def _records(self, make: Callable[[Journal], Records]) -> None:
        for name, record in make(self._records_of):
            self._log(name, record)

    def _bring_along(self, checkpoint: Checkpoint, path: Path, origin: Path | None) -> None:
        """Let the folder hold all that the checkpoint builds on; without it, the run could not be resumed here."""
        step, best_step = checkpoint.header["step"], checkpoint.header["progress"].get("best_step")
        for name, length in checkpoint.header["log_bytes"].items():
            target = self.folder / f"{name}.jsonl"
            source = target if origin is None else origin / target.name
            if source.resolve() != target.resolve() and source.is_file():
                write_durably(target, source.read_bytes()[:length])
            if not target.is_file() or target.stat().st_size < length:
                self.console.warning(f"{target} lacks records from before step {step}")
        if best_step not in {None, step}:
            target = checkpoints.path_of_step(self._checkpoints, best_step)
            best = path.with_name(target.name)
            if best.is_file() and not target.exists():
                try:
                    checkpoints.write(target, checkpoints.read(best))
                except DamagedFileError as error:
                    self.console.warning(f"{error}; this best checkpoint is not brought along")
        target = checkpoints.path_of_step(self._checkpoints, step)
        if not target.exists():
            checkpoints.write(target, checkpoint)

    def started(self) -> None:
        """Say where the run goes on from, and whatever a person should know about that."""
        start = self._start
        for complaint in start.complaints:
            self.console.warning(f"{complaint}; the one before it is used")
        if len(self._kernel_families) > 1:
            self.console.warning(f"the ranks run different kernels ({self._kernel_family}): bits depend on the ranks")
        if start.checkpoint is None:
            return
        before = start.checkpoint.header
        self.console.line(f"resumed from {start.path} after step {before['step']}")
        if before["kernel_family"] != self._kernel_family:
            self.console.warning(
                f"the checkpoint was made with the kernels {before['kernel_family']}, this run has "
                f"{self._kernel_family}: bits may differ from here on"
            )
        if before["versions"].get("numpy") != self._versions["numpy"]:
            self.console.warning(
                f"the checkpoint was made with NumPy {before['versions'].get('numpy')}, this run has "
                f"{self._versions['numpy']}: bits may differ from here on"
            )
        threads = before["config"].get("threads_per_rank")
        if threads != self.config.threads_per_rank:
            self.console.warning(
                f"the checkpoint was made with --threads-per-rank {threads}, this run has "
                f"{self.config.threads_per_rank}: bits may differ from here on"
            )

    def stepped(self, state: TrainingState, batch: Sums, learning_rate: float) -> None:
        """Log the step where it is due, and move the progress on."""
        self._settle(wait=False)
        epoch, position = divmod(state.step - 1, self._steps_per_epoch)
        super().stepped(state, batch, learning_rate)
        if self._shares_to_say is not None and time.monotonic() >= self._say_shares_after:
            self.console.line(f"balance: {describe_shares(self._shares_to_say)} from step {state.step + 1} on")
            self._shares_to_say = None
            self._say_shares_after = time.monotonic() + SECONDS_BETWEEN_SHARES
        self.console.live(epoch + 1, self.config.epoch_count, position + 1, self._steps_per_epoch, batch.loss)

    def not_finite(self, fault: Fault, samples: Mapping[str, NDArray[Any]]) -> str | None:
        """Save the micro-batch as an .npz file in the run folder; of many, only the first."""
        path = self.folder / f"not-finite-step-{fault.step:09d}.npz"
        if len(list(self.folder.glob("not-finite-*.npz"))) >= MOST_SAVED and not path.exists():
            return None
        arrays: dict[str, Any] = {"step": fault.step, "micro_batch": fault.micro_batch, **samples}
        content = io.BytesIO()
        np.savez(content, **arrays)
        try:
            write_durably(path, content.getvalue())
        except OSError as error:
            self.console.warning(f"cannot write {path}: {error.strerror or error}")
            return None
        return str(path)

    def skipped(self, state: TrainingState, fault: Fault) -> None:
        """Log the step, in whose record there is no loss, and warn of it, though not of each of many."""
        super().skipped(state, fault)
        count = state.progress["skipped_steps"]
        if time.monotonic() >= self._say_skip_after:
            self.console.warning(f"{fault}: no update in this step ({count} skipped so far)")
            self._say_skip_after = time.monotonic() + SECONDS_BETWEEN_SKIPS

    def redealt(self, shares: Sequence[int]) -> None:
        """Say so below the step, or a few seconds later where shares change often."""
        self._shares_to_say = shares

    def epoch_ended(self, state: TrainingState, validation: Sums, spent: Spent, counted: Mapping[str, Any]) -> None:
        """Log the epoch and print its line."""
        super().epoch_ended(state, validation, spent, counted)
        epoch = state.step // self._steps_per_epoch
        training = state.epoch_sums
        seconds = spent.seconds
        speed = counted["samples"] / seconds if seconds else 0.0
        compute, reduction, wait = spent.shares()
        self._log(
            "timing",
            {
                "step": state.step,
                "epoch": epoch,
                "train_seconds": seconds,
                "compute_share": compute,
                "reduction_share": reduction,
                "wait_share": wait,
                "slowest_rank": spent.slowest,
                "compute_seconds": spent.compute,
                "reduction_seconds": spent.reduction,
                "wait_seconds": spent.waiting,
                **counted,
                "time": time.time(),
            },
        )
        where_it_went = f"  {spent}" if len(spent.compute) > 1 else ""
        scores = (
            f"train {training.accuracy:7.2%}  validation {validation.accuracy:7.2%}"
            if validation.targets_per_sample
            else (f"validation loss {validation.loss:.4f}")
        )
        self.console.line(
            f"epoch {epoch:3d}/{self.config.epoch_count}  loss {training.loss:.4f}  {scores}  {seconds:6.1f} s  "
            f"{speed:,.0f} samples/s{where_it_went}"
        )

    def checkpoint(self, state: TrainingState, *, last: bool = False) -> bool:
        """Let a copy of the state be saved, once the checkpoint before is; wait for it only where it is the last.

        Return whether the checkpoint before was saved, with the logs up to there.

        A disk that refuses is warned about and the last good checkpoint stays; after several misses in a row,
        or where it is the last chance, `UserError` is raised.
        """
        self._settle(wait=True)
        before_is_saved = self._newest_is_saved
        self._newest_is_saved = False
        try:
            header = {
                "step": state.step,
                "config": self.config.to_json(),
                "progress": state.progress,
                "log_bytes": {name: log.written_length() for name, log in self._logs.items()},
                "data_sha256": self._data_sha256,
                "versions": self._versions,
                "kernel_family": self._kernel_family,
            }
        except OSError as error:
            self._missed(Outcome(state.step, error), may_raise=True, last=last)
            return before_is_saved
        self._writer.start(self._checkpoints, state.named_arrays(), header, self._flush_logs)
        if last:
            self._settle(wait=True, last=True)
        return before_is_saved

    def _flush_logs(self) -> None:
        for log in self._logs.values():
            log.flush_to_disk()

    def _settle(self, *, wait: bool, last: bool = False) -> None:
        """React to how the writing of a checkpoint went; only where that is waited for may it end the run."""
        if wait and self._misses >= MISSES_ALLOWED:
            raise UserError(self._last_miss)
        outcome = self._writer.outcome(wait=wait)
        if outcome is None:
            return
        if outcome.refused is not None:
            self._missed(outcome, may_raise=wait, last=last)
            return
        self._misses, self._newest_is_saved = 0, True
        if outcome.removal_refused is not None:
            self.console.warning(self._what_failed(outcome))

    def _missed(self, outcome: Outcome, *, may_raise: bool, last: bool) -> None:
        """Count a checkpoint that could not be written, and say so."""
        self._misses += 1
        reason = f"{self._what_failed(outcome)}; the checkpoints before it are intact"
        self._last_miss = f"{reason}: make room and use --resume"
        if may_raise and (last or self._misses >= MISSES_ALLOWED):
            raise UserError(self._last_miss)
        goes_on = "goes on" if self._misses < MISSES_ALLOWED else "ends at the next one"
        self.console.warning(f"{reason}, training {goes_on}")

    def _what_failed(self, outcome: Outcome) -> str:
        if outcome.refused is None:
            what, error = f"cannot remove old checkpoints after step {outcome.step} from", outcome.removal_refused
        else:
            what, error = f"cannot write the checkpoint after step {outcome.step} to", outcome.refused
        return f"{what} {self._checkpoints}: {getattr(error, 'strerror', None) or error}"

    def recovered(self, what: str) -> None:
        """Say that ranks were lost and the others go on."""
        self.console.line(what)

    def traced(self, trace: Mapping[str, Any] | None) -> None:
        """Write the trace of all ranks; a disk that refuses is warned about."""
        assert trace is not None
        assert self.config.trace is not None
        try:
            write_trace(self.config.trace, trace)
            self.console.line(f"trace: {self.config.trace} (for ui.perfetto.dev)")
        except OSError as error:
            self.console.warning(f"cannot write the trace {self.config.trace}: {error.strerror or error}")

    def finished(self, state: TrainingState, test: Sums | None, summary: dict[str, Any]) -> None:
        """Write the summary and print the receipt; once more where ranks were lost meanwhile."""
        if test is not None:
            score = f"loss: {test.loss:.6f}" if test.accuracy is None else f"accuracy: {test.accuracy:.2%}"
            self.console.line(f"test {score}")
        else:
            self.console.line(f"stopped after step {state.step}; --resume {self.folder} goes on")
        if state.progress.get("skipped_steps"):
            self.console.warning(
                f"steps skipped, of {state.step}: {state.progress['skipped_steps']}; see metrics.jsonl"
            )
        try:
            write_durably(self.folder / "summary.json", indented_json(summary))
        except OSError as error:
            self.console.warning(f"cannot write {self.folder / 'summary.json'}: {error.strerror}")
        self.console.line(f"run folder: {self.folder}")
        self.console.line(f"weights sha256: {summary['weights_sha256']}")

    def close(self) -> None:
        """Wait for the checkpoint that is being written, close the logs and unlock the run folder."""
        if self._lock.closed:  # it could not be used after all
            return
        with self._lock:
            self._writer.close()
            unsaid = self._writer.outcome(wait=False)  # only where the run ends by an error or Ctrl-C
            if unsaid is not None and unsaid.refused is not None:
                self.console.warning(self._what_failed(unsaid))
            for log in self._logs.values():
                try:
                    log.close()
                except OSError as error:
                    self.console.warning(f"the last records of {log.path} are not written: {error.strerror}")

    @property
    def _kernel_family(self) -> str:
        """The kernels of all ranks, in one text."""
        return " and ".join(self._kernel_families)

    def _log(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a record to a log; while the disk refuses, which is warned about once, it waits in memory."""
        try:
            self._logs[name].write(record)
            self._log_is_refused = False
        except OSError as error:
            if not self._log_is_refused:
                self.console.warning(
                    f"cannot write to {self._logs[name].path}: {error.strerror}; its records wait until there is room"
                )
            self._log_is_refused = True
