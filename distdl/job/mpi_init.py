"""Watch the start of MPI: end the job if a rank of this host dies meanwhile, and report a start that takes long.

In MPI_Init the ranks wait for each other, and forever for a dead one. A launcher that lets survivors continue does not
end the job either, nor does `srun`, and MPICH's launcher may hang. So during MPI_Init a process beside this rank
watches it and all ranks of its host, which are children of the same launcher.

If the interconnect fails meanwhile, nobody learns of it. So the start has a time limit.
"""

import os
import re
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from distdl.job.held_signals import HELD
from distdl.job.launched_by import Launch, ranks_of_this_host, read_launch
from distdl.job.lifeline import LAUNCHERS, STEP_DAEMONS
from distdl.job.lost_ranks import cancel_the_step
from distdl.job.probes import SHARED_MEMORY
from distdl.job.processes import Process, ancestors, children, look_at, stopped_ranks
from distdl.job.slow_start import SECONDS_UNTIL_REPORTED
from distdl.job.streams import say_line

SECONDS_BETWEEN_LOOKS = 0.25
#: The launcher gets this time to pass on a message before it is told to end.
SECONDS_TO_PASS_ON = 1.0
#: Time from the death of this rank to the end of the job. Most launchers end it themselves, within a second.
SECONDS_FOR_THE_LAUNCHER = 2.0
#: Time until another missing rank ends the job. It may have died after its own start, which this rank is about to
#: complete.
SECONDS_MISSED = 3.0
#: The same for a rank that was never seen: the launcher may not have started it yet.
SECONDS_NEVER_SEEN = 10.0
#: A start that takes longer ends the job. With thousands of ranks and a slow file system, the last may be minutes late.
SECONDS_TO_START = 600.0
#: A signal that asks the job to end waits for the training. If the start lasts this much longer, it ends the job.
SECONDS_SIGNALLED = 10.0
#: A launcher that has not ended after SIGTERM is killed after this time: MPICH's may spin.
SECONDS_TO_END = 5.0
#: The rank tells its watcher that MPI has started.
STARTED = b"s"
#: The first letters of the names of programs that are parents of ranks: Open MPI's, MPICH's, Slurm's.
PARENTS = ("prte", "mpirun", "mpiexec", "hydra_pmi_proxy", *STEP_DAEMONS)
#: Those that may let the other ranks wait for one that died in MPI_Init. MPICH's ends them at once.
LET_OTHERS_WAIT = ("prte", "mpirun", *STEP_DAEMONS)
LOST = "a rank was lost while MPI was started"


@contextmanager
def end_the_job_if_a_rank_dies() -> Iterator[None]:
    """End the job if a rank of this host dies during the ``with`` block and the launcher does not end it.

    A separate process watches, because no other thread of this process runs during MPI_Init.
    """
    launcher, rank = look_at(os.getppid()), look_at(os.getpid())
    assert rank is not None
    ended, end = os.pipe()
    watcher = os.fork()
    if watcher == 0:
        try:
            # The connection to MPICH's launcher must end with the rank, not with its watcher.
            os.closerange(3, ended)
            os.closerange(ended + 1, os.sysconf("SC_OPEN_MAX"))
            _watch(ended, launcher, rank)
        finally:
            os._exit(0)
    os.close(ended)
    try:
        yield
    finally:
        with suppress(OSError):  # somebody has killed the watcher
            os.write(end, STARTED)
        os.close(end)
        os.waitpid(watcher, 0)


def end_the_job_on_other_hosts(launch: Launch) -> None:
    """Let MPICH's launcher or Slurm end the job: this host cannot start MPI, and ranks of other hosts wait for it."""
    if launch.size <= ranks_of_this_host() or not ranks_of_this_host():
        return
    time.sleep(SECONDS_TO_PASS_ON)
    launcher = next((process for process in ancestors() if process.name in LAUNCHERS), None)
    if launcher is not None and launcher.name in STEP_DAEMONS:
        cancel_the_step()
    elif launcher is not None:
        os.kill(launcher.pid, signal.SIGTERM)


def _watch(ended: int, launcher: Process | None, rank: Process) -> None:
    """Watch until the rank tells through the pipe `ended` that MPI has started."""
    expected = ranks_of_this_host()
    seen, missed, signalled, waited, due = False, 0.0, 0.0, 0.0, SECONDS_UNTIL_REPORTED
    while not select.select([ended], [], [], SECONDS_BETWEEN_LOOKS)[0]:
        waited += SECONDS_BETWEEN_LOOKS
        living = _children(launcher)
        if waited >= due:
            due += SECONDS_UNTIL_REPORTED
            report(waited, launcher, living, expected)
        signalled = signalled + SECONDS_BETWEEN_LOOKS if _is_signalled(rank) else 0.0
        if signalled >= SECONDS_SIGNALLED:
            _end_the_job(launcher, rank, "a signal asks the job to end, and MPI does not start")
        if waited >= SECONDS_TO_START:
            _end_the_job(launcher, rank, f"MPI has not started within {SECONDS_TO_START:.0f} s")
        if living is None or not expected:
            continue
        seen = seen or living >= expected
        missed = 0.0 if living >= expected else missed + SECONDS_BETWEEN_LOOKS
        if missed >= (SECONDS_MISSED if seen else SECONDS_NEVER_SEEN):
            _end_the_job(launcher, rank, LOST)
    is_dead = os.read(ended, 1) != STARTED
    if is_dead and launcher is not None and launcher.name.startswith(LET_OTHERS_WAIT):
        time.sleep(SECONDS_FOR_THE_LAUNCHER)
        _end_the_job(launcher, rank, LOST)


def _end_the_job(launcher: Process | None, rank: Process, why: str) -> NoReturn:
    """End the launcher of this host, this rank, and this process."""
    if launcher is not None and launcher.lives:
        say_line(f"error: {why}; the job ends: start it again")
    if launcher is None or not launcher.name.startswith(PARENTS):
        _send(signal.SIGKILL, rank)
    elif launcher.name in STEP_DAEMONS:
        cancel_the_step()
        _send(signal.SIGKILL, rank)
    else:
        _send(signal.SIGTERM, launcher)
        _send(signal.SIGKILL, rank)
        time.sleep(SECONDS_TO_END)
        _send(signal.SIGKILL, launcher)
    os._exit(0)


def _is_signalled(rank: Process) -> bool:
    """Return whether a signal that asks the job to end waits for this rank (`held_signals.py`)."""
    try:
        found = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{rank.pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    pending = int(found[1], 16) if found else 0
    return any(pending >> (number - 1) & 1 for number in HELD - {signal.SIGUSR1})


def _send(number: int, process: Process) -> None:
    if process.lives:
        os.kill(process.pid, number)


def report(waited: float, launcher: Process | None, living: int | None, expected: int) -> None:
    """Say what a rank waits for. The first two of a host speak, because the first may be the late one."""
    launch, host = read_launch(), os.uname().nodename
    if launch.local_rank > 1:
        return
    where = ""
    if living is not None and expected:
        late = "one is late, or another host" if living >= expected else "the others are late or lost"
        where = f": {min(living, expected)} of {expected} ranks of host {host} live, {late}{stopped_ranks(launcher)}"
    if _has_a_dev_shm_of_its_own(launcher):
        where += f"; the ranks of host {host} have different {SHARED_MEMORY}, and MPI needs one for all"
    say_line(f"rank {launch.rank} has waited for {waited:.0f} s for the start of MPI (MPI_Init) on all ranks{where}")


def _has_a_dev_shm_of_its_own(launcher: Process | None) -> bool:
    """Return whether another rank of this host sees another folder there, as in a container of its own."""
    with suppress(OSError):
        own = SHARED_MEMORY.stat().st_dev
        others = [] if launcher is None or not launcher.name.startswith(PARENTS) else children(launcher)
        return any(Path(f"/proc/{one.pid}/root{SHARED_MEMORY}").stat().st_dev != own for one in others)
    return False


def _children(launcher: Process | None) -> int | None:
    """Return the number of the launcher's children; None if it is unknown."""
    if launcher is None or not launcher.lives or not launcher.name.startswith(PARENTS):
        return None
    try:
        return len(children(launcher))
    except OSError:
        return None
