"""The communicator over MPI: the only module that imports mpi4py.

Waiting: every collective is started nonblocking and polled. A rank spins for a millisecond (`spin_seconds`), since
most waits of a training step are shorter than that and a process put to sleep wakes late; after that it sleeps in
pauses that grow to a millisecond, so that a rank that waits for a slow one leaves the core to others. Where there
are more ranks than cores it yields the core at once.

Failures: an MPI error that says that a process has died becomes `PeerLost`; nothing above this module knows
MPI's error classes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from distdl.errors import PeerLost
from distdl.launcher import survives_failures
from distdl.parallel.communicator import Bytes, Communicator

SHORTEST_PAUSE_SECONDS = 50e-6
LONGEST_PAUSE_SECONDS = 1e-3
#: A launcher that is told to end the job may do so before it has passed on what we printed last.
SECONDS_TO_BE_HEARD = 0.5
#: MPI counts are 32-bit integers in the calls we use.
LARGEST_MESSAGE_BYTES = 2**30

_PEER_LOST_CLASSES = {
    getattr(MPI, name) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED") if hasattr(MPI, name)
}


class MpiCommunicator(Communicator):
    """The ranks of an MPI communicator."""

    def __init__(self, comm: MPI.Comm, *, oversubscribed: bool | None = None) -> None:
        self._comm = comm
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.description = library_name()
        self.seconds_waiting = 0.0
        self._oversubscribed = False
        self._oversubscribed = self._more_ranks_than_cores() if oversubscribed is None else oversubscribed

    def _more_ranks_than_cores(self) -> bool:
        node = self.node()
        cores = {core for rank in node.allgather_json(sorted(os.sched_getaffinity(0))) for core in rank}
        return node.size > len(cores)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._complete(self._comm.Ibarrier)

    def bcast(self, array: NDArray[Any], root: int = 0) -> None:
        """Overwrite `array` on every rank with that of `root`."""
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, LARGEST_MESSAGE_BYTES):
            piece = flat[start : start + LARGEST_MESSAGE_BYTES]
            self._complete(self._comm.Ibcast, [piece, MPI.BYTE], root)

    def allreduce(self, array: NDArray[Any]) -> None:
        """Overwrite `array` with its sum over the ranks, in an order that MPI chooses."""
        self._complete(self._comm.Iallreduce, MPI.IN_PLACE, array, MPI.SUM)

    def alltoallv(self, send: Bytes, send_counts: Sequence[int], receive: Bytes, receive_counts: Sequence[int]) -> None:
        """Send ``send_counts[r]`` bytes to every rank r; what came from r lies in `receive` in rank order."""
        self._complete(
            self._comm.Ialltoallv,
            [send, (list(send_counts), _starts(send_counts)), MPI.BYTE],
            [receive, (list(receive_counts), _starts(receive_counts)), MPI.BYTE],
        )

    def allgatherv(self, send: Bytes, receive: Bytes, counts: Sequence[int]) -> None:
        """Put the ``counts[r]`` bytes that rank r sends into `receive` on every rank, in rank order."""
        self._complete(
            self._comm.Iallgatherv,
            [send, counts[self.rank], MPI.BYTE],
            [receive, (list(counts), _starts(counts)), MPI.BYTE],
        )

    def allgather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.empty(self.size, np.int64)
        self._complete(self._comm.Iallgather, np.array([mine.size], np.int64), sizes)
        counts = [int(size) for size in sizes]
        everyone = np.empty(sum(counts), np.uint8)
        self.allgatherv(mine, everyone, counts)
        return [
            json.loads(everyone[start : start + count].tobytes())
            for start, count in zip(_starts(counts), counts, strict=True)
        ]

    def bcast_json(self, value: Any, root: int = 0) -> Any:
        """Return the value of `root` on every rank."""
        text = json.dumps(value).encode() if self.rank == root else b""
        size = np.array([len(text)], np.int64)
        self.bcast(size, root)
        buffer = np.frombuffer(text, np.uint8).copy() if self.rank == root else np.empty(size[0], np.uint8)
        self.bcast(buffer, root)
        return json.loads(buffer.tobytes())

    def split(self, color: int | None) -> Communicator | None:
        """Return the communicator of the ranks that gave the same color; None for those that gave None."""
        part = self._comm.Split(MPI.UNDEFINED if color is None else color, self.rank)
        if part == MPI.COMM_NULL:
            return None
        return self._part(part)

    def node(self) -> Communicator:
        """Return the communicator of the ranks that share this rank's memory."""
        part = self._comm.Split_type(MPI.COMM_TYPE_SHARED, self.rank)
        return self._part(part)

    def _part(self, part: MPI.Comm) -> MpiCommunicator:
        communicator = MpiCommunicator(part, oversubscribed=self._oversubscribed)
        communicator.spin_seconds = self.spin_seconds
        return communicator

    def abort(self, exit_code: int) -> NoReturn:
        """End every process of the job now, whatever it is doing.

        Where the launcher lets survivors of a failure go on, it lets them go on after MPI_Abort too, and would
        wait for ever for ranks that wait for us. There the ranks in a collective call are woken by revoking the
        communicator, and the launcher's daemon, our parent, is told to end the job.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(SECONDS_TO_BE_HEARD)
        if survives_failures():
            self._comm.Revoke()
            MPI.COMM_WORLD.Revoke()
            os.kill(os.getppid(), signal.SIGTERM)
        else:
            MPI.COMM_WORLD.Abort(exit_code)
        os._exit(exit_code)

    def _complete(self, start: Callable[..., MPI.Request], *arguments: Any) -> None:
        started = time.perf_counter()
        pause = SHORTEST_PAUSE_SECONDS
        spin_seconds = min(self.spin_seconds, Communicator.spin_seconds) if self._oversubscribed else self.spin_seconds
        try:
            request = start(*arguments)
            while not request.Test():
                if time.perf_counter() - started > spin_seconds:
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                elif self._oversubscribed:
                    os.sched_yield()
        except MPI.Exception as error:
            if error.Get_error_class() in _PEER_LOST_CLASSES:
                raise PeerLost(f"a rank was lost: {error.Get_error_string()}") from error
            raise
        finally:
            self.seconds_waiting += time.perf_counter() - started


def world_of_mpi() -> MpiCommunicator:
    """Return the communicator of all ranks that the launcher started."""
    return MpiCommunicator(MPI.COMM_WORLD)


def library_name() -> str:
    """Return the name and version of the MPI library, such as ``MPICH 5.0.2``."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(str(number) for number in version)}"


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]
