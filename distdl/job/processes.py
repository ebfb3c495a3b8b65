"""The processes of this host as Linux shows them in ``/proc``: whether one lives, its program, its parent.

Linux may reuse the number of an ended process. So a process is identified by its number and its start time.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Process:
    """A process that lived at the time of `look_at`."""

    pid: int
    name: str
    """The first 15 characters of its program's name."""
    state: str
    """One letter: R running, S sleeping, D waiting for a disk, T stopped …"""
    parent: int
    started: int
    """Clock ticks from the start of the machine."""

    @property
    def lives(self) -> bool:
        """Whether it still lives."""
        now = look_at(self.pid)
        return now is not None and now.started == self.started


def look_at(pid: int) -> Process | None:
    """Return the process with that number; None if it does not exist, or is a zombie process.

    >>> look_at(os.getpid()).parent == os.getppid()
    True
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")  # a name may hold brackets
    fields = rest.split()
    if fields[0] in "ZX":
        return None
    return Process(pid, name, fields[0], int(fields[1]), int(fields[19]))


@cache
def boot_id() -> str:
    """Return a text that only the processes of one running kernel share; raise `OSError` without ``/proc``."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def here() -> str:
    """Return a text that only processes share that see each other's numbers; empty if ``/proc`` does not tell.

    Containers may share a folder, and each has a process number 1. So a number alone names no process.
    """
    with suppress(OSError):
        return f"{boot_id()} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def ancestors() -> Iterator[Process]:
    """Yield the parent of this process, its parent, and so on, as far as ``/proc`` shows them."""
    process = look_at(os.getppid())
    while process is not None:
        yield process
        process = look_at(process.parent)


def children(parent: Process) -> list[Process]:
    """Return the living children of a process; raise `OSError` if ``/proc`` does not show them."""
    numbers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    return [process for process in map(look_at, map(int, numbers)) if process is not None]


def stopped_ranks(launcher: Process | None) -> str:
    """Return a text that names the stopped children of the ranks' parent on this host; empty if none is stopped."""
    with suppress(OSError):
        stopped = [] if launcher is None else [one for one in children(launcher) if one.state in "Tt"]
        if stopped:
            return f"; stopped on host {os.uname().nodename}: process {', '.join(str(one.pid) for one in stopped)}"
    return ""


def send_when_the_parent_dies(signal_number: int) -> None:
    """Ask the kernel to send this process a signal when its parent ends; this also holds after an `exec`."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
