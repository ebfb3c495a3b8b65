"""While MPI starts, nothing survives a failure yet: ranks wait for each other in MPI_Init, for a dead one for ever.

A launcher that lets the others go on without a rank does so then, too. So as long as this rank is in there it looks
whether all ranks of its host, the launcher's children as it is one itself, are alive, and otherwise ends the job.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distdl.job.streams import say

SECONDS_BETWEEN_LOOKS = 0.25
#: So long a rank is missed before the job ends: it may have died after its own start, which we are about to complete.
SECONDS_MISSED = 3.0
#: And so long if it has never been seen: the launcher may not have started it yet.
SECONDS_NEVER_SEEN = 10.0
#: How the names of Open MPI's programs begin whose children are ranks.
PARENTS = ("prte", "mpirun", "mpiexec")


@contextmanager
def together_or_not_at_all() -> Iterator[None]:
    """End the job where another rank of this host dies as long as the code inside waits for it.

    A process of its own looks, since no other thread of this one runs during MPI_Init.
    """
    launcher, rank = os.getppid(), os.getpid()
    ended, end = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        try:
            os.close(end)
            _watch(ended, launcher, rank)
        finally:
            os._exit(0)
    os.close(ended)
    try:
        yield
    finally:
        os.close(end)
        os.waitpid(watcher, 0)


def _watch(ended: int, launcher: int, rank: int) -> None:
    """Look until the pipe is closed, by the rank or by its death."""
    expected = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "0"))
    seen, seconds = False, 0.0
    while not select.select([ended], [], [], SECONDS_BETWEEN_LOOKS)[0]:
        living = _children(launcher)
        if living is None:
            return
        seen = seen or living >= expected
        seconds = 0.0 if living >= expected else seconds + SECONDS_BETWEEN_LOOKS
        if seconds >= (SECONDS_MISSED if seen else SECONDS_NEVER_SEEN):
            say("distdl: error: a rank was lost while MPI was started; the job ends: start it again\n")
            os.kill(launcher, signal.SIGTERM)
            os.kill(rank, signal.SIGKILL)


def _children(launcher: int) -> int | None:
    """Return how many children the launcher has; None where that cannot be told."""
    try:
        if not Path(f"/proc/{launcher}/comm").read_text().startswith(PARENTS):
            return None
        return len(Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())
    except OSError:
        return None
