"""The watchdog: when a job makes no progress, it names the late rank, and later shows where that rank is.

In every rank a thread checks once a second whether the rank has done anything since: steps, and micro-batches within
them. It writes the result into memory that the ranks of a host share. It looks at the rank's stack: inside a collective
call, the rank waits for others. `docs/processes.md` ("Hangs") describes the messages.

The training does nothing for this but count. The threads end with the training, and with the process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from distdl.job.processes import look_at
from distdl.job.slow_start import SECONDS_BETWEEN_REPORTS, SECONDS_UNTIL_REPORTED
from distdl.job.streams import say
from distdl.parallel import Communicator
from distdl.parallel.shared import shared_bytes

SECONDS_BETWEEN_LOOKS = 1.0
#: A rank that waits for others is inside a function of this module.
WHERE_RANKS_WAIT = "distdl.parallel.mpi"
#: A watchdog that has not looked for this time was blocked: its process was stopped, or kept the interpreter's lock.
SECONDS_TO_RESPOND = 10.0
#: The record of a rank in the shared memory of its host; `looked` is a time on the host's clock.
SLOT = np.dtype([(name, "i8") for name in ("rank", "pid", "started", "steps", "waits")] + [("looked", "f8")])
#: States of a process (`Process.state`) that explain its lateness.
STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a disk"}
#: The end of a line that a stack follows.
HERE = "it is here:"

#: One record of dtype `SLOT`.
Slot = np.void
#: A function that returns a rank's number of steps, and a count that grows within a step.
Progress = Callable[[], tuple[int, int]]


class Watchdog:
    """Inside its ``with`` block, watches the training of the thread that created it; 0 seconds turn it off.

    The constructor is collective. It raises `UserError` on every rank if a host has no room for the shared memory.
    `progress` returns the work of this rank so far; set it when the work begins.
    """

    def __init__(self, communicator: Communicator, stall_seconds: float) -> None:
        self.progress: Progress = lambda: (0, 0)
        self._stall_seconds = stall_seconds
        self._waiting = communicator.waiting
        self._watched_thread = threading.get_ident()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if not stall_seconds:
            return
        host = communicator.host()
        self._whole_world = host.size == communicator.size
        self._slots = shared_bytes(communicator, host, SLOT.itemsize * host.size, "the watchdog").view(SLOT)
        self._own = self._slots[host.rank : host.rank + 1]
        this = look_at(os.getpid())
        assert this is not None
        self._own["rank"], self._own["started"], self._own["waits"] = communicator.rank, this.started, True
        self._own["pid"] = this.pid
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._thread is not None:
            self._thread.start()
            self._waiting.reports = False
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._waiting.reports = True
        if self._thread is not None:
            self._thread.join(SECONDS_TO_RESPOND)  # not forever: nobody may be reading its output

    @contextmanager
    def watching(self, progress: Progress) -> Iterator[None]:
        """Watch other work inside the ``with`` block, such as a proof before the training begins."""
        before, self.progress = self.progress, progress
        try:
            yield
        finally:
            self.progress = before

    def _watch(self) -> None:
        rank = int(self._own["rank"][0])
        pause = min(SECONDS_BETWEEN_LOOKS, max(self._stall_seconds / 4, 0.05))
        done = self.progress()
        looked = moved = time.monotonic()
        due, line_due = moved + self._stall_seconds, moved + SECONDS_UNTIL_REPORTED
        has_printed = False
        over = False
        while not over:
            over = self._over.wait(pause)
            now, before, done = time.monotonic(), done, self.progress()
            self._own["steps"], self._own["waits"], self._own["looked"] = done[0], waits(self._watched_thread), now
            if done != before:
                if has_printed:
                    say(f"[rank {rank}] continues after {now - moved:.0f} s\n")
                moved, has_printed = now, False
                due, line_due = now + self._stall_seconds, now + SECONDS_UNTIL_REPORTED
            elif over:
                break
            elif now - looked > SECONDS_TO_RESPOND:  # the process was stopped meanwhile, perhaps with the whole job
                due, line_due = now + self._stall_seconds, now + SECONDS_UNTIL_REPORTED
            elif now >= min(due, line_due):
                with_stack = now >= due
                others = [one for one in self._slots if one["pid"] and one["rank"] != rank]
                own, seconds, whole_world = self._own[0], now - moved, self._whole_world
                lines = stall_message(own, others, seconds, now, whole_world=whole_world, with_stack=with_stack)
                if lines and lines[-1].endswith(HERE):
                    frame = sys._current_frames().get(self._watched_thread)
                    lines += "".join(traceback.format_stack(frame)).splitlines()
                say("".join(f"[rank {rank}] {line}\n" for line in lines))
                has_printed |= bool(lines)
                due = now + seconds if with_stack else due
                line_due = now + SECONDS_BETWEEN_REPORTS
            looked = now


def stall_message(
    own: Slot, others: Sequence[Slot], seconds: float, now: float, *, whole_world: bool, with_stack: bool
) -> list[str]:
    """Return the lines that a rank without progress prints; none if another rank prints the same.

    If the last line ends with `HERE`, the rank's stack must follow; without `with_stack` no line does.
    """
    after = f"after {own['steps']} step{'s' if own['steps'] != 1 else ''}"
    if not own["waits"]:
        return [f"has done nothing for {seconds:.0f} s, {after}; {HERE}"] if with_stack else []
    processes = [look_at(int(one["pid"])) for one in others]
    waiting, late, gone = [], [], []
    for one, process in zip(others, processes, strict=True):
        name = f"rank {one['rank']} (process {one['pid']}"
        if process is None or process.started != one["started"]:
            gone.append(f"{name}, which has ended)")
        elif process.state in STATES:
            late.append(f"{name}, {STATES[process.state]})")
        elif now - one["looked"] > SECONDS_TO_RESPOND:
            late.append(f"{name}, which does not respond)")
        elif not one["waits"]:
            late.append(f"{name}, busy after {one['steps']})")
        else:
            waiting.append(one["rank"])
    is_first = all(own["rank"] < rank for rank in waiting)
    waited = f"has waited for {seconds:.0f} s, {after}"
    if late or (gone and whole_world):
        return [f"{waited}, for {' and '.join(late or gone)}"] if is_first else []
    if not whole_world:
        return [f"{waited}, for a rank of another host; none of this host is late"] if is_first else []
    if with_stack:
        return [f"{waited}, as all ranks do, each for another; {HERE}"]
    return [f"{waited}, as all ranks do, each for another"] if is_first else []


def waits(thread: int) -> bool:
    """Return whether a thread waits for other ranks, inside a collective call."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_globals.get("__name__") != WHERE_RANKS_WAIT:
        frame = frame.f_back
    return frame is not None
