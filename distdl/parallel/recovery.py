"""Recovery: the actions by which all surviving ranks continue from the same position after a failure.

Work that must be all or nothing ends with `commit`, before any change of the lasting state (docs/recovery.md).
A rank that gets `PeerLost` goes through these actions:

| action   | meaning                                                                      | next action              |
|----------|------------------------------------------------------------------------------|--------------------------|
| VOTE_NO  | votes no in the next agreement of the old group: others may wait for it      | SHRINK                   |
| SHRINK   | joins the group of the survivors                                             | COMPARE                  |
| COMPARE  | compares its position with those of all survivors                            | all equal: REBUILD       |
|          |                                                                              | otherwise: TAKE          |
| TAKE     | takes the state of the lowest rank among those with the latest position      | REBUILD                  |
| REBUILD  | rebuilds the group-dependent parts; the lowest rank is now the coordinator   | AGREE                    |
| AGREE    | agrees with all survivors that everyone has come this far                    | CONTINUE                 |
| CONTINUE | leaves the recovery and repeats the uncommitted work                         |                          |

Events report that an action was `completed`, `compared` or `failed` (another rank was lost). After `failed` the rank
starts again at VOTE_NO, with the newest group. It starts at SHRINK if its vote is no longer needed: the failure was the
result of an agreement, or the failed action was VOTE_NO or SHRINK itself.

So on every group, all ranks call `agree` equally often, with the result True in all calls but the last, and then call
`shrink` once. MPI matches these calls by their order alone.

`Recovery` is this table as a state machine without input or output. Tests explore every order of its events.
`recover` performs the actions. (The idea: W. Bland et al., *Post-failure recovery of MPI communication capability*,
2013.)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Generic, Protocol, TypeVar

from distdl.errors import DistdlError, PeerLost
from distdl.parallel.communicator import Communicator, CompletedRecovery

T = TypeVar("T")
#: How far a rank has come; a later position compares as larger.
Position = list[int]


class Action(Enum):
    """The next action of a rank."""

    VOTE_NO = "vote no"
    SHRINK = "shrink"
    COMPARE = "compare"
    TAKE = "take"
    REBUILD = "rebuild"
    AGREE = "agree"
    CONTINUE = "continue"


class Recovery:
    """The recovery of one rank: its methods take the events, `action` is the next action."""

    def __init__(self, *, agreed: bool) -> None:
        """Start with a failure; `agreed`: it was the result of an agreement."""
        self.action = Action.CONTINUE
        self.source = 0
        self.failed(agreed=agreed)

    def failed(self, *, agreed: bool) -> None:
        """Event: the action ended with a failure."""
        voted = agreed or self.action in {Action.VOTE_NO, Action.SHRINK}
        self.action = Action.SHRINK if voted else Action.VOTE_NO

    def completed(self) -> None:
        """Event: the action was completed."""
        self.action = {
            Action.VOTE_NO: Action.SHRINK,
            Action.SHRINK: Action.COMPARE,
            Action.TAKE: Action.REBUILD,
            Action.REBUILD: Action.AGREE,
            Action.AGREE: Action.CONTINUE,
        }[self.action]

    def compared(self, positions: Sequence[Position]) -> None:
        """Event: COMPARE was completed, with the positions of all ranks, in rank order."""
        self.source = positions.index(max(positions))
        self.action = Action.REBUILD if all(position == positions[0] for position in positions) else Action.TAKE


class Recoverable(Protocol):
    """A rank's group and its state, as `recover` needs them."""

    communicator: Communicator

    @property
    def position(self) -> Position:
        """How far this rank has come."""

    def catch_up(self, source: int) -> None:
        """Take the position and the state of rank `source`: all or nothing. Collective."""

    def rebuild(self) -> None:
        """Rebuild the group-dependent parts; keep the state that a later recovery needs. Collective."""


def commit(communicator: Communicator) -> None:
    """Return on all surviving ranks, or raise `PeerLost` on all. Collective."""
    if not communicator.agree(True):
        lost = PeerLost("a rank was lost: another one has seen it")
        lost.agreed = True
        raise lost


@contextmanager
def committed(communicator: Communicator) -> Iterator[None]:
    """Commit after the collective work of the body, even if all ranks raise an error in it.

    Such an error is raised after the commit: a rank that left before it would keep the others waiting. If a rank was
    lost meanwhile, all ranks raise `PeerLost` instead.
    """
    try:
        yield
    except DistdlError as error:
        if error.agreed and not isinstance(error, PeerLost):
            commit(communicator)
        raise
    commit(communicator)


def recover(
    rank: Recoverable, lost: PeerLost, watch: Callable[[Action], object] = lambda _action: None
) -> CompletedRecovery:
    """Recover from a failure; afterwards ``rank.communicator`` is the group of the survivors. Collective.

    `watch` is called before each action.
    """
    started, before = time.perf_counter(), rank.communicator.world_ranks
    recovery = Recovery(agreed=lost.agreed)
    while recovery.action is not Action.CONTINUE:
        try:
            watch(recovery.action)
            _act(recovery, rank)
        except PeerLost as another:
            recovery.failed(agreed=another.agreed)
    survivors = set(rank.communicator.world_ranks)
    return CompletedRecovery([number for number in before if number not in survivors], time.perf_counter() - started)


def _act(recovery: Recovery, rank: Recoverable) -> None:
    match recovery.action:
        case Action.VOTE_NO:
            rank.communicator.agree(False)
        case Action.SHRINK:
            rank.communicator = rank.communicator.shrink()
        case Action.COMPARE:
            recovery.compared(rank.communicator.allgather_json(rank.position))
            return
        case Action.TAKE:
            rank.catch_up(recovery.source)
        case Action.REBUILD:
            rank.rebuild()
        case Action.AGREE:
            commit(rank.communicator)
    recovery.completed()


class _Attempt(Generic[T]):
    """Work that starts again from nothing after a failure."""

    position: Position = []  # noqa: RUF012  equal on all ranks and never changed

    def __init__(self, communicator: Communicator, work: Callable[[Communicator], T]) -> None:
        self.communicator = communicator
        self._work = work

    def catch_up(self, source: int) -> None:
        raise AssertionError(f"rank {source} cannot be ahead")

    def rebuild(self) -> None:
        self.result = self._work(self.communicator)


class Survivors:
    """The surviving ranks, for work before the first step: after a failure the work starts again on fewer ranks.

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
