"""What is logged of a run, as every rank knows it, so that another rank can go on logging in the same files.

The records of ``metrics.jsonl`` and ``hashes.jsonl`` are a function of the state and of sums that all ranks have.
Where ranks may be lost, each keeps those since the last checkpoint that is known to be saved, and how long the files
were then. A rank that takes over cuts the files to that length and appends what belongs there: whatever the
coordinator had written when it died, the files become the same, byte for byte. ``timing.jsonl`` is the coordinator's
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distdl.arrays import sha256_of_arrays
from distdl.config import TrainConfig
from distdl.engine.checks.nonfinite import Fault
from distdl.engine.metrics import Sums, line_of
from distdl.engine.state import TrainingState

#: The records of one event, each with the name of its log.
Records = list[tuple[str, dict[str, Any]]]


class Journal:
    """Makes the records of a run; with `keeps`, remembers those that may not be on disk yet."""

    def __init__(self, config: TrainConfig, steps_per_epoch: int, *, keeps: bool) -> None:
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.keeps = keeps
        self.names = ["metrics", *(["hashes"] if config.record_hashes else [])]
        #: By log: its length at the last checkpoint that is known to be saved, what came after, and how many bytes of
        #: that came before the newest checkpoint.
        self.lengths = dict.fromkeys(self.names, 0)
        self.lines = dict.fromkeys(self.names, b"")
        self.marks = dict.fromkeys(self.names, 0)

    def stepped(self, state: TrainingState, batch: Sums, learning_rate: float) -> Records:
        """Return the records of a step that has just been taken."""
        records: Records = []
        if self.config.log_every and state.step % self.config.log_every == 0:
            record = {
                "step": state.step,
                "epoch": (state.step - 1) // self.steps_per_epoch + 1,
                **batch.named(),
                "lr": learning_rate,
            }
            records.append(("metrics", record))
        return self._kept(records + self._hashes(state, batch.loss))

    def skipped(self, state: TrainingState, fault: Fault) -> Records:
        """Return the records of a step that has just been taken without an update."""
        record = {
            "step": state.step,
            "epoch": (state.step - 1) // self.steps_per_epoch + 1,
            "skipped": fault.what,
            "micro_batch": fault.micro_batch,
            "skipped_steps": state.progress["skipped_steps"],
        }
        return self._kept([("metrics", record), *self._hashes(state, None)])

    def _hashes(self, state: TrainingState, loss: float | None) -> Records:
        if not self.config.record_hashes:
            return []
        hashes = {name: sha256_of_arrays([(name, array)])[:16] for name, array in state.named_arrays()}
        return [("hashes", {"step": state.step, "loss": loss, "hashes": hashes})]

    def epoch_ended(self, state: TrainingState, validation: Sums) -> Records:
        """Return the record of an epoch, before its sums are cleared."""
        training = state.epoch_sums
        record = {
            "step": state.step,
            "epoch": state.step // self.steps_per_epoch,
            **training.named("train"),
            **validation.named("validation"),
        }
        return self._kept([("metrics", record)])

    def tested(self, state: TrainingState, test: Sums) -> Records:
        """Return the record of the test part."""
        record = {"step": state.step, **test.named("test")}
        return self._kept([("metrics", record)])

    def checkpointed(self, *, before_is_saved: bool) -> None:
        """Note that a checkpoint is being written; forget what the one before has brought to disk, if it has."""
        for name in self.names:
            if before_is_saved:
                self.lengths[name] += self.marks[name]
                self.lines[name] = self.lines[name][self.marks[name] :]
            self.marks[name] = len(self.lines[name])

    def to_json(self) -> dict[str, Any]:
        """Return the content, for another rank."""
        lines = {name: lines.decode() for name, lines in self.lines.items()}
        return {"lengths": self.lengths, "lines": lines, "marks": self.marks}

    def take(self, content: Mapping[str, Any]) -> None:
        """Replace the content by that of another rank."""
        self.lengths, self.marks = dict(content["lengths"]), dict(content["marks"])
        self.lines = {name: lines.encode() for name, lines in content["lines"].items()}

    def _kept(self, records: Records) -> Records:
        if self.keeps:
            for name, record in records:
                self.lines[name] += line_of(record)
        return records
