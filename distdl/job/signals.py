"""The signals that ask a training to stop, and how one that comes before the training listens waits for it.

A command that trains blocks them first of all (`hold`), as long as there is no other thread that could take one in
its stead: each thread inherits what is blocked. Whoever listens lets them in once its handlers are in place. What the
training is done with is held again, to the end of the process.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Ctrl-C ends a start at once: Python sees to that.
HELD = frozenset(STOPPING) - {signal.SIGINT}

_held: set[int] = set()


def hold() -> None:
    """Let the signals wait from now on; what is blocked already is left to whoever has blocked it."""
    _held.update(HELD - signal.pthread_sigmask(signal.SIG_BLOCK, HELD))


@contextmanager
def let_in() -> Iterator[None]:
    """Let in, as long as this is entered, what `hold` has blocked, and nothing else."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
