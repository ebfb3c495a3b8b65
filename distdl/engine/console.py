"""The console: the text that a run prints. Only the coordinator prints.

It prints plain lines. In one process on a terminal it also keeps a live line below them. Under a launcher nobody can
tell whether a pipe leads to a terminal. A full disk costs only the lines that do not fit. If nobody reads any longer
(a closed pipe, a lost terminal under `nohup`), the training continues without output.
"""

import sys
import time

from distdl.errors import one_line
from distdl.job.streams import FULL, write

SECONDS_BETWEEN_UPDATES = 0.1
CLEAR_LINE = "\r\x1b[K"


class Console:
    """Prints lines and warnings, and a live line if `live` is set and the output is a terminal."""

    lost: str | None = None
    """The reason if a full disk has swallowed a line."""

    def __init__(self, *, live: bool) -> None:
        self._live = live and sys.stdout is not None and sys.stdout.isatty()
        self._live_shown = False
        self._next_update = 0.0

    def line(self, text: str = "") -> None:
        """Print a line."""
        error = write(sys.stdout, (CLEAR_LINE if self._live_shown else "") + text + "\n")
        if error is not None and error.errno in FULL:
            self.lost = error.strerror
        self._live_shown = False

    def warning(self, text: str) -> None:
        """Print a warning to the error stream."""
        if self._live_shown:
            write(sys.stdout, CLEAR_LINE)
        write(sys.stderr, f"distdl: warning: {one_line(text)}\n")
        self._live_shown = False

    def live(self, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        """Rewrite the live line: the step within the epoch, and the loss of the latest step."""
        if not self._live or time.monotonic() < self._next_update:
            return
        self._next_update = time.monotonic() + SECONDS_BETWEEN_UPDATES
        done = 24 * step // steps
        bar = "#" * done + "-" * (24 - done)
        write(sys.stdout, f"{CLEAR_LINE}epoch {epoch}/{epochs} [{bar}] step {step}/{steps} loss {loss:.4f}")
        self._live_shown = True
