"""The warden: a process beside each rank that kills the rank if its signs of life stop (``--detect-hangs``).

A rank that is stopped, swapped out or stuck inside a library keeps all others waiting. They can continue without a dead
rank, so the warden kills a rank that hangs. A thread of the rank gives a sign of life several times in the given
seconds. The warden counts its own looks, not the time between them: a suspended job also suspends its wardens.

`docs/processes.md` ("Evictions") has the reasons. This file is also the warden's program. It starts in an instant,
because its head imports nothing of the package.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress

#: The number of signs of a rank, and of looks of its warden, in the given seconds.
SIGNS = 10
#: Signals that a launcher passes on to a rank and its children: they must not end the warden before its rank.
NOT_FOR_THE_WARDEN = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


class Warden:
    """Inside its ``with`` block, kills this process if it gives no sign of life for `seconds`; 0 turns it off.

    Messages call the process `name`. Entering the block raises `UserError` if no process can be started.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds = name, seconds
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Warden:
        if self._seconds:
            arguments = [sys.executable, "-I", "-S", __file__, self._name, str(self._seconds)]
            before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_THE_WARDEN)  # the new process inherits it
            try:
                self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            except OSError as error:
                raise _cannot_start(error) from error
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            assert self._process.stdin is not None
            self._signs = self._process.stdin.fileno()
            os.set_blocking(self._signs, False)
            self._thread = threading.Thread(target=self._give_signs, name="signs for the warden", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        if self._process is not None:
            self._thread.join()  # otherwise its last sign could go to a new file with the number of the closed pipe
            self._process.kill()
            self._process.communicate()

    def _give_signs(self) -> None:
        while not self._over.wait(self._seconds / SIGNS):
            with suppress(BlockingIOError):  # the pipe is full: the warden was stopped for long
                try:
                    os.write(self._signs, b".")
                except BrokenPipeError:
                    if not self._over.is_set():
                        say(f"{self._name} has lost its warden: if it hangs, it will not be killed (--detect-hangs)")
                    return


def _cannot_start(error: OSError) -> Exception:
    from distdl.errors import UserError  # noqa: PLC0415  not at the head: the program has no package
    from distdl.job.limits import explained  # noqa: PLC0415

    if (reached := explained(error)) is not error:
        return UserError(f"--detect-hangs cannot start the process that watches this rank: {reached}")
    return UserError(f"--detect-hangs cannot start the process that watches this rank: {error}; leave the flag out")


def watch(name: str, seconds: float) -> None:
    """Read the signs of the parent process from standard input to their end; kill the parent if they stop."""
    watched = os.getppid()
    silent = 0
    while silent < SIGNS:
        ready, _, _ = select.select([0], [], [], seconds / SIGNS)
        if not ready:
            silent += 1
        elif os.read(0, 4096):
            silent = 0
        else:  # the parent has ended
            return
    if os.getppid() == watched:
        host = os.uname().nodename
        say(f"{name} (process {watched}, host {host}) has given no sign of life for {seconds:g} s and is killed")
        os.kill(watched, signal.SIGKILL)


def say(text: str) -> None:
    """Write a line to the error stream in one piece."""
    with suppress(OSError):  # nobody reads it
        os.write(2, f"distdl: {text}\n".encode(errors="replace"))


if __name__ == "__main__":
    watch(sys.argv[1], float(sys.argv[2]))
