"""What Linux says of the processes of this machine, in ``/proc``: whether one lives, what it is, whose child it is.

A number may be given to another process once its owner is gone, so a process is known by its number and the moment
it was started.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Process:
    """A process that lived when it was looked at."""

    pid: int
    name: str
    """Of its program, the first 15 characters."""
    state: str
    """One letter: R runs, S sleeps, D waits for a disk, T was stopped …"""
    parent: int
    started: int
    """Clock ticks from the start of the machine."""

    @property
    def lives(self) -> bool:
        """Whether it has not ended since."""
        now = look_at(self.pid)
        return now is not None and now.started == self.started


def look_at(pid: int) -> Process | None:
    """Return the process of that number; None where there is none, or one that has ended and awaits its burial.

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


def ancestors() -> Iterator[Process]:
    """Yield the parent of this process, its parent, and so on, as far as they can be seen."""
    process = look_at(os.getppid())
    while process is not None:
        yield process
        process = look_at(process.parent)


def send_when_the_parent_dies(signal_number: int) -> None:
    """Ask the kernel to send this process a signal when its parent ends; the next program it becomes keeps that."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
