"""Callbacks: code of the user, or for the user, that gets the events of a run as records of numbers.

The coordinator alone calls them. The calls are a log of the logbook, as ``metrics.jsonl`` is: every rank keeps the
records since the last checkpoint that is known to be saved. If the coordinator is lost, the new one makes these calls.
So a callback gets each record of `on_step`, `on_epoch` and `on_checkpoint`, whichever rank is lost.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.engine.user_code import describe_error
from distdl.errors import DistdlError, UserError, one_line
from distdl.nn import Sequential
from distdl.parallel import alone

if TYPE_CHECKING:
    from distdl.engine.trainer import Trainer


@dataclass(frozen=True, eq=False)
class Run:
    """What a callback may read, and must not change."""

    folder: Path
    """The run folder."""
    config: TrainConfig
    """The settings, with all defaults filled in."""
    network: Sequential
    """The replica of this rank; its weights are those after the latest step."""
    data: PreparedDataset
    """The dataset, its parts and its normalization."""
    steps_per_epoch: int


class Callback:
    """Gets the events of a run. Override the methods that you need, and give an object to `distdl.train(callbacks=…)`.

    Every rank creates the object, but only the coordinator, rank 0, calls it. The other ranks wait meanwhile at their
    next exchange. So a method should be quick. `distdl.load`, predictions and `distdl.train` in it use this rank alone.

    A record holds numbers by name. It has the same bits on any number of ranks, except for times.

    If the coordinator is lost and other ranks continue, the object of another rank gets `on_start` with the step of a
    checkpoint, and then all records since that step again, in their order. A resume does the same. So a callback that
    stores records does two things:

    - in `on_checkpoint` it brings all records to the disk;
    - in `on_start` it removes the stored records of later steps.

    An exception ends the job with one line. The last checkpoint stays.

    >>> class Losses(Callback):
    ...     def on_start(self, record):
    ...         self.losses = []
    ...     def on_epoch(self, record):
    ...         self.losses.append(record["validation_loss"])
    """

    run: Run
    """Set before the first call."""

    def on_start(self, record: Mapping[str, Any]) -> None:
        """React to the start. Record: ``step``, the steps taken before; records of later steps have no effect."""

    def on_step(self, record: Mapping[str, Any]) -> None:
        """React to a step.

        Record: ``step`` and ``epoch``, both from 1, ``loss``, ``accuracy`` (not for regression) and ``lr``. A step
        without an update (``--on-nonfinite skip``) has ``micro_batch`` and ``skipped_steps`` instead of the last three.
        """

    def on_epoch(self, record: Mapping[str, Any]) -> None:
        """React to the end of an epoch, after its validation.

        Record: ``step``, ``epoch``, ``train_loss``, ``train_accuracy``, ``validation_loss``, ``validation_accuracy``;
        regression has no accuracies.
        """

    def on_checkpoint(self, record: Mapping[str, Any]) -> None:
        """React to a checkpoint, which a thread may still be writing. Record: ``step``."""

    def on_recovery(self, record: Mapping[str, Any]) -> None:
        """React to a recovery. Record: ``step``, ``lost_ranks``, ``ranks`` that continue, ``seconds``.

        This call is made once, by the coordinator of that time. The record of `on_end` lists all recoveries.
        """

    def on_end(self, record: Mapping[str, Any]) -> None:
        """React to the end of the training, also if a signal has stopped it.

        Record: the content of ``summary.json``.
        """


class Calls:
    """The callbacks of a run as a log of the logbook: a record that is appended becomes a call.

    On other ranks than the coordinator it is never opened, and calls nothing.
    """

    path = Path("callbacks")
    sha256 = ""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self.callbacks = tuple(callbacks)
        self.length = 0
        self._trainer: Trainer | None = None
        self._has_started = self._has_ended = False

    @classmethod
    def of(cls, given: Sequence[Callback], added: Sequence[Callback] = ()) -> Calls:
        """Return the calls of the given and the added callbacks; raise `UserError` for an object of another class."""
        if not isinstance(given, Iterable):
            raise UserError(f"callbacks is an object of {type(given).__name__}: expected a list, such as [Losses()]")
        callbacks = [*given, *added]
        for one in callbacks:
            if not isinstance(one, Callback):
                what = f"the class {one.__name__}" if isinstance(one, type) else f"an object of {type(one).__name__}"
                raise UserError(f"a callback is {what}: expected an object of a subclass of distdl.Callback")
        return cls(callbacks)

    def attach(self, trainer: Trainer) -> None:
        """Take the run from its trainer, before the logbook opens its files."""
        self._trainer = trainer

    def opened(self, folder: Path, length: int) -> Calls:
        """Prepare for the calls, on the coordinator; `length` bytes of records precede them."""
        trainer, self.length = self._trainer, length
        assert trainer is not None
        run = Run(folder, trainer.config, trainer.state.network, trainer.data, trainer.steps_per_epoch)
        for callback in self.callbacks:
            callback.run = run
        return self

    def append(self, lines: bytes) -> None:
        """Make the call of each line. Raises `UserError` if a callback raises an exception."""
        self.length += len(lines)
        for line in lines.splitlines():
            call = json.loads(line)
            event = call["call"] if self._has_started else "on_start"  # after a takeover the first is a checkpoint's
            self._has_started = True
            self.make(event, call["record"])

    def make(self, event: str, record: Mapping[str, Any]) -> None:
        """Call the method `event` of each callback; `on_end` only once. Raises `UserError`."""
        if event == "on_end":
            if self._has_ended:
                return
            self._has_ended = True
        for callback in self.callbacks:
            try:
                with alone():
                    getattr(callback, event)(dict(record))
            except (DistdlError, MemoryError):
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001  the user's code may raise anything
                file = getattr(sys.modules.get(type(callback).__module__), "__file__", None)
                what = one_line(describe_error(error, file))
                raise UserError(
                    f"the callback {type(callback).__name__}.{event} raised {what}: fix it, and continue with --resume"
                ) from None

    def flush_to_disk(self) -> None:
        """Do nothing: callbacks store their own records."""

    def close(self) -> None:
        """Do nothing: `on_end` was the last call."""
