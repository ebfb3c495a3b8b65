"""Stopping at a signal: at the same step on all ranks, after a checkpoint (`docs/processes.md`, "Signals").

A handler only notes the signal. The note travels in the record of the next step's reduction, in a field with one count
per signal. So all ranks learn of it in the same step, even if only one rank got the signal. A signal outside of a step,
or on a rank without a micro-batch, waits for the rank's next micro-batch.

Two signals stop at once: Ctrl-C before the first step, because there is nothing to save, and a second signal.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

import numpy as np

from distdl.engine.step import OptimizerStep, StepObserver
from distdl.errors import Stopped
from distdl.job.held_signals import STOPPING as SIGNALS
from distdl.job.held_signals import release_signals
from distdl.parallel import Field, Record

#: Both the terminal and the launcher send Ctrl-C to a process: signals within this time are the same request.
SAME_REQUEST_SECONDS = 0.5


class StopRequest(StepObserver):
    """The signals received on this rank, and the signal that all ranks have agreed to obey (`agreed`)."""

    #: The fields that the request adds to the record of a micro-batch.
    fields = (Field("stop", "i8", len(SIGNALS)),)

    def __init__(self) -> None:
        self._heard = np.zeros(len(SIGNALS), np.int64)
        self._heard_at = 0.0
        self._stepping = False
        #: The name of the signal that stops all ranks after the current step; None if none does.
        self.agreed: str | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals inside the ``with`` block, if this is the main thread.

        Signals that a script handles or ignores are left alone.
        """
        before = {}
        handles = threading.current_thread() is threading.main_thread()
        if handles:
            for number in SIGNALS:
                if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:
                    before[number] = signal.signal(number, self._hear)
        try:
            with release_signals() if handles else nullcontext():
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def asked(self) -> str | None:
        """The name of a signal that has asked this rank, or all ranks in an earlier step, to stop; None without one."""
        return _first(self._heard) or self.agreed

    def micro_batch_done(self, step: OptimizerStep, index: int, record: Record) -> None:  # noqa: ARG002
        """Send the signals that this rank has received."""
        self._stepping = True
        record["stop"] = self._heard

    def end(self, step: OptimizerStep) -> None:
        """Read the signals that any rank has received."""
        self.agreed = _first(step.total["stop"])

    def error(self, step: int) -> Stopped:
        """Return the error that every rank raises; the state after `step` has been saved."""
        return Stopped(
            f"stopped by {self.agreed} after step {step}, which is saved (exit code {Stopped.exit_code})", agreed=True
        )

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        now = time.monotonic()
        if self._heard.any():
            if now - self._heard_at < SAME_REQUEST_SECONDS:
                return
            raise KeyboardInterrupt(f"{signal.Signals(number).name}, the second signal to stop")
        if number == signal.SIGINT and not self._stepping:
            raise KeyboardInterrupt
        self._heard_at = now
        self._heard[SIGNALS.index(signal.Signals(number))] = 1


def _first(counts: Iterable[np.int64]) -> str | None:
    """Return the name of the first signal with a count; None without one."""
    return next((number.name for number, count in zip(SIGNALS, counts, strict=True) if count), None)
