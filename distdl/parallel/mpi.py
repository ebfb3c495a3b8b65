"""The communicator over MPI: the only module that imports mpi4py. `communicator.py` documents the methods.

Waiting: every collective starts nonblocking and is polled. A waiting rank spins, then sleeps in pauses that grow with
the time waited. docs/processes.md gives the reasons.

Moving data: MPI moves data only inside MPI calls, a few pages in each. A rank that sleeps between these calls makes a
large transfer a hundred times slower. So ranks meet in a barrier, where they may sleep, before they move more than a
few pages. Then no rank sleeps until the transfer is complete.

Failures: an MPI error that reports a dead process becomes `PeerLost`; no module above this one knows MPI's error
classes. The first rank that sees the failure revokes the communicator and all related ones (split from it, or it from
them), because a rank may wait in any of them for one that has left. The survivors meet in `agree`, the only call that
is sure to end equally on all of them, and continue in the group that `shrink` returns.

Open MPI 5.0.10 and 5.0.11 crash if a failure is reported while they create a communicator that includes the lost rank
(docs/reliability.md). So if ranks may be lost, we create as few communicators as possible.

MPI_Finalize sometimes hangs after a failure, and a rank may be lost during it. So if the launcher lets survivors
continue, it is never called: ranks meet in a barrier and exit.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any, NoReturn

import mpi4py
import numpy as np
from numpy.typing import NDArray

# The import tells which library is installed. `world_of_mpi` starts MPI, after the check that library and launcher fit.
# A script that imported MPI earlier has started it already.
mpi4py.rc.initialize = False
from distdl.errors import EXIT_DEFECT, PeerLost, UserError  # noqa: E402
from distdl.job.launched_by import print_for_all_ranks, survives_failures  # noqa: E402
from distdl.job.lifeline import LAUNCHERS  # noqa: E402
from distdl.job.processes import ancestors, boot_id  # noqa: E402

mpi4py.rc.finalize = not survives_failures()  # at exit, as if the import had started MPI

from mpi4py import MPI  # noqa: E402

from distdl.job.mpi_init import end_the_job_if_a_rank_dies  # noqa: E402
from distdl.job.slow_start import SECONDS_BETWEEN_REPORTS, SECONDS_UNTIL_REPORTED, report_a_long_wait  # noqa: E402
from distdl.job.streams import say  # noqa: E402
from distdl.parallel.agreement import together  # noqa: E402
from distdl.parallel.communicator import LONGEST_PAUSE_SECONDS, Bytes, Communicator, Span, Waiting  # noqa: E402
from distdl.parallel.recovery import Survivors  # noqa: E402
from distdl.parallel.shared import SHARED_MEMORY  # noqa: E402

SHORTEST_PAUSE_SECONDS = 20e-6
#: A rank wakes late by at most this share of the time waited. Larger shares cost more if ranks share cores: most
#: collectives advance only when a waiting rank polls, more than once.
PAUSE_SHARE = 1 / 32
#: Up to this size ranks do not meet first: a sleeping rank delays a transfer of one or two calls only a little.
LARGEST_UNMET_BYTES = 2**15
#: The launcher gets this time to pass on our last output before it is told to end the job.
SECONDS_TO_PASS_ON = 0.5
#: A call may fail because of a lost rank before this rank is notified of it.
SECONDS_TO_BE_NOTIFIED = 2.0
#: All survivors enter a shrink right after an agreement. In one of 1,100 jobs with kills, on fully used cores, one rank
#: was still inside that agreement three minutes later, and the others waited for it in the shrink.
SECONDS_TO_SHRINK = 120.0
#: The calls used here have 32-bit counts.
LARGEST_MESSAGE_BYTES = 2**30

#: A nonblocking collective.
Start = Callable[..., MPI.Request]
_PEER_LOST_CLASSES = {
    getattr(MPI, name) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED") if hasattr(MPI, name)
}


class _Related:
    """The MPI communicators of a group and of all its parts: a failure ends the use of all of them."""

    def __init__(self) -> None:
        self.comms: list[MPI.Comm] = []

    def has_failed(self) -> bool:
        """Return whether a rank is lost. A call that a failure interrupts may raise an error of any class."""
        if not survives_failures():
            return False
        ends = time.monotonic() + SECONDS_TO_BE_NOTIFIED
        while time.monotonic() < ends:
            if any(comm.Is_revoked() or comm.Get_failed().Get_size() for comm in self.comms):
                return True
            MPI.COMM_SELF.Iprobe()  # lets MPI receive notifications
            time.sleep(SHORTEST_PAUSE_SECONDS)
        return False

    def revoke(self) -> None:
        """Wake every rank that waits in one of these communicators; no rank can wait in them afterwards."""
        if survives_failures():
            for comm in self.comms:
                comm.Revoke()


class MpiCommunicator(Communicator):
    """The ranks of an MPI communicator."""

    def __init__(self, comm: MPI.Comm, *, of: MpiCommunicator | None = None) -> None:
        self._comm = comm
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.description = library_name()
        self.survives_failures = survives_failures() and self.size > 1
        self._own_host: MpiCommunicator | None = None
        self._related: _Related = _Related() if of is None else of._related
        self._related.comms.append(comm)
        self.waiting = Waiting() if of is None else of.waiting

    @property
    def world_ranks(self) -> list[int]:
        group, everyone = self._comm.Get_group(), MPI.COMM_WORLD.Get_group()
        try:
            return list(group.Translate_ranks(None, everyone))
        finally:
            group.Free()
            everyone.Free()

    def agree(self, flag: bool) -> bool:
        if not survives_failures():
            return flag
        try:
            with self._failures_as_peer_lost():
                return bool(self._comm.Agree(int(flag)))
        except PeerLost as lost:
            lost.agreed = True
            raise

    def shrink(self) -> Communicator:
        global _world  # noqa: PLW0603  there is one
        self._related.revoke()
        deadline = threading.Timer(SECONDS_TO_SHRINK, _give_up_shrinking, [self.rank])
        deadline.daemon = True
        deadline.start()
        while True:
            with suppress(PeerLost), self._failures_as_peer_lost():
                survivors = MpiCommunicator(self._comm.Shrink())
                break
        deadline.cancel()
        survivors.waiting = self.waiting
        survivors.waiting.cores_noticed = False
        if _world is self:
            _world = survivors
            if survivors.rank == 0:
                print_for_all_ranks()
        return survivors

    def notice_cores(self) -> None:
        if not self.waiting.cores_noticed:
            host = self.host()
            cores = {core for rank in host.allgather_json(sorted(os.sched_getaffinity(0))) for core in rank}
            self.waiting.oversubscribed = host.size > len(cores)
            self.waiting.cores_noticed = True

    def barrier(self, longest_pause_seconds: float = LONGEST_PAUSE_SECONDS) -> None:
        self._complete(self._comm.Ibarrier, longest_pause=longest_pause_seconds)

    def bcast(self, array: NDArray[Any], root: int = 0) -> None:
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, LARGEST_MESSAGE_BYTES):
            piece = flat[start : start + LARGEST_MESSAGE_BYTES]
            self._move(piece.size, self._comm.Ibcast, [piece, MPI.BYTE], root)

    def allreduce(self, array: NDArray[Any]) -> None:
        self._move(array.nbytes, self._comm.Iallreduce, MPI.IN_PLACE, array, MPI.SUM)

    def alltoallv(self, send: Bytes, send_spans: Sequence[Span], receive: Bytes, receive_spans: Sequence[Span]) -> None:
        self.barrier()  # a rank does not know how much data other ranks move
        self._complete(self._comm.Ialltoallv, _parts(send, send_spans), _parts(receive, receive_spans), sleeps=False)

    def allgatherv(self, array: Bytes, counts: Sequence[int]) -> None:
        starts = _starts(counts)
        total = starts[-1] + counts[-1]
        self._move(total, self._comm.Iallgatherv, MPI.IN_PLACE, [array, (list(counts), starts), MPI.BYTE])

    def allgather_json(self, value: Any) -> list[Any]:
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.empty(self.size, np.int64)
        self._complete(self._comm.Iallgather, np.array([mine.size], np.int64), sizes)
        counts = [int(size) for size in sizes]
        starts = _starts(counts)
        everyone = np.empty(sum(counts), np.uint8)
        everyone[starts[self.rank] :][: mine.size] = mine
        self.allgatherv(everyone, counts)
        return [json.loads(everyone[start:][:count].tobytes()) for start, count in zip(starts, counts, strict=True)]

    def bcast_json(self, value: Any, root: int = 0) -> Any:
        text = json.dumps(value).encode() if self.rank == root else b""
        size = np.array([len(text)], np.int64)
        self.bcast(size, root)
        buffer = np.frombuffer(text, np.uint8).copy() if self.rank == root else np.empty(size[0], np.uint8)
        self.bcast(buffer, root)
        return json.loads(buffer.tobytes())

    def split(self, color: int | None) -> Communicator | None:
        return self._split(self._comm.Split, MPI.UNDEFINED if color is None else color)

    def host(self) -> Communicator:
        if self._own_host is None and survives_failures() and len(set(self.allgather_json(_memory_identity()))) == 1:
            self._own_host = self
        if self._own_host is None:
            self._own_host = self._split(self._comm.Split_type, MPI.COMM_TYPE_SHARED)
            assert self._own_host is not None, "every rank is on a host"
        return self._own_host

    def free(self) -> None:
        # MPI has about two thousand communicators in all.
        if self._own_host is not None and self._own_host is not self:
            self._own_host.free()
        self._related.comms.remove(self._comm)
        with self._failures_as_peer_lost():
            self._comm.Free()

    def abort(self, exit_code: int) -> NoReturn:
        """End every process of the job now.

        A launcher that lets survivors continue also lets them continue after MPI_Abort. It would wait forever for
        ranks that wait for this one. So there, revoking wakes the ranks in a collective call. The group of all
        survivors is revoked too, because a recovery may have replaced this one. Then the launcher is told to end.
        """
        say()
        time.sleep(SECONDS_TO_PASS_ON)
        if survives_failures():
            for one in {self, _world or self}:
                one._related.revoke()
            _let_the_launcher_end_the_job()
        else:
            MPI.COMM_WORLD.Abort(exit_code)
        os._exit(exit_code)

    def _split(self, split: Callable[[int, int], MPI.Comm], color: int) -> MpiCommunicator | None:
        self.barrier()  # sleeps: a split spins, and on a full host it would occupy the core of a rank it waits for
        with self._failures_as_peer_lost():
            part = split(color, self.rank)
        return None if part == MPI.COMM_NULL else MpiCommunicator(part, of=self)

    def _move(self, nbytes: int, start: Start, *arguments: Any) -> None:
        """Complete a collective that moves `nbytes` in all, a number that every rank knows."""
        large = nbytes > LARGEST_UNMET_BYTES
        if large:
            self.barrier()
        self._complete(start, *arguments, sleeps=not large)

    def _complete(
        self, start: Start, *arguments: Any, sleeps: bool = True, longest_pause: float = LONGEST_PAUSE_SECONDS
    ) -> None:
        started, due = time.perf_counter(), SECONDS_UNTIL_REPORTED
        awake_seconds = 0.0 if self.waiting.oversubscribed else self.waiting.spin_seconds
        request = None
        try:
            with self._failures_as_peer_lost():
                request = start(*arguments)
                while not request.Test():
                    waited = time.perf_counter() - started
                    if sleeps and waited > awake_seconds:
                        time.sleep(min(max(waited * PAUSE_SHARE, SHORTEST_PAUSE_SECONDS), longest_pause))
                    if waited > due and self.waiting.reports:
                        due = waited + SECONDS_BETWEEN_REPORTS
                        report_a_long_wait(waited)
        except PeerLost:
            _failed_requests.append((request, arguments))
            raise

    @contextmanager
    def _failures_as_peer_lost(self) -> Iterator[None]:
        """Raise MPI's errors that report a dead process as `PeerLost`, and notify every rank."""
        try:
            yield
        except MPI.Exception as error:
            if error.Get_error_class() not in _PEER_LOST_CLASSES and not self._related.has_failed():
                raise
            self._related.revoke()
            raise PeerLost(f"a rank was lost: {error.Get_error_string()}") from error


#: Failed requests with their buffers: the library may still write into them.
_failed_requests: list[Any] = []
#: All surviving ranks of the job.
_world: MpiCommunicator | None = None


def world_of_mpi(failure: UserError | None = None) -> MpiCommunicator:
    """Start MPI if necessary, and return the communicator of all surviving ranks of the job. Collective.

    If ranks pass a `failure`, all ranks raise that of the lowest one.
    """

    def fail() -> None:
        if failure is not None:
            raise failure

    def meet(communicator: Communicator) -> None:
        together(communicator, fail)
        communicator.notice_cores()

    global _world  # noqa: PLW0603  there is one
    if _world is None:
        if not MPI.Is_initialized():
            with end_the_job_if_a_rank_dies():
                MPI.Init_thread()
        _world = MpiCommunicator(MPI.COMM_WORLD)
        if survives_failures():
            atexit.register(_meet_at_exit)
        survivors = Survivors(_world)
        survivors.run(meet)  # a `shrink` replaces `_world`
        _world.recovery_at_start = survivors.recoveries[0] if survivors.recoveries else None
    return _world


def ranks_started() -> int:
    """Return the number of ranks that the launcher started, as MPI sees it."""
    return MPI.COMM_WORLD.Get_size()


def is_over() -> bool:
    """Return whether MPI has ended."""
    return MPI.Is_finalized()


def _give_up_shrinking(rank: int) -> None:
    """End the job; runs in a thread, while a call of MPI does not return."""
    say(
        f"[rank {rank}] the group of the surviving ranks was not created within {SECONDS_TO_SHRINK:g} s, so the job "
        "ends: continue from the last checkpoint with --resume, or start jobs with --restarts\n"
    )
    time.sleep(SECONDS_TO_PASS_ON)
    _let_the_launcher_end_the_job()
    os._exit(EXIT_DEFECT)


def _let_the_launcher_end_the_job() -> None:
    """Send SIGTERM to the launcher's daemon on this host: this process's parent, or the parent of a shell between."""
    daemons = (process.pid for process in ancestors() if process.name in LAUNCHERS)
    os.kill(next(daemons, os.getppid()), signal.SIGTERM)


def _meet_at_exit() -> None:
    """Wait for the other ranks at exit, as MPI_Finalize would."""
    if _world is not None:
        with suppress(PeerLost):
            _world.barrier()


def vendor() -> str:
    """Return the name of the MPI library, such as ``Open MPI``; works before MPI starts."""
    return MPI.get_vendor()[0]


def library_name() -> str:
    """Return the name and version of the MPI library, such as ``MPICH 5.0.2``."""
    return f"{vendor()} {'.'.join(map(str, MPI.get_vendor()[1]))}"


def _memory_identity() -> str:
    """Return a text that is equal on ranks that share memory, and different on others."""
    return f"{boot_id()} {SHARED_MEMORY.stat().st_dev if SHARED_MEMORY.is_dir() else None}"


def _parts(buffer: Bytes, spans: Sequence[Span]) -> list[Any]:
    """Return the parts of a buffer as MPI takes them."""
    return [buffer, ([count for _, count in spans], [start for start, _ in spans]), MPI.BYTE]


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]
