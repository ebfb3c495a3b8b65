"""The warden: a process beside each rank that kills the rank once it shows no sign of life (``--detect-hangs``).

A rank that is stopped, swapped out, or stuck inside of a library keeps all others waiting. They know how to go on
without one that has died, so a rank that hangs is made one: its death is seen as any other, nobody has to be
persuaded of it, and a dead process writes into no file, which is why nothing else fences it off. Where no rank is
let go on without, the job ends instead of hanging.

A thread of the rank gives a sign several times in the seconds that were set. It needs Python for an instant to do so:
a long step lets it, a call that never comes back to Python and never lets go of it does not. The warden lives on the
rank's own host, and is stopped together with it where a scheduler or a person at a terminal suspends the whole job. It
counts its own looks, not the hours that may have passed between two of them.

This file is the warden's program too, and starts in an instant: nothing of the package is imported at its head.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress

#: How often a rank gives a sign, and its warden looks, in the seconds that were set.
SIGNS = 10
#: What a launcher passes on to a rank and whatever that has started: the warden does not end before its rank.
NOT_FOR_THE_WARDEN = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}


class Warden:
    """Kills this process once it gives no sign for some seconds while the warden is entered; never with 0 seconds.

    `name` is what a message calls the process. Entering raises `UserError` where no process can be started.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds = name, seconds
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Warden:
        if self._seconds:
            arguments = [sys.executable, "-I", "-S", __file__, self._name, str(self._seconds)]
            before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_THE_WARDEN)  # which the new process keeps
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
            self._thread.join()  # or its last sign would go to whatever has the number of the closed pipe by then
            self._process.kill()
            self._process.communicate()

    def _give_signs(self) -> None:
        while not self._over.wait(self._seconds / SIGNS):
            with suppress(BlockingIOError):  # the warden has been stopped for long, the pipe is full of signs
                try:
                    os.write(self._signs, b".")
                except BrokenPipeError:
                    if not self._over.is_set():
                        say(f"{self._name} has lost its warden: should it hang, it is not killed (--detect-hangs)")
                    return


def _cannot_start(error: OSError) -> Exception:
    from distdl.errors import UserError  # noqa: PLC0415  the program has no package

    return UserError(f"--detect-hangs cannot start the process that watches this rank: {error}; leave the flag out")


def watch(name: str, seconds: float) -> None:
    """Read the signs of the parent process from standard input to their end; kill it once they stay out."""
    watched = os.getppid()
    silent = 0
    while silent < SIGNS:
        ready, _, _ = select.select([0], [], [], seconds / SIGNS)
        if not ready:
            silent += 1
        elif os.read(0, 4096):
            silent = 0
        else:  # it has ended
            return
    if os.getppid() == watched:
        host = os.uname().nodename
        say(f"{name} (process {watched}, host {host}) has given no sign of life for {seconds:g} s and is killed")
        os.kill(watched, signal.SIGKILL)


def say(text: str) -> None:
    """Write a line to the error stream, in one piece."""
    with suppress(OSError):  # nobody is there to be told
        os.write(2, f"distdl: {text}\n".encode(errors="replace"))


if __name__ == "__main__":
    watch(sys.argv[1], float(sys.argv[2]))
