"""The timeline: the time of each step on each rank, as compute, reduction, and waiting for slower ranks.

    compute | waiting | reduction | compute
    begin   enter               leave     end

A step has these four marks on a rank's own clock. Of the ranks in a reduction, the last to enter waits for nobody. So
the shortest time inside is the reduction itself, and any longer time was waiting (the "wait at N x N" of F. Wolf and
B. Mohr, *Automatic performance analysis of hybrid MPI/OpenMP applications*, 2003). This needs durations only, so clocks
need not agree. Ranks compare their marks at the end of an epoch and when the array is full, never within a step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.engine.step import OptimizerStep, StepObserver
from distdl.parallel import Communicator

#: Steps between two comparisons. Each rank sends 8 KiB; with 1,024 ranks each receives 8 MiB.
STEPS_COMPARED = 1024

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spent:
    """The seconds that each rank spent in some steps: one number per rank, in rank order."""

    compute: tuple[float, ...]
    reduction: tuple[float, ...]
    waiting: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The total seconds of rank 0. All ranks take their steps together, so the others spent the same."""
        return self.compute[0] + self.reduction[0] + self.waiting[0]

    @property
    def slowest(self) -> int:
        """The rank that computed longest; the first one in a tie."""
        return self.compute.index(max(self.compute))

    def shares(self) -> tuple[float, float, float]:
        """Return the shares of compute, reduction and waiting in the time of all ranks; their sum is 1.

        >>> Spent(compute=(3.0, 2.0), reduction=(1.0, 1.0), waiting=(0.0, 1.0)).shares()
        (0.625, 0.25, 0.125)
        """
        parts = sum(self.compute), sum(self.reduction), sum(self.waiting)
        whole = sum(parts) or 1.0
        return parts[0] / whole, parts[1] / whole, parts[2] / whole

    def named(self) -> dict[str, Any]:
        """Return all times by their names in ``timing.jsonl``."""
        compute, reduction, waiting = self.shares()
        of_all = {"compute_share": compute, "reduction_share": reduction, "wait_share": waiting}
        of_ranks = {"compute_seconds": self.compute, "reduction_seconds": self.reduction, "wait_seconds": self.waiting}
        return {"train_seconds": self.seconds, **of_all, "slowest_rank": self.slowest, **of_ranks}

    def __str__(self) -> str:
        compute, reduction, waiting = self.shares()
        return f"compute {compute:.1%} · reduction {reduction:.1%} · wait {waiting:.1%} (slowest: rank {self.slowest})"


class Timeline(StepObserver):
    """Takes the marks of one rank's steps. `on_steps`, if set, receives them once the waiting is known.

    A step that begins again overwrites the one that did not end. `begin` and `spent` are collective.
    """

    #: The seconds of the latest step.
    step_seconds = 0.0

    def __init__(self, communicator: Communicator, clock: Clock = time.perf_counter) -> None:
        self.communicator = communicator
        self.clock = clock
        self.on_steps: Callable[[NDArray[np.float64]], None] | None = None
        self._marks = np.zeros((STEPS_COMPARED, 4))
        self._ended = 0
        self._sums = np.zeros(3)

    def begin(self, step: OptimizerStep | None = None) -> None:  # noqa: ARG002
        """Mark that the step begins. Collective once every `STEPS_COMPARED` steps."""
        if self._ended == STEPS_COMPARED:
            self._compare()
        self._marks[self._ended, 0] = self.clock()

    def shard_done(self, step: OptimizerStep | None = None) -> None:  # noqa: ARG002
        """Mark that this rank has computed its shard."""
        self._marks[self._ended, 1] = self.clock()

    def allows_update(self, step: OptimizerStep | None = None) -> bool:  # noqa: ARG002
        """Mark that this rank has the sum over all ranks."""
        self._marks[self._ended, 2] = self.clock()
        return True

    def end(self, step: OptimizerStep | None = None) -> None:  # noqa: ARG002
        """Mark that the step is done."""
        marks = self._marks[self._ended]
        marks[3] = self.clock()
        self._ended += 1
        self.step_seconds = float(marks[3] - marks[0])

    def spent(self) -> Spent:
        """Return the seconds of all ranks since the previous call. Collective."""
        self._compare()
        everyone = self.communicator.allgather_json(self._sums.tolist())
        self._sums[:] = 0
        compute, reduction, waiting = zip(*everyone, strict=True)
        return Spent(compute, reduction, waiting)

    def _compare(self) -> None:
        """Find how long this rank waited in each step, and make room for more marks."""
        marks, self._ended = self._marks[: self._ended], 0
        inside = marks[:, 2] - marks[:, 1]
        everyone = np.empty((self.communicator.size, len(marks)))
        counts = [inside.nbytes] * self.communicator.size
        everyone[self.communicator.rank] = inside
        self.communicator.allgatherv(everyone.reshape(-1).view(np.uint8), counts)
        shortest = everyone.min(axis=0)
        waiting = inside - shortest
        self._sums += (marks[:, 3] - marks[:, 0] - inside).sum(), shortest.sum(), waiting.sum()
        if self.on_steps is not None:
            begin, enter, leave, end = marks.T
            self.on_steps(np.stack([begin, enter, enter + waiting, leave, end], axis=1))
