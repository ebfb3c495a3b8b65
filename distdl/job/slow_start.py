"""Say what a start waits for, if it takes longer than half a minute: no start hangs silently.

`mpirun` may wait for hosts or cores before it starts a rank. The launcher becomes `mpirun`, so a child of it watches.
It ends with `mpirun`. The ranks may wait for each other in MPI_Init (`mpi_init.py`), and later in any collective.
"""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distdl.job.launched_by import read_launch
from distdl.job.processes import Process, look_at, send_when_the_parent_dies, stopped_ranks
from distdl.job.streams import say_line

#: A start that takes longer is reported.
SECONDS_UNTIL_REPORTED = 30.0
#: A rank that waits on repeats its line, at least once a minute.
SECONDS_BETWEEN_REPORTS = 55.0
SECONDS_BETWEEN_LOOKS = 1.0
#: The columns of a command line in a message, and the number of command lines.
LONGEST_COMMAND, MOST_COMMANDS = 100, 3


class SlowStart:
    """Reports once if the launcher with this process number and command line starts no rank on this host soon."""

    def __init__(self, launcher: int, argv: Sequence[str]) -> None:
        self._launcher, self._argv = launcher, argv
        self._started = time.monotonic()
        self.over = False

    def look(self) -> None:
        """Look whether a rank runs; report if it is time. The caller repeats this until it is `over`."""
        if not self.over and runs_here(self._argv):
            self.over = True
        elif not self.over and time.monotonic() - self._started > SECONDS_UNTIL_REPORTED:
            say_line(waits_for(self._launcher))
            self.over = True


def report_a_slow_start(argv: Sequence[str]) -> None:
    """Start a process that watches this one, which becomes the launcher with this command line.

    It is a child of this process and ends with it.
    """
    launcher = os.getpid()
    if os.fork() == 0:
        try:
            send_when_the_parent_dies(signal.SIGKILL)
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1):  # a reader of our output must not wait for this process
                os.dup2(nowhere, stream)
            slow_start = SlowStart(launcher, argv)
            while os.getppid() == launcher and not slow_start.over:
                slow_start.look()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            os._exit(0)


def report_a_long_wait(waited: float) -> None:
    """Say that this rank waits. The first two ranks of a host speak, because the first may be the late one."""
    launch = read_launch()
    if launch.local_rank < 2:
        stopped = stopped_ranks(look_at(os.getppid()))
        say_line(f"rank {launch.rank} has waited for {waited:.0f} s for another rank{stopped}")


def runs_here(argv: Sequence[str]) -> bool:
    """Return whether a process of this host has the program of this launcher: a command line of the same last words."""
    line = b"".join(b"\0" + os.fsencode(word) for word in argv) + b"\0"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes()
            if words.count(b"\0") > 1 and line.endswith(b"\0" + words) and len(words) < len(line) - 1:
                return True
    return False


def waits_for(launcher: int) -> str:
    """Return a line on a launcher that has started no rank of this host, and on the processes that it waits for."""
    found = descendants(launcher)
    parents = {process.parent for process in found}
    last = [process for process in found if process.pid not in parents and process.pid != os.getpid()]
    what = [f"{_command(process.pid)} (process {process.pid})" for process in last[:MOST_COMMANDS]]
    more = f" and {len(last) - MOST_COMMANDS} more" if len(last) > MOST_COMMANDS else ""
    name = process.name if (process := look_at(launcher)) is not None else "mpirun"
    return (
        f"{name} (process {launcher}) has run for {SECONDS_UNTIL_REPORTED:.0f} s, and started no rank on host "
        f"{os.uname().nodename} yet; it waits for {', '.join(what) + more if what else 'no other process of this host'}"
    )


def descendants(pid: int) -> list[Process]:
    """Return the processes of this host below the process with this number."""
    numbers = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    processes = [process for process in map(look_at, numbers) if process is not None]
    below, found = {pid}, []
    while new := [one for one in processes if one.parent in below and one.pid not in below]:
        below |= {one.pid for one in new}
        found += new
    return found


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "a process that has ended"
    text = " ".join(words).strip()
    return text if len(text) <= LONGEST_COMMAND else f"{text[:LONGEST_COMMAND]}…"
