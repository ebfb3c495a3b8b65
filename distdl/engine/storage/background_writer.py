"""A thread that writes checkpoints from a copy of the state while training continues.

The copy is made between two steps, into buffers allocated once. Then the thread flushes the logs to disk, writes the
checkpoint, and removes old ones. One checkpoint is written at a time: the owner asks for the `outcome` of each before
it starts the next, and before it ends. A checkpoint gets its name when it is complete, and older ones are removed only
then. So the newest checkpoint is intact, at whatever moment the process ends.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.engine.fault_injection import fault_point
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import Checkpoint
from distdl.engine.storage.header import CheckpointHeader


@dataclass(frozen=True)
class Outcome:
    """The outcome of writing one checkpoint, with the error of the write or of the removal of older ones."""

    step: int
    refused: OSError | None = None
    removal_refused: OSError | None = None


class CheckpointWriter:
    """Writes checkpoints one at a time; keeps the last `keep` and the best."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Outcome] | None = None
        self._copies: dict[str, NDArray[Any]] = {}

    def start(
        self,
        folder: Path,
        arrays: Iterable[tuple[str, NDArray[Any]]],
        header: CheckpointHeader,
        flush_logs: Callable[[], None],
    ) -> None:
        """Copy the state, and let the thread write it into `folder` after `flush_logs`."""
        assert self._pending is None, "ask for the outcome of the previous checkpoint first"
        for name, array in arrays:
            if name not in self._copies:
                self._copies[name] = np.empty_like(array)
            np.copyto(self._copies[name], array)
        checkpoint, best_step = Checkpoint(self._copies, header.to_json()), header.progress.best_step
        self._pending = self._thread.submit(self._write, folder, checkpoint, header.step, best_step, flush_logs)

    def outcome(self, *, wait: bool) -> Outcome | None:
        """Return, once, the outcome of the checkpoint that was started last; None if no checkpoint was started.

        Without `wait`, None also if it is not done. Exceptions of the thread are raised here, except an `OSError`.
        """
        pending = self._pending
        if pending is None or not (wait or pending.done()):
            return None
        outcome = None
        try:
            outcome = pending.result()
        finally:
            if outcome is not None or pending.done():  # otherwise Ctrl-C ended the wait
                self._pending = None
        return outcome

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._thread.shutdown()

    def _write(
        self, folder: Path, checkpoint: Checkpoint, step: int, best_step: int | None, flush_logs: Callable[[], None]
    ) -> Outcome:
        """Write the checkpoint, then remove old ones. Runs on the thread."""
        try:
            fault_point("checkpoint-write")
            flush_logs()
            checkpoints.write(checkpoints.path_of_step(folder, step), checkpoint)
        except OSError as error:
            return Outcome(step, refused=error)
        try:
            checkpoints.remove_old(folder, step, self._keep, best_step)
        except OSError as error:
            return Outcome(step, removal_refused=error)
        fault_point("checkpoint-write", when="after")
        return Outcome(step)
