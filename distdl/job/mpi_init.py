"""End the job if a rank of this host dies while MPI starts.

In MPI_Init the ranks wait for each other, and forever for a dead one. A launcher that lets survivors continue does not
end the job either. So during MPI_Init this rank watches all ranks of its host, which are children of the same launcher.
"""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distdl.job.streams import say_line

SECONDS_BETWEEN_LOOKS = 0.25
#: Time until a missing rank ends the job. It may have died after its own start, which this rank is about to complete.
SECONDS_MISSED = 3.0
#: The same for a rank that was never seen: the launcher may not have started it yet.
SECONDS_NEVER_SEEN = 10.0
#: The first letters of the names of Open MPI's programs that are parents of ranks.
PARENTS = ("prte", "mpirun", "mpiexec")


@contextmanager
def end_the_job_if_a_rank_dies() -> Iterator[None]:
    """End the job if another rank of this host dies during the ``with`` block.

    A separate process watches, because no other thread of this process runs during MPI_Init.
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
    """Watch until the pipe is closed, by the rank or by its death."""
    expected = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "0"))
    seen, seconds = False, 0.0
    while not select.select([ended], [], [], SECONDS_BETWEEN_LOOKS)[0]:
        living = _children(launcher)
        if living is None:
            return
        seen = seen or living >= expected
        seconds = 0.0 if living >= expected else seconds + SECONDS_BETWEEN_LOOKS
        if seconds >= (SECONDS_MISSED if seen else SECONDS_NEVER_SEEN):
            say_line("error: a rank was lost while MPI was started; the job ends: start it again")
            os.kill(launcher, signal.SIGTERM)
            os.kill(rank, signal.SIGKILL)


def _children(launcher: int) -> int | None:
    """Return the number of the launcher's children; None if it is unknown."""
    try:
        if not Path(f"/proc/{launcher}/comm").read_text().startswith(PARENTS):
            return None
        return len(Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())
    except OSError:
        return None
