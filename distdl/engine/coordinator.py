"""The coordinator: what rank 0 does besides training. Run folder, metrics, checkpoints, what a person sees.

Other ranks have a `Follower` in its place, which does nothing at the same points; so the trainer never asks
who it is. What can fail because of what the user gave happens before training, agreed by all ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from distdl.arrays import sha256_of_arrays
from distdl.config import TrainConfig, run_folder_of
from distdl.engine import checkpoint as checkpoints
from distdl.engine.checkpoint import Checkpoint
from distdl.engine.environment import kernel_family
from distdl.engine.files import remove_temporaries, write_durably
from distdl.engine.metrics import JsonLines, Sums
from distdl.engine.progress import Progress
from distdl.engine.run_folder import Start, claim
from distdl.engine.state import TrainingState
from distdl.engine.timeline import Spent
from distdl.engine.trace import write as write_trace
from distdl.errors import UserError

#: Checkpoints in a row that may fail to be written before the run gives up.
MISSES_ALLOWED = 3


class Follower:
    """What ranks other than 0 do at the points where the coordinator acts: nothing."""

    def started(self) -> None:
        """Say where the run goes on from, below the banner."""

    def stepped(self, state: TrainingState, batch: Sums, learning_rate: float) -> None:
        """React to a step that has just been taken; `batch` holds the sums of its samples."""

    def epoch_ended(self, state: TrainingState, validation: Sums, spent: Spent) -> None:
        """React to the end of an epoch, after validation and before the epoch's sums are cleared."""

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
        steps_per_epoch: int,
        progress: Progress,
    ) -> None:
        self.config = config
        self.folder = start.folder
        self.progress = progress
        self._steps_per_epoch = steps_per_epoch
        self._checkpoints = start.folder / "checkpoints"
        self._misses = 0
        self._kernel_family = kernel_family()
        self._versions = environment["versions"]
        self._start = start
        with claim(start.folder, self._checkpoints) as self._lock:
            for folder in (start.folder, self._checkpoints):
                remove_temporaries(folder)
            write_durably(start.folder / "config.toml", config.to_toml().encode())
            write_durably(start.folder / "env.json", _pretty(environment))
            keep = self._kept_lengths(start)
            self._metrics = JsonLines(start.folder / "metrics.jsonl", keep.get("metrics", 0))
            self._timing = JsonLines(start.folder / "timing.jsonl", keep.get("timing", 0))
            self._hashes = None
            if config.record_hashes:
                self._hashes = JsonLines(start.folder / "hashes.jsonl", keep.get("hashes", 0))

    def _kept_lengths(self, start: Start) -> dict[str, int]:
        """Return how many bytes of each log belong to the checkpoint; bring them along into a new folder."""
        if start.checkpoint is None or start.path is None:
            return {}
        lengths: dict[str, int] = start.checkpoint.header["log_bytes"]
        origin = run_folder_of(start.path)
        for name, length in lengths.items():
            source, target = origin / f"{name}.jsonl", start.folder / f"{name}.jsonl"
            if source.resolve() != target.resolve() and source.is_file():
                write_durably(target, source.read_bytes()[:length])
            if not target.is_file() or target.stat().st_size < length:
                self.progress.warning(f"{target} lacks records from before step {start.checkpoint.header['step']}")
        return lengths

    def started(self) -> None:
        """Say where the run goes on from, and whatever a person should know about that."""
        start = self._start
        for complaint in start.complaints:
            self.progress.warning(f"{complaint}; the one before it is used")
        if start.checkpoint is None:
            return
        before = start.checkpoint.header
        self.progress.line(f"resumed from {start.path} after step {before['step']}")
        if before["kernel_family"] != self._kernel_family:
            self.progress.warning(
                f"the checkpoint was made with the kernels {before['kernel_family']}, this machine runs "
                f"{self._kernel_family}: bits may differ from here on"
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
            self._metrics.write(
                {
                    "step": state.step,
                    "epoch": epoch + 1,
                    "loss": batch.loss,
                    "accuracy": batch.accuracy,
                    "lr": learning_rate,
                }
            )
        if self._hashes is not None:
            hashes = {name: sha256_of_arrays([(name, array)])[:16] for name, array in state.named_arrays()}
            self._hashes.write({"step": state.step, "loss": batch.loss, "hashes": hashes})
        self.progress.live(epoch + 1, self.config.epoch_count, position + 1, self._steps_per_epoch, batch.loss)

    def epoch_ended(self, state: TrainingState, validation: Sums, spent: Spent) -> None:
        """Log the epoch and print its line."""
        epoch = state.step // self._steps_per_epoch
        training = state.epoch_sums
        self._metrics.write(
            {
                "step": state.step,
                "epoch": epoch,
                "train_loss": training.loss,
                "train_accuracy": training.accuracy,
                "validation_loss": validation.loss,
                "validation_accuracy": validation.accuracy,
            }
        )
        seconds = spent.seconds
        speed = training.samples / seconds if seconds else 0.0
        compute, reduction, wait = spent.shares()
        self._timing.write(
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
                "time": time.time(),
            }
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
        logs = {"metrics": self._metrics, "timing": self._timing, "hashes": self._hashes}
        header = {
            "step": state.step,
            "config": self.config.to_json(),
            "progress": state.progress,
            "log_bytes": {name: log.length for name, log in logs.items() if log is not None},
            "versions": self._versions,
            "kernel_family": self._kernel_family,
        }
        try:
            for log in logs.values():
                if log is not None:
                    log.flush_to_disk()
            path = checkpoints.path_of_step(self._checkpoints, state.step)
            checkpoints.write(path, Checkpoint(dict(state.named_arrays()), header))
            checkpoints.remove_old(self._checkpoints, self.config.keep_checkpoints, state.progress["best_step"])
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
            self._metrics.write({"step": state.step, "test_loss": test.loss, "test_accuracy": test.accuracy})
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
        for file in (self._metrics, self._timing, self._hashes, self._lock):
            if file is not None:
                file.close()


def _pretty(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
