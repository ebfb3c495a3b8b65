"""The lifeline: a rank ends when its launcher ends, however that ends.

A launcher that is told to end takes its ranks with it. One that is killed (``kill -9``, or for memory) cannot: Open
MPI's ranks are its children and would live on, waiting or computing, beside the job that is started next. MPICH has
a proxy between the two that ends the ranks, as long as it is not killed itself. So a rank asks the kernel for a
SIGKILL when its parent dies, which also reaches a stopped rank, and watches the launchers above its parent, or above
a shell script that started it, in a thread that looks once a second.

A launcher may be gone before its ranks have come so far as to ask. Open MPI's would then go on trying to
reach, in MPI_Init, the server that the launcher was. So a rank that finds no launcher tries whether anybody listens.

The ranks of other hosts are children of the launcher's daemon there, which ends when it loses its launcher.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache

from distdl.job.processes import Process, ancestors, send_when_the_parent_dies

#: The programs that start ranks, and hold the connection to them: Open MPI 5, Open MPI 4, MPICH and its kin, Slurm.
LAUNCHERS = frozenset(
    {
        *("mpirun", "mpiexec", "prterun", "prte", "prted", "orterun", "orted"),
        *("mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_pr", "slurmstepd"),
    }
)
#: Those of them that may start their tasks from a thread that ends: the kernel sends its signal when that does.
STEP_DAEMONS = frozenset({"slurmstepd"})
SECONDS_BETWEEN_LOOKS = 1.0


@cache
def end_with_the_launcher() -> None:
    """Let this process be killed as soon as one of the launchers that it descends from is gone."""
    watched = [process for process in ancestors() if process.name in LAUNCHERS]
    parent = os.getppid()
    if any(process.pid == parent and process.name not in STEP_DAEMONS for process in watched):
        send_when_the_parent_dies(signal.SIGKILL)
    if not any(process.name not in STEP_DAEMONS for process in watched) and server_is_gone():
        os.kill(os.getpid(), signal.SIGKILL)
    if watched:  # the parent too: if it had died before the kernel was asked, the kernel sends nothing
        threading.Thread(target=_watch, args=[watched], name="lifeline", daemon=True).start()


def server_is_gone(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether nobody listens where Open MPI's launcher has said that it would serve its ranks."""
    uris = [uri for name, uri in environment.items() if name.startswith("PMIX_SERVER_URI")]
    found = re.search(r"tcp4://([\d.]+):(\d+)", " ".join(uris))
    if found is None:
        return False
    try:
        socket.create_connection((found[1], int(found[2])), timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # whatever this is, MPI says it better
    return False


def _watch(launchers: Sequence[Process]) -> None:
    while all(launcher.lives for launcher in launchers):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)
