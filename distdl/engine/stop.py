"""Stopping at a signal: at the same step on all ranks, after a checkpoint (`docs/processes.md`, "Signals").

A handler only notes the signal. The note travels in the record of the next step's reduction, in a field with one count
per signal. So all ranks learn of it in the same step, even if only one rank got the signal. A signal outside of a step,
or on a rank without a micro-batch, waits for the rank's next micro-batch.

While the data is prepared there is nothing to save: a signal interrupts rank 0, and all ranks stop (`on_rank_0`). Two
signals stop at once: Ctrl-C before the first step, and a second signal.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import TypeVar

import numpy as np

from distdl.engine.step import OptimizerStep, StepObserver
from distdl.errors import Stopped
from distdl.job.held_signals import STOPPING as SIGNALS
from distdl.job.held_signals import release_signals
from distdl.parallel import Communicator, Field, Record, on_rank_0

T = TypeVar("T")
#: Both the terminal and the launcher send Ctrl-C to a process: signals within this time are the same request.
SAME_REQUEST_SECONDS = 0.5


class _Interrupted(BaseException):
    """A signal interrupts the work of rank 0. It is no `Exception`, which the readers of images take for damage."""


class StopRequest(StepObserver):
    """The signals received on this rank, and the signal that all ranks have agreed to obey (`agreed`)."""

    #: The fields that the request adds to the record of a micro-batch.
    fields = (Field("stop", "i8", len(SIGNALS)),)

    def __init__(self) -> None:
        self._heard = np.zeros(len(SIGNALS), np.int64)
        self._heard_at = 0.0
        self._stepping = False
        self._interrupts = False
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

    def on_rank_0(self, communicator: Communicator, work: Callable[[], T]) -> T | None:
        """Call `work` on rank 0 before the first step and return its result there, None elsewhere. Collective.

        A signal to rank 0 interrupts the work. If a rank has received a signal, all ranks raise `Stopped`.
        """

        def interruptible() -> T | None:
            try:
                try:
                    self._interrupts = True
                    return None if self.asked else work()
                finally:
                    self._interrupts = False
            except _Interrupted:
                return None

        result = on_rank_0(communicator, interruptible)
        self.stop_if_asked(communicator)
        return result

    def stop_if_asked(self, communicator: Communicator) -> None:
        """Raise `Stopped` on all ranks if any has received a signal; nothing is saved. Collective."""
        asked = next(filter(None, communicator.allgather_json(self.asked)), None)
        if asked is not None:
            raise Stopped(
                f"stopped by {asked} before the first step; nothing was saved (exit code {Stopped.exit_code})",
                agreed=True,
            )

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
            raise KeyboardInterrupt("before the first step")
        self._heard_at = now
        self._heard[SIGNALS.index(signal.Signals(number))] = 1
        if self._interrupts:
            raise _Interrupted


def _first(counts: Iterable[np.int64]) -> str | None:
    """Return the name of the first signal with a count; None without one."""
    return next((number.name for number, count in zip(SIGNALS, counts, strict=True) if count), None)
