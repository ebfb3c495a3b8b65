"""The lifeline: a rank ends when its launcher ends, however that ends.

A launcher that is told to end takes its ranks with it. One that is killed (``kill -9``, or for memory) cannot: Open
MPI's ranks are its children and would live on, waiting or computing, beside the job that is started next. MPICH has
a proxy between the two that ends the ranks, as long as it is not killed itself. So a rank asks the kernel for a
SIGKILL when its parent dies, which also reaches a stopped rank, and watches the launchers above its parent, or above
a shell script that started it, in a thread that looks once a second.

The ranks of other hosts are children of the launcher's daemon there, which ends when it loses its launcher.

There is one time at which a rank that dies does take the others with it: while MPI starts. A launcher that lets the
survivors of a failure go on does so then too, but the library would wait for the dead for ever (`together_or_not`).
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache

from distdl.processes import Process, ancestors, children, look_at, send_when_the_parent_dies

#: The programs that start ranks, and hold the connection to them: Open MPI 5, Open MPI 4, MPICH and its kin, Slurm.
LAUNCHERS = frozenset(
    {
        *("mpirun", "mpiexec", "prterun", "prte", "prted", "orterun", "orted"),
        *("mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_pr", "slurmstepd"),
    }
)
#: The kernel sends its signal when the *thread* that started us ends; not all start their tasks from the main one.
FORK_FROM_A_THREAD = frozenset({"slurmstepd"})
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_LOOKS_AT_SIBLINGS = 0.2
#: A launcher starts the ranks of a host one after another.
SECONDS_TO_FORK = 10.0


def end_with_the_parent() -> None:
    """Let this process be killed when the launcher ends that started it."""
    parent = look_at(os.getppid())
    if parent is not None and parent.name in LAUNCHERS - FORK_FROM_A_THREAD:
        send_when_the_parent_dies(signal.SIGKILL)


@cache
def end_with_the_launcher() -> None:
    """Let this process be killed as soon as one of the launchers that it descends from is gone."""
    # The parent too: if it had died before the kernel was asked, the kernel sends nothing.
    watched = [process for process in ancestors() if process.name in LAUNCHERS]
    if watched:
        threading.Thread(target=_watch, args=[watched], name="lifeline", daemon=True).start()


@contextmanager
def together_or_not() -> Iterator[None]:
    """End the job if a rank of this host is lost meanwhile: for starting MPI where the launcher would go on.

    The watch is a process of its own, since MPI holds Python's lock while it starts. It ends with what is inside.
    """
    parent = look_at(os.getppid())
    local_size = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    if parent is None or parent.name not in LAUNCHERS or not local_size.isdecimal():
        yield
        return
    started, hold = os.pipe()
    rank, watch = os.getpid(), os.fork()
    if watch == 0:
        try:
            os.close(hold)
            _watch_siblings(parent.pid, rank, int(local_size), started)
        finally:
            os._exit(0)
    try:
        os.close(started)
        yield
    finally:
        os.close(hold)
        os.waitpid(watch, 0)


def _watch_siblings(launcher: int, rank: int, expected: int, started: int) -> None:
    """Return when `started` is closed at its other end, or end the job."""
    seen: set[int] = set()
    complete_at = time.monotonic() + SECONDS_TO_FORK
    while not select.select([started], [], [], SECONDS_BETWEEN_LOOKS_AT_SIBLINGS)[0]:
        alive = children(launcher)
        seen |= alive
        if seen - alive or (len(alive) < expected and time.monotonic() > complete_at):
            if rank == min(alive, default=0):
                os.write(2, b"distdl: error: a rank was lost while MPI was starting; nothing is lost: start again\n")
            time.sleep(SECONDS_BETWEEN_LOOKS)  # until all have seen it, and what was said is passed on
            with suppress(ProcessLookupError):
                os.kill(launcher, signal.SIGTERM)
            return


def _watch(launchers: Sequence[Process]) -> None:
    while all(launcher.lives for launcher in launchers):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)
