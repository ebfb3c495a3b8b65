"""What the ranks that are left do when one is lost, so that all of them go on from the same place.

Work that must be all or nothing is done in this order: collective calls into buffers; `commit`, on which all that are
left agree; then changes of what lives on, which are local. So a loss before the commit leaves everything as it was,
and after it no rank can learn of a loss before it has made its changes. Whoever meets `PeerLost` goes through

    refuse -> shrink -> compare -> (take) -> rebuild -> agree -> go on

- *refuse*: give False to the next agreement on the old group, for others may be waiting in it for our verdict;
- *shrink*: to the group of those that are left;
- *compare* the positions of all; should one be behind, all *take* the state of the lowest rank that is most ahead;
- *rebuild* what depends on the group; the lowest rank is the coordinator from now on;
- *agree* that all have come so far, and so go on alike.

A further loss anywhere on this way starts it again from the top with the newest group. On every group all ranks
thus call `agree` equally often, all but the last time with the outcome True, and then `shrink` it once: MPI matches
these calls by their order alone.

`Recovery` is that way as a state machine without any input or output, for the tests; `recover` walks it.
(The idea: W. Bland et al., *Post-failure recovery of MPI communication capability*, 2013.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Generic, Protocol, TypeVar

from distdl.errors import DistdlError, PeerLost
from distdl.parallel.communicator import Communicator, CompletedRecovery

T = TypeVar("T")
#: Where a rank stands; the one that is most ahead has the largest.
Position = list[int]


class Do(Enum):
    """What a rank has to do next."""

    REFUSE = "refuse"
    SHRINK = "shrink"
    COMPARE = "compare"
    TAKE = "take"
    REBUILD = "rebuild"
    AGREE = "agree"
    GO_ON = "go on"


class Recovery:
    """One rank's way from a loss to going on: it is told how each action ended, and says what the next one is."""

    def __init__(self, *, agreed: bool) -> None:
        """Begin with a loss; `agreed` if it was the outcome of an agreement, which is then not to be refused."""
        self.action = Do.GO_ON
        self.source = 0
        self.lost(agreed=agreed)

    def lost(self, *, agreed: bool) -> None:
        """Take in that the action ended with a loss."""
        self.action = Do.SHRINK if agreed or self.action in {Do.REFUSE, Do.SHRINK} else Do.REFUSE

    def done(self) -> None:
        """Take in that the action was completed."""
        self.action = {
            Do.REFUSE: Do.SHRINK,
            Do.SHRINK: Do.COMPARE,
            Do.TAKE: Do.REBUILD,
            Do.REBUILD: Do.AGREE,
            Do.AGREE: Do.GO_ON,
        }[self.action]

    def compared(self, positions: Sequence[Position]) -> None:
        """Take in where all ranks stand, in rank order."""
        self.source = positions.index(max(positions))
        self.action = Do.REBUILD if all(position == positions[0] for position in positions) else Do.TAKE


class Survivor(Protocol):
    """What a rank brings along on the way."""

    communicator: Communicator

    @property
    def position(self) -> Position:
        """Where it stands."""

    def take(self, source: int) -> None:
        """Go to the position of rank `source`, with its state: all or nothing. Collective."""

    def rebuild(self) -> None:
        """Make anew what depends on the group; must leave alone what a later loss must find. Collective."""


def commit(communicator: Communicator) -> None:
    """Return on all ranks that are left, or raise `PeerLost` on all. Collective."""
    if not communicator.agree(True):
        lost = PeerLost("a rank was lost: another one has seen it")
        lost.agreed = True
        raise lost


@contextmanager
def committed(communicator: Communicator) -> Iterator[None]:
    """Commit when the collective work inside is done, also where it ends with an error that all ranks raise.

    Such an error is raised after the commit: a rank that left with it alone would keep the others waiting. Where a rank
    was lost meanwhile, `PeerLost` is raised instead on all.
    """
    try:
        yield
    except DistdlError as error:
        if error.agreed and not isinstance(error, PeerLost):
            commit(communicator)
        raise
    commit(communicator)


def recover(survivor: Survivor, lost: PeerLost) -> CompletedRecovery:
    """Go on after a loss: `survivor` then has the communicator of those that are left. Collective."""
    started, before = time.perf_counter(), survivor.communicator.world_ranks
    recovery = Recovery(agreed=lost.agreed)
    while recovery.action is not Do.GO_ON:
        try:
            _act(recovery, survivor)
        except PeerLost as another:
            recovery.lost(agreed=another.agreed)
    left = set(survivor.communicator.world_ranks)
    return CompletedRecovery([rank for rank in before if rank not in left], time.perf_counter() - started)


def _act(recovery: Recovery, survivor: Survivor) -> None:
    communicator = survivor.communicator
    if recovery.action is Do.COMPARE:
        recovery.compared(communicator.allgather_json(survivor.position))
        return
    if recovery.action is Do.REFUSE:
        communicator.agree(False)
    elif recovery.action is Do.SHRINK:
        survivor.communicator = communicator.shrink()
    elif recovery.action is Do.TAKE:
        survivor.take(recovery.source)
    elif recovery.action is Do.REBUILD:
        survivor.rebuild()
    else:
        commit(communicator)
    recovery.done()


class _Attempt(Generic[T]):
    """Work that a lost rank interrupts and that the survivors start again from nothing."""

    position: Position = []  # noqa: RUF012  equal on all ranks and never changed

    def __init__(self, communicator: Communicator, work: Callable[[Communicator], T]) -> None:
        self.communicator = communicator
        self._work = work

    def take(self, source: int) -> None:
        raise AssertionError(f"rank {source} cannot be ahead")

    def rebuild(self) -> None:
        self.result = self._work(self.communicator)


class Survivors:
    """The surviving ranks, for work before the first step: a failure starts the work again on fewer ranks.

    `communicator` is the group of the survivors. `recoveries` lists the completed recoveries. The first one may have
    happened while MPI started; only the first `Survivors` object of a communicator reports that one.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.recoveries: list[CompletedRecovery] = []
        if communicator.recovery_at_start is not None:
            self.recoveries.append(communicator.recovery_at_start)
            communicator.recovery_at_start = None

    def run(self, work: Callable[[Communicator], T]) -> T:
        """Call ``work(communicator)`` until it completes without a failure, and return its result. Collective."""
        attempt = _Attempt(self.communicator, work)
        try:
            attempt.rebuild()
            commit(self.communicator)
        except PeerLost as lost:
            self.recoveries.append(recover(attempt, lost))
        self.communicator = attempt.communicator
        return attempt.result


def survive(
    communicator: Communicator, work: Callable[[Communicator], T]
) -> tuple[Communicator, T, CompletedRecovery | None]:
    """Run `work` with `Survivors`; return the communicator, the result and the recovery."""
    survivors = Survivors(communicator)
    known = len(survivors.recoveries)
    result = survivors.run(work)
    return survivors.communicator, result, survivors.recoveries[known] if survivors.recoveries[known:] else None
