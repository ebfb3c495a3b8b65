"""``--trace FILE.json``: a timeline of all ranks for https://ui.perfetto.dev or ``chrome://tracing``.

Each rank is a process with one track, on which compute, waiting and reduction follow each other without overlap
(`timeline` defines them). The track is empty between steps, during validation and checkpoints.

The clocks of hosts differ, so all ranks read their clocks after a barrier. Of many barriers the one counts whose
slowest rank was fastest: no rank was delayed before it read its clock (D. L. Mills, *Network Time Protocol*, RFC 1305:
trust the sample with the shortest delay). The offset of a rank is its difference to rank 0; its error is at most the
duration of that barrier. Offsets are measured at the start and at the end, and interpolated, because clocks drift.

Format: *Trace Event Format*, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.engine.timing.timeline import Clock, Timeline
from distdl.parallel import Communicator

#: The newest steps that are kept, over all ranks together: about 30 MB of JSON.
MOST_STEPS = 2**16
CLOCK_ROUNDS = 40
#: The slices between the marks of a step: begin, entered the reduction, last rank entered, left it, end.
TRACK = ("compute", "waiting", "reduction", "update")

Marks = NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """A rank's clock, and its lead over rank 0's clock at that time, in seconds."""

    clock: float
    ahead: float


def read_clocks(communicator: Communicator, clock: Clock) -> Reading:
    """Return the reading of this rank's clock against rank 0's. Collective."""
    communicator.barrier()
    own = [clock()]
    for _ in range(CLOCK_ROUNDS):
        communicator.barrier()
        own.append(clock())
    everyone = np.array(communicator.allgather_json(own))  # ranks, rounds + 1
    shortest = 1 + int(np.diff(everyone, axis=1).max(axis=0).argmin())
    return Reading(own[shortest], own[shortest] - float(everyone[0, shortest]))


def on_rank_zeros_clock(times: Marks, first: Reading, last: Reading) -> Marks:
    """Convert times of a rank's clock to those of rank 0's clock.

    >>> on_rank_zeros_clock(np.array([10.0, 15.0, 20.0]), Reading(10.0, 2.0), Reading(20.0, 4.0))
    array([ 8., 12., 16.])
    """
    passed = (times - first.clock) / ((last.clock - first.clock) or 1.0)
    return np.asarray(times - (first.ahead + passed * (last.ahead - first.ahead)))


class Trace:
    """Keeps the newest steps of a timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self._communicator = timeline.communicator
        self._clock = timeline.clock
        self._steps: Marks = np.zeros((max(MOST_STEPS // self._communicator.size, 1), len(TRACK) + 1))
        self._seen = 0
        self._first = read_clocks(self._communicator, self._clock)
        timeline.on_steps = self._keep

    def _keep(self, steps: Marks) -> None:
        room = len(self._steps)
        places = (self._seen + np.arange(len(steps))) % room
        self._steps[places[-room:]] = steps[-room:]
        self._seen += len(steps)

    def gather(self, last_step: int) -> dict[str, Any] | None:
        """Return the trace of all ranks on rank 0, None on the others; `last_step` is the number of the last.

        Collective, after the timeline has compared its last steps.
        """
        communicator = self._communicator
        last = read_clocks(communicator, self._clock)
        kept = min(self._seen, len(self._steps))
        newest = self._steps[(self._seen - kept + np.arange(kept)) % len(self._steps)]
        mine = on_rank_zeros_clock(newest, self._first, last)
        everyone = np.empty((communicator.size, *mine.shape))
        counts = [mine.nbytes] * communicator.size
        everyone[communicator.rank] = mine
        communicator.allgatherv(everyone.reshape(-1).view(np.uint8), counts)
        hosts = communicator.allgather_json(socket.gethostname())
        if communicator.rank != 0:
            return None
        return chrome_trace(everyone, hosts, first_step=last_step - kept + 1, left_out=self._seen - kept)


def chrome_trace(ranks: Marks, hosts: Sequence[str], *, first_step: int, left_out: int) -> dict[str, Any]:
    """Return the trace in its format; `ranks` holds the marks (ranks, steps, marks) in seconds."""
    nanoseconds = np.rint((ranks - (ranks.min() if ranks.size else 0.0)) * 1e9).astype(np.int64)
    events: list[dict[str, Any]] = []
    for rank, (steps, host) in enumerate(zip(nanoseconds.tolist(), hosts, strict=True)):
        process, thread = {"name": f"rank {rank} on {host}"}, {"name": "training"}
        about = {"process_name": process, "thread_name": thread, "process_sort_index": {"sort_index": rank}}
        events += [{"ph": "M", "pid": rank, "tid": 0, "name": name, "args": value} for name, value in about.items()]
        events += _events(rank, steps, first_step)
    others = {"first_step": first_step, "earlier_steps_left_out": left_out}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": others}


def _events(rank: int, steps: Sequence[Sequence[int]], first_step: int) -> Iterator[dict[str, Any]]:
    """Yield the complete events of a rank in order. `steps` are in nanoseconds, the format uses microseconds."""
    for number, marks in enumerate(steps, first_step):
        for name, start, end in zip(TRACK, marks[:-1], marks[1:], strict=True):
            if end > start:
                times = {"ts": start / 1000, "dur": (end - start) / 1000}
                shown = "compute" if name == "update" else name
                yield {"ph": "X", "pid": rank, "tid": 0, "name": shown, **times, "args": {"step": number}}
