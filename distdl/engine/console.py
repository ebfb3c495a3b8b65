"""The console: the text that a run prints. Only the coordinator prints.

It prints plain lines. In one process on a terminal it also keeps a live line below them. Under a launcher nobody can
tell whether a pipe leads to a terminal: Open MPI always claims one, MPICH never does.

A full disk costs only the lines that do not fit. If nobody reads any longer (a closed pipe, a lost terminal under
`nohup`), the training continues without output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from distdl.errors import one_line
from distdl.job.streams import FULL, write

SECONDS_BETWEEN_UPDATES = 0.1
CLEAR_LINE = "\r\x1b[K"
#: With more ranks than this, `describe_shares` prints a summary.
MOST_RANKS_LISTED = 16


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


def banner(
    environment: Mapping[str, Any], described: str, threads: int, batch: str, shares: str, survives: str
) -> list[str]:
    """Return the first lines of a run."""
    ranks = environment["ranks"]
    hosts = ", ".join(f"{name} ({count})" for name, count in environment["hosts"].items())
    return [
        f"distdl {environment['versions']['distdl']} · {described}",
        f"{ranks} rank{'s' if ranks > 1 else ''} × {threads} thread{'s' if threads > 1 else ''}"
        f" · {environment['communicator']} · host{'s' if len(environment['hosts']) > 1 else ''} {hosts}",
        f"{batch} · {shares}",
        f"survives failures: {survives}",
    ]


def describe_shares(shares: Sequence[int]) -> str:
    """Return a phrase for the number of micro-batches that each rank computes in a step.

    >>> describe_shares([5, 3])
    '5, 3 micro-batches on ranks 0, 1'
    >>> describe_shares([4] * 20 + [1])
    '1 to 4 micro-batches a rank, fewest on rank 20'
    """
    if len(shares) > MOST_RANKS_LISTED:
        return f"{min(shares)} to {max(shares)} micro-batches a rank, fewest on rank {shares.index(min(shares))}"
    ranks = range(len(shares))
    return f"{', '.join(map(str, shares))} micro-batches on ranks {', '.join(map(str, ranks))}"


def shares_of(micro_batches: int, ranks: int) -> str:
    """Return a phrase for equal shares, with a better number of ranks if there is one.

    >>> shares_of(8, 4)
    '2 micro-batches a rank'
    >>> shares_of(8, 5)
    '1 to 2 micro-batches a rank: as slow as 4 ranks, use 4 or 8'
    """
    least, most = micro_batches // ranks, -(-micro_batches // ranks)
    plural = "es" if most > 1 else ""
    if least == most:
        return f"{most} micro-batch{plural} a rank"
    text = f"{least} to {most} micro-batch{plural} a rank"
    as_fast = -(-micro_batches // most)
    if as_fast == ranks:
        return text
    better = next(n for n in range(ranks + 1, micro_batches + 1) if -(-micro_batches // n) < most)
    return f"{text}: as slow as {as_fast} rank{'s' if as_fast > 1 else ''}, use {as_fast} or {better}"
