"""The watchdog: says which rank is late when nothing moves any more, and what that rank is doing.

A job that hangs shows nothing: one rank waits for a disk or loops for ever, the others wait for it. So every rank has
a thread that looks once a second whether the rank has done anything since: steps, and micro-batches within them.
Whether it waits for others shows in its stack, which is then inside of a collective call. Each thread writes what it
sees into a page that the ranks of a host share. Once a rank has done nothing for the seconds that were given, those
who do not wait print where they are; of those who wait, the lowest rank of each host names who is late. They do so
again after twice that time, four times, and so on, and say when it goes on.

The training does nothing for this but count. The threads end with the training, and with the process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import numpy as np

from distdl.job.processes import look_at
from distdl.job.streams import say
from distdl.parallel import Communicator
from distdl.parallel.shared import shared_bytes

SECONDS_BETWEEN_LOOKS = 1.0
#: The module whose functions a rank is in while it waits for others.
WHERE_RANKS_WAIT = "distdl.parallel.mpi"
#: A watchdog that has not looked for so long was held up itself: its process was stopped, or never let go of Python.
SECONDS_TO_RESPOND = 10.0
#: What a rank tells its host. The clock is that of the host.
SLOT = np.dtype([(name, "i8") for name in ("rank", "pid", "started", "steps", "waits")] + [("looked", "f8")])
#: States of a process (`Process.state`) that explain why it is late.
STATES = {"T": "stopped by a signal", "t": "held by a debugger", "D": "waits for a disk"}

#: Ends a line below which a stack follows.
HERE = "it is here:"

#: One such record.
Slot = np.void
#: What a rank has done: its steps, and a count that moves within a step.
Progress = Callable[[], tuple[int, int]]


class Watchdog:
    """Watches the training of the thread that makes it, while it is entered; with 0 seconds it does not.

    Making one is collective, and raises `UserError` on every rank where a host has no room for the shared page.
    `progress` is what is known of this rank's work; it is replaced when the work begins.
    """

    def __init__(self, communicator: Communicator, stall_seconds: float) -> None:
        self.progress: Progress = lambda: (0, 0)
        self._stall_seconds = stall_seconds
        self._watched_thread = threading.get_ident()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if not stall_seconds:
            return
        host = communicator.host()
        self._whole_world = host.size == communicator.size
        self._page = shared_bytes(communicator, host, SLOT.itemsize * host.size, "the watchdog").view(SLOT)
        self._own = self._page[host.rank : host.rank + 1]
        this = look_at(os.getpid())
        assert this is not None
        self._own["rank"], self._own["started"], self._own["waits"] = communicator.rank, this.started, True
        self._own["pid"] = this.pid
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(SECONDS_TO_RESPOND)  # not for ever: it may be printing to somebody who does not read

    def _watch(self) -> None:
        rank = int(self._own["rank"][0])
        pause = min(SECONDS_BETWEEN_LOOKS, max(self._stall_seconds / 4, 0.05))
        done = self.progress()
        looked = moved = time.monotonic()
        due = moved + self._stall_seconds
        has_spoken = False
        over = False
        while not over:
            over = self._over.wait(pause)
            now, before, done = time.monotonic(), done, self.progress()
            self._own["steps"], self._own["waits"], self._own["looked"] = done[0], waits(self._watched_thread), now
            if done != before:
                if has_spoken:
                    say(f"[rank {rank}] goes on after {now - moved:.0f} s\n")
                moved, due, has_spoken = now, now + self._stall_seconds, False
            elif over:
                break
            elif now - looked > SECONDS_TO_RESPOND:  # this process, perhaps the whole job, was stopped meanwhile
                due = now + self._stall_seconds
            elif now >= due:
                others = [one for one in self._page if one["pid"] and one["rank"] != rank]
                lines = what_to_say(self._own[0], others, now - moved, now, whole_world=self._whole_world)
                if lines and lines[-1].endswith(HERE):
                    frame = sys._current_frames().get(self._watched_thread)
                    lines += "".join(traceback.format_stack(frame)).splitlines()
                say("".join(f"[rank {rank}] {line}\n" for line in lines))
                has_spoken |= bool(lines)
                due = now + (now - moved)
            looked = now


def what_to_say(own: Slot, others: Sequence[Slot], seconds: float, now: float, *, whole_world: bool) -> list[str]:
    """Return the lines of a rank that has done nothing for some seconds; none where another one says the same.

    If the last of them ends with `HERE`, its stack is to follow.
    """
    after = f"after {own['steps']} step{'s' if own['steps'] != 1 else ''}"
    if not own["waits"]:
        return [f"has done nothing for {seconds:.0f} s, {after}; {HERE}"]
    processes = [look_at(int(one["pid"])) for one in others]
    waiting, late, gone = [], [], []
    for one, process in zip(others, processes, strict=True):
        name = f"rank {one['rank']} (process {one['pid']}"
        if process is None or process.started != one["started"]:
            gone.append(f"{name}, which is gone)")
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
    return [f"{waited}, as all ranks do, each for another; {HERE}"]


def waits(thread: int) -> bool:
    """Return whether a thread is inside of a collective call, where it waits for other ranks."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_globals.get("__name__") != WHERE_RANKS_WAIT:
        frame = frame.f_back
    return frame is not None
