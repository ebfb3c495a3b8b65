"""Checkpoints are written by a thread, from a copy of the state, while training goes on.

The copy is taken between two steps, into buffers made once. Then the thread flushes the logs to disk, writes the
checkpoint, and removes those no longer wanted; it holds Python's lock for a fraction of a millisecond at a time,
since copying apart it only hashes, writes and compares. One checkpoint is written at a time: the owner asks for the
`outcome` of one before it starts the next, and before it ends.

A checkpoint is under its name only when it is whole, and only then are older ones removed. So whatever ends the
process meanwhile, the newest that is there is intact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import Checkpoint


@dataclass(frozen=True)
class Outcome:
    """How the writing of the checkpoint after a step went: what refused it, or the removal of older ones."""

    step: int
    refused: OSError | None = None
    removal_refused: OSError | None = None


class CheckpointWriter:
    """Writes one checkpoint after another, keeping the last `keep` and the best."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Outcome] | None = None
        self._copies: dict[str, NDArray[Any]] = {}

    def start(
        self,
        folder: Path,
        arrays: Iterable[tuple[str, NDArray[Any]]],
        header: Mapping[str, Any],
        flush_logs: Callable[[], None],
    ) -> None:
        """Copy the state and let the thread write it into `folder`, once `flush_logs` has brought the logs to disk."""
        assert self._pending is None, "the outcome of the checkpoint before is not known"
        for name, array in arrays:
            if name not in self._copies:
                self._copies[name] = np.empty_like(array)
            np.copyto(self._copies[name], array)
        checkpoint = Checkpoint(self._copies, {**header, "progress": dict(header["progress"])})
        self._pending = self._thread.submit(self._write, folder, checkpoint, flush_logs)

    def outcome(self, *, wait: bool) -> Outcome | None:
        """Return, once, how the last one that was started went; None where there is none, or `wait` is false and it
        is not done.

        What the disk refuses is part of the outcome; anything else that the thread met is raised here.
        """
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return None
        outcome = None
        try:
            outcome = pending.result()
        finally:
            if outcome is not None or pending.done():  # else Ctrl-C has ended the wait
                self._pending = None
        return outcome

    def close(self) -> None:
        """End the thread, when it is done."""
        self._thread.shutdown()

    def _write(self, folder: Path, checkpoint: Checkpoint, flush_logs: Callable[[], None]) -> Outcome:
        """Write the checkpoint, then remove old ones; on the thread."""
        step, best_step = checkpoint.header["step"], checkpoint.header["progress"]["best_step"]
        try:
            flush_logs()
            checkpoints.write(checkpoints.path_of_step(folder, step), checkpoint)
        except OSError as error:
            return Outcome(step, refused=error)
        try:
            checkpoints.remove_old(folder, step, self._keep, best_step)
        except OSError as error:
            return Outcome(step, removal_refused=error)
        return Outcome(step)
