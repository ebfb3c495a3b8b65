"""The communicator: what ranks can do together, and the one-process world that needs no MPI.

Methods are named as in MPI and work on arrays in place; those that end in ``_json`` carry small plain values
(numbers, text, lists, dictionaries), as JSON and never as pickles. Every method but `abort` is collective:
all ranks of the communicator call it, in the same order.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from distdl.job.streams import say

Bytes = NDArray[np.uint8]
#: A piece of a buffer: its first byte, and how many bytes.
Span = tuple[int, int]

#: A rank that waits looks at least this often whether it may go on.
LONGEST_PAUSE_SECONDS = 1e-3


@dataclass(frozen=True)
class CompletedRecovery:
    """A recovery that succeeded: the lost ranks, by their numbers in the world that the launcher started."""

    lost_ranks: list[int]
    seconds: float


class Communicator(ABC):
    """A group of ranks 0 .. `size` - 1 that work together."""

    rank: int
    size: int
    description: str
    #: Whether the ranks that are left can go on when one dies: `PeerLost` is raised, and `shrink` gives their group.
    survives_failures: bool = False
    #: The recovery that was needed while MPI started; `Survivors` takes and reports it.
    recovery_at_start: CompletedRecovery | None = None
    #: A rank that waits polls for so long before it sleeps (unless there are more ranks than cores). Most waits of a
    #: training step are shorter than a millisecond.
    spin_seconds: float = 1e-3
    #: Whether there are more ranks than cores, so that who waits should leave its core to others at once.
    oversubscribed: bool = False

    @property
    def seconds_waiting(self) -> float:
        """Seconds this rank has waited for others, here and in parts of this group; moving much data is not waiting."""
        return 0.0

    @property
    def world_ranks(self) -> list[int]:
        """The numbers that the ranks of this group had in the world that the launcher started."""
        return list(range(self.size))

    def agree(self, flag: bool) -> bool:
        """Return on every rank alike whether all gave True and none was lost on the way. Collective.

        True commits: what was done up to here counts on every rank that is left. Raises `PeerLost`, with `agreed`
        set, where a rank was lost. Who has met a `PeerLost` elsewhere must come here with False before it does
        `shrink`, since others may wait here for its verdict. Where no rank can be lost without the end of the job,
        this is `flag`, and nothing is communicated: all ranks then give the same.
        """
        return flag

    def shrink(self) -> Communicator:
        """Return the group of the ranks that are left, in the old order. Collective, after an `agree` that failed.

        The old group, and all that was split off it, must not be used any more.
        """
        raise NotImplementedError

    def notice_cores(self) -> None:  # noqa: B027  one process has nothing to find out
        """Find out whether there are more ranks than cores, where that is not known yet. Collective."""

    @abstractmethod
    def barrier(self, longest_pause_seconds: float = LONGEST_PAUSE_SECONDS) -> None:
        """Return when every rank has called it. Who comes early sleeps, in pauses that grow to the longest."""

    @abstractmethod
    def bcast(self, array: NDArray[Any], root: int = 0) -> None:
        """Overwrite `array` on every rank with that of `root`; shapes and dtypes must agree."""

    @abstractmethod
    def allreduce(self, array: NDArray[Any]) -> None:
        """Overwrite `array` with its sum over the ranks, in an order that MPI chooses."""

    @abstractmethod
    def alltoallv(self, send: Bytes, send_spans: Sequence[Span], receive: Bytes, receive_spans: Sequence[Span]) -> None:
        """Send the bytes at ``send_spans[r]`` to every rank r; what comes from r goes to ``receive_spans[r]``."""

    @abstractmethod
    def allgatherv(self, array: Bytes, counts: Sequence[int]) -> None:
        """Complete `array` on every rank: rank r has filled the r-th piece of it, of ``counts[r]`` bytes."""

    @abstractmethod
    def allgather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""

    @abstractmethod
    def bcast_json(self, value: Any, root: int = 0) -> Any:
        """Return the value of `root` on every rank."""

    @abstractmethod
    def split(self, color: int | None) -> Communicator | None:
        """Return the communicator of the ranks that gave the same color; None for those that gave None."""

    @abstractmethod
    def host(self) -> Communicator:
        """Return the communicator of the ranks that share this rank's memory."""

    @abstractmethod
    def free(self) -> None:
        """Give back what MPI keeps for a group made by `split`, and for its `node`; neither is of use after."""

    @abstractmethod
    def abort(self, exit_code: int) -> NoReturn:
        """End every process of the job now, whatever it is doing."""


class OneProcess(Communicator):
    """The world of a single rank: every collective is complete as soon as it is called."""

    def __init__(self, description: str = "one process") -> None:
        self.rank = 0
        self.size = 1
        self.description = description

    def barrier(self, longest_pause_seconds: float = LONGEST_PAUSE_SECONDS) -> None:
        """Return at once."""

    def bcast(self, array: NDArray[Any], root: int = 0) -> None:
        """Leave `array` as it is."""

    def allreduce(self, array: NDArray[Any]) -> None:
        """Leave `array` as it is."""

    def alltoallv(self, send: Bytes, send_spans: Sequence[Span], receive: Bytes, receive_spans: Sequence[Span]) -> None:
        """Copy the one piece."""
        (start, count), (to, _) = send_spans[0], receive_spans[0]
        receive[to : to + count] = send[start : start + count]

    def allgatherv(self, array: Bytes, counts: Sequence[int]) -> None:
        """Leave `array` as it is."""

    def allgather_json(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]

    def bcast_json(self, value: Any, root: int = 0) -> Any:  # noqa: ARG002
        """Return the value itself."""
        return value

    def split(self, color: int | None) -> Communicator | None:
        """Return this world, or None."""
        return None if color is None else self

    def host(self) -> Communicator:
        """Return this world."""
        return self

    def free(self) -> None:
        """Keep the one world there is."""

    def abort(self, exit_code: int) -> NoReturn:
        """End this process."""
        say()
        os._exit(exit_code)


def hosts(communicator: Communicator) -> dict[str, int]:
    """Return the name of each host with the number of ranks on it, in rank order. Collective."""
    count: dict[str, int] = {}
    for name in communicator.allgather_json(socket.gethostname()):
        count[name] = count.get(name, 0) + 1
    return count
