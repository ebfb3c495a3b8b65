"""The signals that ask a training to stop, and how they wait until the training handles them.

A command that trains first blocks them (`hold_signals`), before a second thread exists: each thread inherits the
blocked signals. The training releases them once its handlers are in place. After it they are blocked again.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Not SIGINT: during start-up, Python ends the process at Ctrl-C.
HELD = frozenset(STOPPING) - {signal.SIGINT}

_held: set[int] = set()


def hold_signals() -> None:
    """Block the signals from now on; leave those alone that are already blocked."""
    _held.update(HELD - signal.pthread_sigmask(signal.SIG_BLOCK, HELD))


@contextmanager
def release_signals() -> Iterator[None]:
    """Unblock, inside the ``with`` block, only the signals that `hold_signals` has blocked."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
