"""The keeper: saves checkpoints while the training continues, and judges failed writes.

A thread writes each checkpoint (`storage/background_writer.py`). The keeper learns of the outcome later, at the next
step or checkpoint. If a disk refuses, it warns, and the last good checkpoint stays. After `MISSES_ALLOWED` failed
checkpoints in a row, or at the last one, it raises `UserError`.
"""

from pathlib import Path
from typing import Any

from distdl.engine.console import Console
from distdl.engine.logbook import Logbook
from distdl.engine.state import TrainingState
from distdl.engine.storage.background_writer import CheckpointWriter, Outcome
from distdl.engine.storage.header import CheckpointHeader
from distdl.errors import UserError

#: Checkpoints in a row that may fail before the run ends.
MISSES_ALLOWED = 3


class CheckpointKeeper:
    """Saves the checkpoints of a run into `folder`: the newest `keep` and the best.

    `facts` are the fields of a header that stay the same: config, data_sha256, versions, kernel_family.
    """

    def __init__(self, folder: Path, keep: int, facts: dict[str, Any], logbook: Logbook, console: Console) -> None:
        self._folder = folder
        self._facts = facts
        self._logbook = logbook
        self._console = console
        self._writer = CheckpointWriter(keep)
        self._misses, self._latest_miss = 0, ""
        self._newest_is_saved = False

    def save(self, state: TrainingState, *, last: bool) -> bool:
        """Begin to save a copy of the state; wait for it only if it is the last.

        Return whether the previous checkpoint was saved, together with the logs up to it.
        """
        self.settle(wait=True)
        previous_is_saved, self._newest_is_saved = self._newest_is_saved, False
        try:
            logs = self._logbook.written()
        except OSError as error:
            self._missed(Outcome(state.step, error), may_raise=True, last=last)
            return previous_is_saved
        header = CheckpointHeader(step=state.step, progress=state.progress, **logs, **self._facts)
        self._writer.start(self._folder, state.named_arrays(), header, self._logbook.flush_to_disk)
        if last:
            self.settle(wait=True, last=True)
        return previous_is_saved

    def settle(self, *, wait: bool, last: bool = False) -> None:
        """React to the outcome of the pending write, if it is known; raise `UserError` only if `wait` is set."""
        if wait and self._misses >= MISSES_ALLOWED:
            raise UserError(self._latest_miss)
        outcome = self._writer.outcome(wait=wait)
        if outcome is None:
            return
        if outcome.refused is not None:
            self._missed(outcome, may_raise=wait, last=last)
            return
        self._misses, self._newest_is_saved = 0, True
        if outcome.removal_refused is not None:
            self._console.warning(self._what_failed(outcome))

    def close(self) -> None:
        """Wait for the pending write, and warn if it failed."""
        self._writer.close()
        unknown = self._writer.outcome(wait=False)  # known already, unless an error or Ctrl-C ended the run
        if unknown is not None and unknown.refused is not None:
            self._console.warning(self._what_failed(unknown))

    def _missed(self, outcome: Outcome, *, may_raise: bool, last: bool) -> None:
        self._misses += 1
        reason = f"{self._what_failed(outcome)}; the checkpoints before it are intact"
        self._latest_miss = f"{reason}: make room and use --resume"
        if may_raise and (last or self._misses >= MISSES_ALLOWED):
            raise UserError(self._latest_miss)
        what_follows = "continues" if self._misses < MISSES_ALLOWED else "ends at the next one"
        self._console.warning(f"{reason}, training {what_follows}")

    def _what_failed(self, outcome: Outcome) -> str:
        if outcome.refused is None:
            what, error = f"cannot remove old checkpoints after step {outcome.step} from", outcome.removal_refused
        else:
            what, error = f"cannot write the checkpoint after step {outcome.step} to", outcome.refused
        return f"{what} {self._folder}: {getattr(error, 'strerror', None) or error}"
