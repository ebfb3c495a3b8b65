"""Fault injection for tests: kill a rank, raise an error or spoil numbers at a chosen point of a run.

Tests call `fail_at`, the engine calls `fault_point` at each point (the idea is `EventInjector.fail_at` of torchft). So
tests need no names from inside the engine. Without a fault a call costs some 0.1 microseconds.

An action gets the `owner` of its point, so it can change the run's numbers. Each rank reaches the `POINTS` in their
order, unless their text says otherwise. "Committed" means: all ranks agreed that the phase succeeded. The owners are:

- *state*: the `TrainingState`;
- *record*: the arrays that are reduced, by name, after the *index* of the micro-batch;
- *sums*: the `Sums` of the phase.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distdl.engine.state import TrainingState
from distdl.engine.step import OptimizerStep, StepObserver
from distdl.job.launched_by import read_launch
from distdl.parallel import Record

#: The points, (phase, when): the situation | the owner. Actions of a recovery are those of `parallel/recovery.py`.
POINTS = {
    ("data", "before"): "rank 0 has read the dataset; no rank has shared it | None",
    ("data", "after"): "each host has its copy of the dataset | None",
    ("run-folder", "before"): "rank 0 only: it has locked the run folder; no other rank knows the folder | None",
    ("run-folder", "after"): "rank 0 only: it has written the first files of the run folder | None",
    ("training", "before"): "the banner is printed; no step has begun | state",
    ("step", "before"): "an optimizer step begins | state",
    ("forward", "before"): "a micro-batch of a step has been prepared; its forward pass has not begun | state",
    ("backward", "after"): "a micro-batch of a step has been computed; its record is not in the sum | index, record",
    ("reduction", "before"): "this rank has computed its shard; no gradient has been sent | state",
    ("reduction", "after"): "this rank has the sum of all records; the step is not committed | record",
    ("update", "before"): "the step is committed; parameters and optimizer state are unchanged | state",
    ("update", "after"): "parameters, optimizer state and buffers are updated; the step is not yet counted | state",
    ("validation", "before"): "the phase begins | state",
    ("validation", "after"): "this rank has the metric sums of all ranks; the phase is not committed | sums",
    ("validation", "committed"): "the phase is committed; the state is unchanged | sums",
    ("test", "before"): "the phase begins | state",
    ("test", "after"): "this rank has the metric sums of all ranks; the phase is not committed | sums",
    ("test", "committed"): "the phase is committed; the state is unchanged | sums",
    ("checkpoint", "before"): "the phase begins | state",
    ("checkpoint", "after"): "rank 0 has copied the state for its writer thread; the phase is not committed | state",
    ("checkpoint", "committed"): "the phase is committed; the logbook has not noted the checkpoint | state",
    ("checkpoint-write", "before"): "rank 0 only, in its writer thread: nothing of the checkpoint is on disk | None",
    ("checkpoint-write", "after"): "rank 0 only, in its writer thread: the checkpoint is complete | None",
    ("finish", "before"): "rank 0 has not written the summary | state",
    ("finish", "after"): "rank 0 has written the summary and printed the receipt; the phase is not committed | state",
    **{
        (action, "before"): "this action of a recovery begins | state"
        for action in ("vote no", "shrink", "compare", "take", "rebuild", "agree")
    },
    ("takeover", "before"): "new rank 0 only, once per log file: it has locked the run folder | None",
}
PHASES = tuple(dict.fromkeys(phase for phase, _ in POINTS))

#: Called with the owner of the point. It may kill the process, raise an error, or change arrays of the owner.
Action = Callable[[Any], object]


@dataclass
class _Fault:
    action: Action
    step: int | None
    #: Remaining visits of the point up to the fault; None: each visit.
    remaining: int | None

    def is_due(self, step: int | None) -> bool:
        """Count a visit in a step; return whether the fault strikes now."""
        if self.step not in {None, step} or self.remaining == 0:
            return False
        if self.remaining is not None:
            self.remaining -= 1
        return not self.remaining


_faults: dict[tuple[str, str], list[_Fault]] = {}
#: The last step that began, counted from 1.
_step: int | None = None


def fail_at(
    phase: str, *, rank: int | None, action: Action, step: int | None = None, nth: int | None = 1, when: str = "before"
) -> None:
    """Call `action` when `rank` reaches the point for the `nth` time, or each time if `nth` is None.

    `rank` is the number that the launcher gave; None means each rank. With `step`, counted from 1, only visits during
    and after that step, before the next one, count. Raises `ValueError` for a point that does not exist.

    >>> seen = []
    >>> fail_at("update", rank=0, step=2, action=seen.append)
    >>> for step in (1, 2, 3):
    ...     fault_point("step", step=step)
    ...     fault_point("update", owner=f"the state in step {step}")
    >>> seen
    ['the state in step 2']
    >>> forget()
    """
    if phase not in PHASES:
        raise ValueError(f"no phase is called {phase!r}: expected one of {', '.join(PHASES)}")
    if (phase, when) not in POINTS:
        known = ", ".join(moment for known, moment in POINTS if known == phase)
        raise ValueError(f"{phase!r} has no point {when!r}: expected one of {known}")
    if rank in {None, read_launch().rank}:
        _faults.setdefault((phase, when), []).append(_Fault(action, step, nth))


def forget() -> None:
    """Forget all registered faults."""
    global _step  # noqa: PLW0603  the faults of a process
    _faults.clear()
    _step = None


def fault_point(phase: str, *, when: str = "before", step: int | None = None, owner: Any = None) -> None:
    """Call the actions that are due at this point. The start of a step gives its number as `step`."""
    if _faults:
        _visit(phase, when, step, owner)


def _visit(phase: str, when: str, step: int | None, owner: Any) -> None:
    global _step  # noqa: PLW0603  the faults of a process
    assert (phase, when) in POINTS
    _step = _step if step is None else step
    for fault in [one for one in _faults.get((phase, when), ()) if one.is_due(_step)]:  # count for all: one may raise
        fault.action(owner)


class FaultPoints(StepObserver):
    """Reaches the points inside a step; the first observer of the trainer's steps."""

    def __init__(self, state: TrainingState) -> None:
        self._state = state

    def begin(self, step: OptimizerStep) -> None:
        fault_point("step", step=self._state.step + 1, owner=self._state)

    def micro_batch_done(self, step: OptimizerStep, index: int, record: Record) -> None:
        fault_point("backward", when="after", owner=(index, record))

    def shard_done(self, step: OptimizerStep) -> None:
        fault_point("reduction", owner=self._state)

    def allows_update(self, step: OptimizerStep) -> bool:
        fault_point("reduction", when="after", owner=step.total)
        return True

    def before_update(self, step: OptimizerStep) -> None:
        fault_point("update", owner=self._state)

    def end(self, step: OptimizerStep) -> None:
        fault_point("update", when="after", owner=self._state)
