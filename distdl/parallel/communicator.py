"""The interface of a communicator, and the world of one process, which needs no MPI.

Methods are named as in MPI and work on arrays in place. Methods ending in ``_json`` carry small plain values (numbers,
text, lists, dictionaries) as JSON, never as pickles. Every method except `abort` is collective: all ranks of the
communicator call it, in the same order.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from distdl.job.streams import say

Bytes = NDArray[np.uint8]
#: Part of a buffer: its first byte and the number of its bytes.
Span = tuple[int, int]

#: A waiting rank checks at least this often whether it can continue.
LONGEST_PAUSE_SECONDS = 1e-3
#: Most waits of a training step are shorter than this.
SPIN_SECONDS = 1e-3


@dataclass(frozen=True)
class CompletedRecovery:
    """A recovery that succeeded: the lost ranks, by their numbers in the world that the launcher started."""

    lost_ranks: list[int]
    seconds: float


@dataclass
class Waiting:
    """How the ranks of a group wait; the parts that are split from it share this object."""

    spin_seconds: float = SPIN_SECONDS
    """A waiting rank polls for this time before it sleeps, unless there are more ranks than cores."""
    oversubscribed: bool = False
    """Whether there are more ranks than cores. Then a waiting rank sleeps at once and leaves its core to others."""
    cores_noticed: bool = False
    reports: bool = True
    """Whether a rank that waits long says so; in a training the watchdog does it."""


class Communicator(ABC):
    """A group of ranks 0 .. `size` - 1 that work together."""

    rank: int
    size: int
    description: str
    #: Whether the survivors continue when a rank dies: then calls raise `PeerLost`, and `shrink` returns their group.
    survives_failures: bool = False
    #: The recovery that was needed while MPI started; `Survivors` takes and reports it.
    recovery_at_start: CompletedRecovery | None = None
    waiting: Waiting

    @property
    def world_ranks(self) -> list[int]:
        """The numbers of this group's ranks in the world that the launcher started."""
        return list(range(self.size))

    def agree(self, flag: bool) -> bool:
        """Return True on every rank if all ranks give True, otherwise False on every rank. Collective.

        True commits the work so far on every surviving rank. Raises `PeerLost`, with `agreed` set, if a rank was lost.
        A rank that got a `PeerLost` elsewhere must call this with False before `shrink`, because others may be waiting
        here for its vote.

        If a lost rank ends the whole job anyway, this returns `flag` without communication: all ranks give the same.
        """
        return flag

    def shrink(self) -> Communicator:
        """Return the group of the surviving ranks in their old order. Collective, after an `agree` that failed.

        The old group and all its parts must not be used any longer.
        """
        raise NotImplementedError

    def notice_cores(self) -> None:  # noqa: B027  one process has nothing to find out
        """Set ``waiting.oversubscribed`` if that has not been done yet. Collective."""

    @abstractmethod
    def barrier(self, longest_pause_seconds: float = LONGEST_PAUSE_SECONDS) -> None:
        """Return once every rank has called it. A waiting rank sleeps in pauses that grow to the longest."""

    @abstractmethod
    def bcast(self, array: NDArray[Any], root: int = 0) -> None:
        """Overwrite `array` on every rank with the array of `root`; shapes and dtypes must be equal."""

    @abstractmethod
    def allreduce(self, array: NDArray[Any]) -> None:
        """Overwrite `array` with its sum over the ranks, in an order that MPI chooses."""

    @abstractmethod
    def alltoallv(self, send: Bytes, send_spans: Sequence[Span], receive: Bytes, receive_spans: Sequence[Span]) -> None:
        """Send the bytes at ``send_spans[r]`` to each rank r; put the bytes from rank r at ``receive_spans[r]``."""

    @abstractmethod
    def allgatherv(self, array: Bytes, counts: Sequence[int]) -> None:
        """Complete `array` on every rank: rank r has filled the r-th piece of it, with ``counts[r]`` bytes."""

    @abstractmethod
    def allgather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""

    @abstractmethod
    def bcast_json(self, value: Any, root: int = 0) -> Any:
        """Return the value of `root` on every rank."""

    @abstractmethod
    def split(self, color: int | None) -> Communicator | None:
        """Return the communicator of the ranks with the same color; None for color None."""

    @abstractmethod
    def host(self) -> Communicator:
        """Return the communicator of the ranks that share this rank's memory."""

    @abstractmethod
    def free(self) -> None:
        """Release MPI's resources for a group made by `split`, and for its `host`; do not use them afterwards."""

    @abstractmethod
    def abort(self, exit_code: int) -> NoReturn:
        """End every process of the job now, in the middle of its work."""


class OneProcess(Communicator):
    """The world of a single rank: every collective call completes at once. See `Communicator`."""

    def __init__(self, description: str = "one process") -> None:
        self.rank = 0
        self.size = 1
        self.waiting = Waiting()
        self.description = description

    def barrier(self, longest_pause_seconds: float = LONGEST_PAUSE_SECONDS) -> None: ...
    def bcast(self, array: NDArray[Any], root: int = 0) -> None: ...
    def allreduce(self, array: NDArray[Any]) -> None: ...
    def allgatherv(self, array: Bytes, counts: Sequence[int]) -> None: ...
    def free(self) -> None: ...

    def alltoallv(self, send: Bytes, send_spans: Sequence[Span], receive: Bytes, receive_spans: Sequence[Span]) -> None:
        (start, count), (to, _) = send_spans[0], receive_spans[0]
        receive[to : to + count] = send[start : start + count]

    def allgather_json(self, value: Any) -> list[Any]:
        return [value]

    def bcast_json(self, value: Any, root: int = 0) -> Any:  # noqa: ARG002
        return value

    def split(self, color: int | None) -> Communicator | None:
        return None if color is None else self

    def host(self) -> Communicator:
        return self

    def abort(self, exit_code: int) -> NoReturn:
        say()
        os._exit(exit_code)


def ranks_per_host(communicator: Communicator) -> dict[str, int]:
    """Return the name of each host and the number of its ranks, in rank order. Collective."""
    return dict(Counter(communicator.allgather_json(socket.gethostname())))
