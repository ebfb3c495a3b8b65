"""The lifeline: a rank ends when its launcher ends, however that ends.

A launcher that is told to end takes its ranks with it. One that is killed (``kill -9``, or for memory) cannot: Open
MPI's ranks are its children and would live on, waiting or computing, beside the job that is started next. MPICH has
a proxy between the two that ends the ranks, as long as it is not killed itself. So a rank asks the kernel for a
SIGKILL when its parent dies, which also reaches a stopped rank, and watches the launchers above its parent, or above
a shell script that started it, in a thread that looks once a second.

The ranks of other hosts are children of the launcher's daemon there, which ends when it loses its launcher.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import cache

from distdl.processes import Process, ancestors

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
PR_SET_PDEATHSIG = 1


@cache
def end_with_the_launcher() -> None:
    """Let this process be killed as soon as one of the launchers that it descends from is gone."""
    watched = [process for process in ancestors() if process.name in LAUNCHERS]
    parent = os.getppid()
    if any(process.pid == parent and process.name not in FORK_FROM_A_THREAD for process in watched):
        send_when_the_parent_dies(signal.SIGKILL)
    # Both: where the parent had died before the kernel was asked, the kernel sends nothing.
    if watched:
        threading.Thread(target=_watch, args=[watched], name="lifeline", daemon=True).start()


def send_when_the_parent_dies(signal_number: int) -> None:
    """Ask the kernel to send this process a signal when its parent ends; the next program it becomes keeps that."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _watch(launchers: Sequence[Process]) -> None:
    while all(launcher.lives for launcher in launchers):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)
