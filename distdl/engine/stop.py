"""Stopping when a signal asks for it: at the same step on all ranks, after a checkpoint.

SIGUSR1 is the warning that schedulers send before a job's time is up; SIGTERM, Ctrl-C (SIGINT) and the loss of the
terminal (SIGHUP, unless `nohup` has it ignored) are taken alike.
A handler only notes the signal. The note travels in the record of the next step's reduction, in a field with one
count a signal, so all ranks learn of it together, whichever of them was told; the other fields of the record keep
their bits. A rank that has no micro-batch in a step sends nothing, and what it was told waits for its next one; so
does a signal that comes during validation, a checkpoint or start-up (before there is a handler: `distdl.job.signals`).
Only Ctrl-C before the first step stops at once: there is nothing to save. A second signal stops at once too.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import NoReturn

import numpy as np

from distdl.engine.step import MutableRecord, OptimizerStep, StepObserver
from distdl.errors import Stopped
from distdl.job.signals import STOPPING as SIGNALS
from distdl.job.signals import release_signals
from distdl.parallel import Field

#: A terminal tells a process of Ctrl-C and so does the launcher: signals so close to the first are the same request.
SAME_REQUEST_SECONDS = 0.5


class StopRequest(StepObserver):
    """What signals have asked for, on this rank (`values`) and on all (`agreed`)."""

    #: What the request adds to the record of a micro-batch.
    fields = (Field("stop", "i8", len(SIGNALS)),)

    def __init__(self) -> None:
        self._heard = np.zeros(len(SIGNALS), np.int64)
        self._heard_at = 0.0
        self._stepping = False
        #: The name of the signal that stops all ranks after the current step; None if none does.
        self.agreed: str | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals while inside, in the main thread; those that a script handles or ignores stay with it."""
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
        """The name of a signal that has asked this rank, or through a step all of them, to stop; None if none has."""
        heard = [number.name for number, count in zip(SIGNALS, self._heard, strict=True) if count]
        return heard[0] if heard else self.agreed

    def micro_batch(self, step: OptimizerStep, index: int, record: MutableRecord) -> None:  # noqa: ARG002
        """Send the signals that this rank has received."""
        self._stepping = True
        record["stop"] = self._heard

    def ended(self, step: OptimizerStep) -> None:
        """Take in the signals that any rank has received."""
        told = step.total["stop"].tolist()
        self.agreed = (
            next(number.name for number, count in zip(SIGNALS, told, strict=True) if count) if any(told) else None
        )

    def stop(self, step: int) -> NoReturn:
        """Raise `Stopped`, on every rank alike; the state after `step` is saved."""
        stopped = Stopped(
            f"stopped by {self.agreed} after step {step}, which is saved: the same command with --resume goes on "
            f"(exit code {Stopped.exit_code})"
        )
        stopped.agreed = True
        raise stopped

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
