"""The console: the text that a run prints. Only the coordinator prints.

It prints plain lines, and the progress within an epoch. In one process on a terminal the progress is a live line below
the plain lines. Elsewhere it is a line every ten seconds: under a launcher nobody can tell whether a pipe leads to a
terminal. A full disk costs only the lines that do not fit. If nobody reads any longer
(a closed pipe, a lost terminal under `nohup`), the training continues without output.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence

from distdl.config import TrainConfig
from distdl.engine.printed_lines import describe_shares, progress_line
from distdl.errors import one_line
from distdl.job.streams import FULL, write

SECONDS_BETWEEN_UPDATES = 0.1
SECONDS_BETWEEN_LINES = 10.0
#: Between two lines about shares, and between two warnings of skipped steps.
SECONDS_BETWEEN_SHARES = 5.0
SECONDS_BETWEEN_SKIPS = 5.0
CLEAR_LINE = "\r\x1b[K"


class Console:
    """Prints lines and warnings, and a live line if `live` is set and the output is a terminal."""

    lost: str | None = None
    """The reason if a full disk has swallowed a line."""
    shares: Sequence[int] | None = None
    """The micro-batches of each rank, if they have changed and are not printed yet."""

    def __init__(self, *, live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live = live and sys.stdout is not None and sys.stdout.isatty()
        self._live_shown = False
        self._epoch = 0
        self._begun = self._next_update = 0.0
        self._steps_before = 0
        self._next_shares = self._next_skip = 0.0

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

    def changed_shares(self, step: int) -> None:
        """Print changed `shares` after a step, or some seconds later if they change often."""
        if self.shares is not None and self._clock() >= self._next_shares:
            self.line(f"balance: {describe_shares(self.shares)} from step {step + 1} on")
            self.shares, self._next_shares = None, self._clock() + SECONDS_BETWEEN_SHARES

    def skipped(self, text: str) -> None:
        """Print the warning of a skipped step, unless there was another in the last seconds."""
        if self._clock() >= self._next_skip:
            self.warning(text)
            self._next_skip = self._clock() + SECONDS_BETWEEN_SKIPS

    def progress(self, config: TrainConfig, step: int, steps_per_epoch: int, loss: float) -> None:
        """Show the progress after a step, if it is time for it; the loss is that of the step alone.

        The rate and the remaining time follow from the steps since the epoch's first one.
        """
        now = self._clock()
        epoch, position = (step - 1) // steps_per_epoch + 1, (step - 1) % steps_per_epoch + 1
        if epoch != self._epoch:
            self._epoch, self._begun, self._steps_before = epoch, now, step
            if not self._live:
                self._next_update = now + SECONDS_BETWEEN_LINES
        if now < self._next_update or (position == steps_per_epoch and not self._live):
            return
        self._next_update = now + (SECONDS_BETWEEN_UPDATES if self._live else SECONDS_BETWEEN_LINES)
        steps, seconds = step - self._steps_before, now - self._begun
        rate = remaining = None
        if steps and seconds:
            last_step = min(config.epoch_count * steps_per_epoch, config.max_steps or math.inf)
            rate, remaining = steps * config.batch_size / seconds, (last_step - step) * seconds / steps
        text = progress_line(
            f"{epoch}/{config.epoch_count}", position, steps_per_epoch, loss, rate, remaining, bar=self._live
        )
        if not self._live:
            self.line(text)
            return
        write(sys.stdout, f"{CLEAR_LINE}{text}")
        self._live_shown = True
