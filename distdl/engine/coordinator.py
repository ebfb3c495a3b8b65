"""The coordinator: the extra role of rank 0. It owns the run folder, with a logbook, a checkpoint keeper and a console.

Rank 0 opens a new run folder or resumes one (`Coordinator.claim`, then `open_run`). If rank 0 is lost, the lowest
surviving rank becomes rank 0 and takes the run over (`Coordinator.take_over`). Both ways lead through one constructor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from distdl.config import TrainConfig
from distdl.data.signature import Signature
from distdl.engine.checks.nonfinite import Fault, file_of
from distdl.engine.console import Console
from distdl.engine.events import RunListener
from distdl.engine.keeper import CheckpointKeeper
from distdl.engine.logbook import Logbook
from distdl.engine.metrics import Sums
from distdl.engine.printed_lines import epoch_line, last_lines, plateau_line, result_lines
from distdl.engine.same_bits import warnings_about_bits
from distdl.engine.state import TrainingState
from distdl.engine.storage import checkpoints
from distdl.engine.storage.files import indented_json, remove_temporaries, write_durably
from distdl.engine.storage.run_folder import StartingPoint, copy_history, locked_run_folder
from distdl.engine.timing.timeline import Spent
from distdl.errors import UserError
from distdl.job.folder_lock import FolderLock, lock_folder


@dataclass(frozen=True)
class RunFacts:
    """What every rank knows about a run, and needs if it becomes the coordinator."""

    config: TrainConfig
    environment: Mapping[str, Any]
    """The content of ``env.json``."""
    data_sha256: str
    signature: Signature

    @property
    def of_every_header(self) -> dict[str, Any]:
        """The fields of a checkpoint's header that are the same in all checkpoints of the run."""
        return {
            "config": self.config.to_json(),
            "data_sha256": self.data_sha256,
            "versions": self.environment["versions"],
            "kernel_family": " and ".join(self.environment["kernel_families"]),
            "fingerprint": self.environment.get("fingerprint"),
            "signature": self.signature,
        }


class Coordinator(RunListener):
    """Owns the run folder of a training, on rank 0."""

    def __init__(self, facts: RunFacts, folder: Path, lock: FolderLock, logbook: Logbook, console: Console) -> None:
        self.folder = folder
        self.facts = facts
        self.config = facts.config
        self.console = console
        self.logbook = logbook
        self.keeper = CheckpointKeeper(
            folder / "checkpoints", facts.config.keep_checkpoints, facts.of_every_header, logbook, console
        )
        self._lock = lock
        self._start: StartingPoint | None = None
        self._opening = ExitStack()
        self._spent: Spent | None = None

    # -- the run folder

    @classmethod
    def claim(cls, facts: RunFacts, start: StartingPoint, logbook: Logbook, console: Console) -> Coordinator:
        """Make and lock the folder of a new or resumed run; write nothing yet.

        Raises `UserError` if the folder cannot be made or is in use.
        """
        opening = ExitStack()
        folder, lock = opening.enter_context(locked_run_folder(start))
        coordinator = cls(facts, folder, lock, logbook, console)
        coordinator._start, coordinator._opening = start, opening
        return coordinator

    @classmethod
    def take_over(cls, facts: RunFacts, folder: Path, logbook: Logbook, console: Console) -> Coordinator:
        """Open the folder of a lost coordinator, and continue as if this rank had been the coordinator from the start.

        Raises `UserError` if the folder cannot be used any longer.
        """
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)  # if this host does not share the folder
            lock = lock_folder(folder, facts.config.lock, owner_died=True)
            coordinator = cls(facts, folder, lock, logbook, console)
            remove_temporaries(folder, folder / "checkpoints")
            logbook.reopen(folder)
        except OSError as error:
            raise UserError(
                f"cannot continue in the run folder {folder}: {error.strerror or error}; its checkpoints are intact: "
                "use --resume"
            ) from None
        return coordinator

    def open_run(self) -> None:
        """Write the first files of a claimed folder; if that fails, remove all of them and raise `UserError`."""
        start = self._start
        assert start is not None
        with self._opening:
            remove_temporaries(self.folder, self.folder / "checkpoints")
            header = None if start.found is None else start.found.header()
            if start.found is not None and header is not None:
                copy_history(self.folder, start.found, header, start.origin, self.console.warning)
            write_durably(self.folder / "config.toml", self.config.to_toml().encode())
            write_durably(self.folder / "env.json", indented_json(self.facts.environment))
            if header is not None:
                # Before the logs are cut: no checkpoint may ever be later than they are.
                checkpoints.remove_later(self.folder / "checkpoints", header.step)
            lengths, hashes = ({}, {}) if header is None else (header.log_bytes, header.log_sha256 or {})
            self.logbook.open(self.folder, lengths, hashes)
            (self.folder / "summary.json").unlink(missing_ok=True)  # a summary means that the run has ended

    def close(self) -> None:
        """Wait for the pending checkpoint, close the logs and unlock the run folder."""
        if self._lock.closed:  # the folder could not be opened
            return
        with self._lock:
            self.keeper.close()
            self.logbook.close()

    # -- events

    def started(self, state: TrainingState) -> None:  # noqa: ARG002
        """Print the step that the run continues from, and warnings about it."""
        start = self._start
        assert start is not None
        for complaint in start.found.complaints if start.found is not None else ():
            self.console.warning(f"{complaint}; the one before it is used")
        if start.found is not None:
            self.console.line(f"resumed from {start.found.path} after step {start.found.header().step}")
        for warning in warnings_about_bits(start, self.config, self.facts.environment):
            self.console.warning(warning)

    def stepped(self, state: TrainingState, batch: Sums, learning_rate: float) -> None:  # noqa: ARG002
        """Print new shares, and the progress."""
        self.keeper.settle(wait=False)
        self.console.changed_shares(state.step)
        self.console.progress(self.config, state.step, self.logbook.steps_per_epoch, batch.loss)

    def skipped(self, state: TrainingState, fault: Fault) -> None:
        """Warn of the skipped update, at most once in some seconds."""
        self.console.skipped(f"{fault}: no update in this step ({state.progress.skipped_steps} skipped so far)")

    def shares_changed(self, state: TrainingState, shares: Sequence[int]) -> None:  # noqa: ARG002
        """Print the shares with the step, or some seconds later if they change often."""
        self.console.shares = shares

    def epoch_ended(self, state: TrainingState, validation: Sums, spent: Spent, counted: Mapping[str, Any]) -> None:
        """Record the times of the epoch, and print its line."""
        epoch, seconds = state.step // self.logbook.steps_per_epoch, spent.seconds
        record = {"step": state.step, "epoch": epoch, **spent.named(), **counted, "time": time.time()}
        self.logbook.timing(record)
        rate = counted["samples"] / seconds if seconds else 0.0
        self._spent = spent
        self.console.line(epoch_line(epoch, self.config.epoch_count, state.epoch_sums, validation, spent, rate))
        if cut := plateau_line(self.config, state, self.logbook.steps_per_epoch):
            self.console.line(cut)

    def recovered(self, what: str, record: Mapping[str, Any]) -> None:
        """Print the recovery."""
        self.console.line(what)
        self.logbook.calls.make("on_recovery", record)

    def finished(self, state: TrainingState, test: Sums | None, summary: Mapping[str, Any]) -> None:
        """Write the summary and print the receipt."""
        for line in result_lines(self.config, self.folder, test, summary, self._spent):
            self.console.line(line)
        if skipped := state.progress.skipped_steps:
            self.console.warning(f"steps skipped, of {state.step}: {skipped}; see metrics.jsonl")
        self._write(self.folder / "summary.json", indented_json(summary))
        for line in last_lines(self.config, self.folder, summary, is_complete=test is not None):
            self.console.line(line)
        self.logbook.calls.make("on_end", summary)

    # -- work for the trainer

    def save_micro_batch(self, fault: Fault, samples: Mapping[str, NDArray[Any]]) -> str | None:
        """Save the micro-batch of a fault, unless many are saved; return the file's name if it was saved."""
        file = file_of(fault, samples, self.folder)
        return str(file[0]) if file is not None and self._write(*file) else None

    def write_trace(self, content: Mapping[str, Any]) -> None:
        """Write the file of `--trace`."""
        path = self.config.trace
        assert path is not None
        with suppress(OSError):  # then the write fails too
            path.parent.mkdir(parents=True, exist_ok=True)
        if self._write(path, json.dumps(content).encode(), "the trace "):
            self.console.line(f"trace: {path} (for ui.perfetto.dev)")

    def _write(self, path: Path, content: bytes, what: str = "") -> bool:
        """Write a file that the training does not need; return False, after a warning, if the disk refuses."""
        try:
            write_durably(path, content)
        except OSError as error:
            self.console.warning(f"cannot write {what}{path}: {error.strerror or error}")
            return False
        return True
