"""The events of a run, and the base class of everything that listens to them.

The trainer tells every listener on its rank, after all ranks have committed the event. The logbook listens on every
rank, the coordinator on rank 0 only. A listener that needs one event overrides one method.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distdl.engine.checks.nonfinite import Fault
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.engine.timing.timeline import Spent


class RunListener:
    """Listens to the events of a run. The methods are called in the order of the events."""

    def started(self, state: TrainingState) -> None:
        """React to the start, before the first step; also to a resume."""

    def stepped(self, state: TrainingState, batch: Sums, learning_rate: float) -> None:
        """React to a step; `batch` holds the sums over its samples."""

    def skipped(self, state: TrainingState, fault: Fault) -> None:
        """React to a step without an update of the weights."""

    def shares_changed(self, state: TrainingState, shares: Sequence[int]) -> None:
        """React to new numbers of micro-batches per rank, from the next step on."""

    def epoch_ended(self, state: TrainingState, validation: Sums, spent: Spent, counted: Mapping[str, Any]) -> None:
        """React to the end of an epoch, after validation and before the sums of the epoch are cleared.

        `spent` and `counted` (samples, shares) describe the steps since the previous epoch, or since the start.
        """

    def checkpointed(self, state: TrainingState, *, previous_is_saved: bool) -> None:
        """React to a checkpoint that the coordinator has begun to write."""

    def tested(self, state: TrainingState, test: Sums) -> None:
        """React to the score of the test part."""

    def recovered(self, what: str, record: Mapping[str, Any]) -> None:
        """React to a completed recovery; `what` describes it, and `record` is its entry in the summary."""

    def finished(self, state: TrainingState, test: Sums | None, summary: Mapping[str, Any]) -> None:
        """React to the end of the training. Called again if ranks are lost meanwhile."""
