"""The coordinator: what rank 0 does besides training. Run folder, metrics, checkpoints, what a person sees.

Other ranks have a `Follower` in its place, which does nothing at the same points; so the trainer never asks
who it is. What can fail because of what the user gave happens before training, agreed by all ranks.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import sha256_of_arrays
from distdl.config import TrainConfig
from distdl.engine import checkpoint as checkpoints
from distdl.engine.checkpoint import Checkpoint
from distdl.engine.files import remove_temporaries, write_durably
from distdl.engine.metrics import JsonLines, Sums
from distdl.engine.nonfinite import Fault
from distdl.engine.progress import Progress, describe_shares
from distdl.engine.run_folder import Start, claim
from distdl.engine.state import TrainingState
from distdl.engine.timeline import Spent
from distdl.engine.trace import write as write_trace
from distdl.errors import DamagedFileError, UserError

#: Checkpoints in a row that may fail to be written before the run gives up.
MISSES_ALLOWED = 3
#: Between two lines that say how micro-batches are dealt now, and between two warnings of skipped steps.
SECONDS_BETWEEN_SHARES = 5.0
SECONDS_BETWEEN_SKIPS = 5.0
#: Micro-batches whose loss or gradient was not finite, of one run.
MOST_SAVED = 10


class Follower:
    """What ranks other than 0 do at the points where the coordinator acts: nothing."""

    def started(self) -> None:
        """Say where the run goes on from, below the banner."""

    def stepped(self, state: TrainingState, batch: Sums, learning_rate: float) -> None:
        """React to a step that has just been taken; `batch` holds the sums of its samples."""

    def not_finite(self, fault: Fault, samples: Mapping[str, NDArray[Any]]) -> str | None:  # noqa: ARG002
        """Save the micro-batch that a step's fault came from, for inspection; return where, if it was saved."""
        return None

    def skipped(self, state: TrainingState, fault: Fault) -> None:
        """React to a step that has just been taken without an update of the weights."""

    def redealt(self, shares: Sequence[int]) -> None:
        """Say that from the next step on each rank computes so many micro-batches of a full batch."""

    def epoch_ended(self, state: TrainingState, validation: Sums, spent: Spent, counted: Mapping[str, Any]) -> None:
        """React to the end of an epoch, after validation and before the epoch's sums are cleared.

        `spent` and `counted`, the samples and shares, tell of the steps since the last such point, or the start.
        """

    def checkpoint(self, state: TrainingState, *, last: bool = False) -> None:
        """Save the state; where it is the last chance to, a failure is an error."""

    def traced(self, trace: Mapping[str, Any] | None) -> None:
        """Write the trace of all ranks, which rank 0 alone has."""

    def finished(self, state: TrainingState, test: Sums | None, summary: dict[str, Any]) -> None:
        """Write the summary and print the receipt."""

    def close(self) -> None:
        """Let go of the run folder."""


class Coordinator(Follower):
    """Keeps the run folder and speaks to the person.

    Raises `UserError` where the folder cannot be made or is in use.
    """

    def __init__(
        self,
        config: TrainConfig,
        start: Start,
        environment: Mapping[str, Any],
        data_sha256: str,
        steps_per_epoch: int,
        progress: Progress,
    ) -> None:
        self.config = config
        self.progress = progress
        self._steps_per_epoch = steps_per_epoch
        self._misses = 0
        self._log_is_refused = False
        self._data_sha256 = data_sha256
        self._kernel_families = environment["kernel_families"]
        self._versions = environment["versions"]
        self._start = start
        self._shares_to_say: Sequence[int] | None = None
        self._say_shares_after = 0.0
        self._say_skip_after = 0.0
        with claim(start) as (self.folder, self._lock):
            self._checkpoints = self.folder / "checkpoints"
            for folder in (self.folder, self._checkpoints):
                remove_temporaries(folder)
            if start.checkpoint is not None and start.path is not None:
                self._bring_along(start.checkpoint, start.path, start.origin)
            write_durably(self.folder / "config.toml", config.to_toml().encode())
            write_durably(self.folder / "env.json", _pretty(environment))
            lengths = {}
            if start.checkpoint is not None:
                # Before the logs are cut: no checkpoint may ever be later than they are.
                checkpoints.remove_later(self._checkpoints, start.checkpoint.header["step"])
                lengths = start.checkpoint.header["log_bytes"]
            names = ["metrics", "timing", *(["hashes"] if config.record_hashes else [])]
            self._logs = {name: JsonLines(self.folder / f"{name}.jsonl", lengths.get(name, 0)) for name in names}

    def _bring_along(self, checkpoint: Checkpoint, path: Path, origin: Path | None) -> None:
        """Let the folder hold all that the checkpoint builds on; without it, the run could not be resumed here."""
        step, best_step = checkpoint.header["step"], checkpoint.header["progress"].get("best_step")
        for name, length in checkpoint.header["log_bytes"].items():
            target = self.folder / f"{name}.jsonl"
            source = target if origin is None else origin / target.name
            if source.resolve() != target.resolve() and source.is_file():
                write_durably(target, source.read_bytes()[:length])
            if not target.is_file() or target.stat().st_size < length:
                self.progress.warning(f"{target} lacks records from before step {step}")
        if best_step not in {None, step}:
            target = checkpoints.path_of_step(self._checkpoints, best_step)
            best = path.with_name(target.name)
            if best.is_file() and not target.exists():
                try:
                    checkpoints.write(target, checkpoints.read(best))
                except DamagedFileError as error:
                    self.progress.warning(f"{error}; this best checkpoint is not brought along")
        target = checkpoints.path_of_step(self._checkpoints, step)
        if not target.exists():
            checkpoints.write(target, checkpoint)

    def started(self) -> None:
        """Say where the run goes on from, and whatever a person should know about that."""
        start = self._start
        for complaint in start.complaints:
            self.progress.warning(f"{complaint}; the one before it is used")
        if len(self._kernel_families) > 1:
            self.progress.warning(f"the ranks run different kernels ({self._kernel_family}): bits depend on the ranks")
        if start.checkpoint is None:
            return
        before = start.checkpoint.header
        self.progress.line(f"resumed from {start.path} after step {before['step']}")
        if before["kernel_family"] != self._kernel_family:
            self.progress.warning(
                f"the checkpoint was made with the kernels {before['kernel_family']}, this run has "
                f"{self._kernel_family}: bits may differ from here on"
            )
        if before["versions"].get("numpy") != self._versions["numpy"]:
            self.progress.warning(
                f"the checkpoint was made with NumPy {before['versions'].get('numpy')}, this run has "
                f"{self._versions['numpy']}: bits may differ from here on"
            )
        threads = before["config"].get("threads_per_rank")
        if threads != self.config.threads_per_rank:
            self.progress.warning(
                f"the checkpoint was made with --threads-per-rank {threads}, this run has "
                f"{self.config.threads_per_rank}: bits may differ from here on"
            )

    def stepped(self, state: TrainingState, batch: Sums, learning_rate: float) -> None:
        """Log the step where it is due, and move the progress on."""
        epoch, position = divmod(state.step - 1, self._steps_per_epoch)
        if self.config.log_every and state.step % self.config.log_every == 0:
            self._log(
                "metrics",
                {
                    "step": state.step,
                    "epoch": epoch + 1,
                    "loss": batch.loss,
                    "accuracy": batch.accuracy,
                    "lr": learning_rate,
                },
            )
        self._log_hashes(state, batch.loss)
        if self._shares_to_say is not None and time.monotonic() >= self._say_shares_after:
            self.progress.line(f"balance: {describe_shares(self._shares_to_say)} from step {state.step + 1} on")
            self._shares_to_say = None
            self._say_shares_after = time.monotonic() + SECONDS_BETWEEN_SHARES
        self.progress.live(epoch + 1, self.config.epoch_count, position + 1, self._steps_per_epoch, batch.loss)

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
            self.progress.warning(f"cannot write {path}: {error.strerror or error}")
            return None
        return str(path)

    def skipped(self, state: TrainingState, fault: Fault) -> None:
        """Log the step, in whose record there is no loss, and warn of it, though not of each of many."""
        count = state.progress["skipped_steps"]
        epoch = (state.step - 1) // self._steps_per_epoch + 1
        self._log(
            "metrics",
            {
                "step": state.step,
                "epoch": epoch,
                "skipped": fault.what,
                "micro_batch": fault.micro_batch,
                "skipped_steps": count,
            },
        )
        self._log_hashes(state, None)
        if time.monotonic() >= self._say_skip_after:
            self.progress.warning(f"{fault}: no update in this step ({count} skipped so far)")
            self._say_skip_after = time.monotonic() + SECONDS_BETWEEN_SKIPS

    def redealt(self, shares: Sequence[int]) -> None:
        """Say so below the step, or a few seconds later where shares change often."""
        self._shares_to_say = shares

    def epoch_ended(self, state: TrainingState, validation: Sums, spent: Spent, counted: Mapping[str, Any]) -> None:
        """Log the epoch and print its line."""
        epoch = state.step // self._steps_per_epoch
        training = state.epoch_sums
        self._log(
            "metrics",
            {
                "step": state.step,
                "epoch": epoch,
                "train_loss": training.loss,
                "train_accuracy": training.accuracy,
                "validation_loss": validation.loss,
                "validation_accuracy": validation.accuracy,
            },
        )
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
        self.progress.line(
            f"epoch {epoch:3d}/{self.config.epoch_count}  loss {training.loss:.4f}  train {training.accuracy:7.2%}  "
            f"validation {validation.accuracy:7.2%}  {seconds:6.1f} s  {speed:,.0f} samples/s{where_it_went}"
        )

    def checkpoint(self, state: TrainingState, *, last: bool = False) -> None:
        """Save the state and remove checkpoints that are no longer wanted.

        A disk that refuses is warned about and the last good checkpoint stays; after several misses in a row,
        or where it is the last chance, `UserError` is raised.
        """
        try:
            for log in self._logs.values():
                log.flush_to_disk()
            header = {
                "step": state.step,
                "config": self.config.to_json(),
                "progress": state.progress,
                "log_bytes": {name: log.length for name, log in self._logs.items()},
                "data_sha256": self._data_sha256,
                "versions": self._versions,
                "kernel_family": self._kernel_family,
            }
            path = checkpoints.path_of_step(self._checkpoints, state.step)
            checkpoints.write(path, Checkpoint(dict(state.named_arrays()), header))
            keep, best_step = self.config.keep_checkpoints, state.progress["best_step"]
            checkpoints.remove_old(self._checkpoints, state.step, keep, best_step)
            self._misses = 0
        except OSError as error:
            self._misses += 1
            reason = (
                f"cannot write the checkpoint after step {state.step} to {self._checkpoints}: {error.strerror or error}"
            )
            if last or self._misses >= MISSES_ALLOWED:
                raise UserError(f"{reason}; the checkpoints before it are intact: make room and use --resume") from None
            self.progress.warning(f"{reason}; the checkpoints before it are intact, training goes on")

    def traced(self, trace: Mapping[str, Any] | None) -> None:
        """Write the trace of all ranks; a disk that refuses is warned about."""
        assert trace is not None
        assert self.config.trace is not None
        try:
            write_trace(self.config.trace, trace)
            self.progress.line(f"trace: {self.config.trace} (for ui.perfetto.dev)")
        except OSError as error:
            self.progress.warning(f"cannot write the trace {self.config.trace}: {error.strerror or error}")

    def finished(self, state: TrainingState, test: Sums | None, summary: dict[str, Any]) -> None:
        """Log the test score, write the summary and print the receipt."""
        if test is not None:
            self._log("metrics", {"step": state.step, "test_loss": test.loss, "test_accuracy": test.accuracy})
            self.progress.line(f"test accuracy: {test.accuracy:.2%}")
        else:
            self.progress.line(f"stopped after step {state.step}; --resume {self.folder} goes on")
        try:
            write_durably(self.folder / "summary.json", _pretty(summary))
        except OSError as error:
            self.progress.warning(f"cannot write {self.folder / 'summary.json'}: {error.strerror}")
        self.progress.line(f"run folder: {self.folder}")
        self.progress.line(f"weights sha256: {summary['weights_sha256']}")

    def close(self) -> None:
        """Close the logs and unlock the run folder."""
        with self._lock:
            for log in self._logs.values():
                try:
                    log.close()
                except OSError as error:
                    self.progress.warning(f"the last records of {log.path} are not written: {error.strerror}")

    @property
    def _kernel_family(self) -> str:
        """The kernels of all ranks, in one text."""
        return " and ".join(self._kernel_families)

    def _log_hashes(self, state: TrainingState, loss: float | None) -> None:
        if self.config.record_hashes:
            hashes = {name: sha256_of_arrays([(name, array)])[:16] for name, array in state.named_arrays()}
            self._log("hashes", {"step": state.step, "loss": loss, "hashes": hashes})

    def _log(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a record to a log; while the disk refuses, which is warned about once, it waits in memory."""
        try:
            self._logs[name].write(record)
            self._log_is_refused = False
        except OSError as error:
            if not self._log_is_refused:
                self.progress.warning(
                    f"cannot write to {self._logs[name].path}: {error.strerror}; its records wait until there is room"
                )
            self._log_is_refused = True


def _pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
