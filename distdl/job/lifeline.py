"""The lifeline: a rank ends when its launcher ends, even if the launcher was killed (see `docs/processes.md`).

A rank asks the kernel for a SIGKILL when its parent dies; this also reaches a stopped rank. In addition, a thread
checks once a second the launchers above the parent, or above a shell script that started the rank.

A launcher may end before its ranks do this. Open MPI's ranks would then keep trying, in MPI_Init, to reach the server
that the launcher was. So a rank that finds no launcher checks whether that server still listens.
"""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache

from distdl.job.launched_by import how_to_unset, read_launch
from distdl.job.processes import Process, ancestors, send_when_the_parent_dies
from distdl.job.streams import say_line

#: The programs that start ranks and keep the connection to them: of Open MPI 5 and 4, MPICH and similar, Slurm.
LAUNCHERS = frozenset(
    {
        *("mpirun", "mpiexec", "prterun", "prte", "prted", "orterun", "orted"),
        *("mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_pr", "slurmstepd"),
    }
)
#: Programs that may start their tasks from a thread that ends: the kernel would send its signal at the thread's end.
STEP_DAEMONS = frozenset({"slurmstepd"})
SECONDS_BETWEEN_LOOKS = 1.0


@cache
def end_with_the_launcher() -> None:
    """Let this process be killed as soon as one of the launchers above it has ended."""
    watched = [process for process in ancestors() if process.name in LAUNCHERS]
    parent = os.getppid()
    if any(process.pid == parent and process.name not in STEP_DAEMONS for process in watched):
        send_when_the_parent_dies(signal.SIGKILL)
    if not any(process.name not in STEP_DAEMONS for process in watched) and server_is_gone():
        say_line(
            "error: the mpirun that started this process has ended. If none did, variables of Open MPI are left over "
            f"from another job: {how_to_unset(read_launch())}"
        )
        os.kill(os.getpid(), signal.SIGKILL)
    if watched:  # also the parent: the kernel sends nothing if it died before the request
        with suppress(RuntimeError):  # too many threads: the kernel's signal must do
            threading.Thread(target=_watch, args=[watched], name="lifeline", daemon=True).start()


def server_is_gone(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether no process listens at the address of the server in Open MPI's launcher."""
    uris = [uri for name, uri in environment.items() if name.startswith("PMIX_SERVER_URI")]
    found = re.search(r"tcp4://([\d.]+):(\d+)", " ".join(uris))
    if found is None:
        return False
    try:
        socket.create_connection((found[1], int(found[2])), timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # MPI reports other errors better
    return False


def pmi_is_gone(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the connection to MPICH's launcher, which a rank inherits as an open file, is not there."""
    number = environment.get("PMI_FD", "")
    try:
        if number.isdecimal():
            os.fstat(int(number))
    except OSError:
        return True
    return False


def _watch(launchers: Sequence[Process]) -> None:
    while all(launcher.lives for launcher in launchers):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)
