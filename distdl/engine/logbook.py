"""The logbook: the records of a run, on every rank; the coordinator writes them to the run folder.

The records of ``metrics.jsonl`` and ``hashes.jsonl`` are a function of the state and of sums that all ranks have. So
the files are the same, byte for byte, for any number of ranks and interruptions. Timings go to ``timing.jsonl``, which
only the coordinator has.

If ranks may be lost, every rank keeps the records since the last checkpoint that is known to be saved, and the lengths
of the files at that time. A rank that takes over cuts the files to these lengths and appends the kept records.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distdl.arrays import sha256_of_arrays
from distdl.config import TrainConfig
from distdl.engine.callbacks import Calls
from distdl.engine.checks.nonfinite import Fault
from distdl.engine.console import Console
from distdl.engine.events import RunListener
from distdl.engine.fault_injection import fault_point
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.engine.storage.json_lines import JsonLines, line_of
from distdl.engine.timing.timeline import Spent
from distdl.regular_files import read_regular


class Logbook(RunListener):
    """Makes the records of a run; with `keeps` it remembers those that may not be on disk yet.

    `open` and `reopen` give it files, on the coordinator only. The calls of callbacks are a log; its file makes them.
    """

    def __init__(
        self, config: TrainConfig, steps_per_epoch: int, console: Console, calls: Calls | None = None, *, keeps: bool
    ) -> None:
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.calls = Calls() if calls is None else calls
        optional = {"hashes": config.record_hashes, "calls": self.calls.callbacks}
        self.names = ["metrics", *filter(optional.get, optional)]
        #: By log: its length at the last checkpoint that is known to be saved, the lines since then, and how many bytes
        #: of these lines precede the newest checkpoint.
        self.lengths = dict.fromkeys(self.names, 0)
        self.lines = dict.fromkeys(self.names, b"")
        self.marks = dict.fromkeys(self.names, 0)
        self._keeps = keeps
        self._console = console
        self._files: dict[str, JsonLines | Calls] = {}
        self._is_refused = False

    # -- events

    def started(self, state: TrainingState) -> None:
        """Call the callbacks."""
        self._call("on_start", {"step": state.step})

    def stepped(self, state: TrainingState, batch: Sums, learning_rate: float) -> None:
        """Record the step if it is due."""
        values = batch.named() | {"lr": learning_rate}
        if self.config.log_every and state.step % self.config.log_every == 0:
            self._metrics(state, values)
        self._call("on_step", self._numbered(state, values))
        self._hashes(state, batch.loss)

    def skipped(self, state: TrainingState, fault: Fault) -> None:
        """Record the step, without a loss."""
        values = {"micro_batch": fault.micro_batch, "skipped_steps": state.progress.skipped_steps}
        self._metrics(state, {"skipped": fault.what, **values})
        self._call("on_step", self._numbered(state, values))
        self._hashes(state, None)

    def epoch_ended(self, state: TrainingState, validation: Sums, spent: Spent, counted: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Record the epoch's training and validation metrics."""
        values = state.epoch_sums.named("train") | validation.named("validation")
        self._metrics(state, values)
        self._call("on_epoch", self._numbered(state, values))

    def tested(self, state: TrainingState, test: Sums) -> None:
        """Record the score of the test part, with the step of the scored weights."""
        self._record("metrics", {"step": state.progress.test_step, **test.named("test")})

    def checkpointed(self, state: TrainingState, *, previous_is_saved: bool) -> None:
        """Note that a checkpoint is being written; forget the lines that the previous one has brought to disk."""
        for name in self.names:
            if previous_is_saved:
                self.lengths[name] += self.marks[name]
                self.lines[name] = self.lines[name][self.marks[name] :]
            self.marks[name] = len(self.lines[name])
        self._call("on_checkpoint", {"step": state.step})  # after the mark: it is the first record that is kept

    # -- files, on the coordinator

    def open(self, folder: Path, lengths: Mapping[str, int], hashes: Mapping[str, str]) -> None:
        """Open the files of a run folder, cut to the given lengths (0 for those not given). May raise `OSError`.

        Warns of a file whose hash is given and differs.
        """
        for name in ("timing", *self.names):
            log = self._files[name] = self._opened(name, folder, lengths.get(name, 0))
            if log.length == lengths.get(name) and hashes.get(name, log.sha256) != log.sha256:
                self._console.warning(f"{log.path} was edited: its records are not those of the checkpoint; restore it")
        self.lengths = {name: self._files[name].length for name in self.names}

    def reopen(self, folder: Path) -> None:
        """Open the files of a lost coordinator, and bring them to the state of this logbook. May raise `OSError`."""
        fault_point("takeover")
        timing = folder / "timing.jsonl"
        whole_lines = read_regular(timing).rfind(b"\n") + 1 if timing.exists() else 0
        self._files["timing"] = JsonLines(timing, whole_lines)
        for name in self.names:
            fault_point("takeover")
            log = self._opened(name, folder, self.lengths[name])
            if log.length < self.lengths[name]:
                self._console.warning(f"{log.path} lacks records from before the failure: it was on another host")
            with suppress(OSError):  # lines that a full disk refuses wait in memory
                log.append(self.lines[name])
            self._files[name] = log

    def timing(self, record: Mapping[str, Any]) -> None:
        """Write a record to ``timing.jsonl``."""
        self._write("timing", line_of(record))

    def written(self) -> dict[str, Any]:
        """Return length and hash of each file, with all records written; raise `OSError` if the disk refuses them."""
        logs = {name: log for name, log in self._files.items() if isinstance(log, JsonLines)}
        for log in logs.values():
            log.write_waiting()
        lengths = {name: log.length for name, log in logs.items()}
        return {"log_bytes": lengths, "log_sha256": {name: log.sha256 for name, log in logs.items()}}

    def flush_to_disk(self) -> None:
        """Return when all files are on the disk; raise `OSError` if it refuses."""
        for log in self._files.values():
            log.flush_to_disk()

    def close(self) -> None:
        """Close the files; warn of records that a full disk still refuses."""
        for log in self._files.values():
            try:
                log.close()
            except OSError as error:
                self._console.warning(f"the last records of {log.path} are not written: {error.strerror}")

    # -- between ranks

    def to_json(self) -> dict[str, Any]:
        """Return the kept content, for another rank."""
        lines = {name: lines.decode() for name, lines in self.lines.items()}
        return {"lengths": self.lengths, "lines": lines, "marks": self.marks}

    def take(self, content: Mapping[str, Any]) -> None:
        """Replace the kept content by that of another rank; write to open files the records that this rank lacks."""
        known = {name: self.lengths[name] + len(self.lines[name]) for name in self.names}
        self.lengths, self.marks = dict(content["lengths"]), dict(content["marks"])
        self.lines = {name: lines.encode() for name, lines in content["lines"].items()}
        for name in self._files.keys() & known.keys():
            missing = self.lengths[name] + len(self.lines[name]) - known[name]
            self._write(name, self.lines[name][len(self.lines[name]) - missing :])

    # -- details

    def _metrics(self, state: TrainingState, values: Mapping[str, Any]) -> None:
        self._record("metrics", self._numbered(state, values))

    def _numbered(self, state: TrainingState, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of values of the latest step, with its number and epoch, both from 1."""
        return {"step": state.step, "epoch": (state.step - 1) // self.steps_per_epoch + 1, **values}

    def _call(self, event: str, record: Mapping[str, Any]) -> None:
        if self.calls.callbacks:
            self._record("calls", {"call": event, "record": record})

    def _opened(self, name: str, folder: Path, length: int) -> JsonLines | Calls:
        return self.calls.opened(folder, length) if name == "calls" else JsonLines(folder / f"{name}.jsonl", length)

    def _hashes(self, state: TrainingState, loss: float | None) -> None:
        if self.config.record_hashes and (self._keeps or self._files):
            hashes = {name: sha256_of_arrays([(name, array)])[:16] for name, array in state.named_arrays()}
            self._record("hashes", {"step": state.step, "loss": loss, "hashes": hashes})

    def _record(self, name: str, record: Mapping[str, Any]) -> None:
        line = line_of(record)
        if self._keeps:
            self.lines[name] += line
        if self._files:
            self._write(name, line)

    def _write(self, name: str, line: bytes) -> None:
        """Append a record to a file. If the disk refuses, warn once; the record waits in memory."""
        try:
            self._files[name].append(line)
            self._is_refused = False
        except OSError as error:
            if not self._is_refused:
                path = self._files[name].path
                self._console.warning(f"cannot write to {path}: {error.strerror}; its records wait until there is room")
            self._is_refused = True
