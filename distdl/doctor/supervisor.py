"""Examine in a child process, so that nothing in it can keep the doctor from its report.

MPI may wait forever for a rank that does not start, and may end the process: by a signal, or by its own exit. So a
child process loads NumPy and MPI. It sends a line of JSON through a pipe for each stage and for each group of facts.
This process reads them, and imports neither.

A launcher ends the whole job when it loses the connection to a process that has started MPI. So a child that has failed
or takes too long lives until the report is written.
"""

import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distdl.errors import DistdlError
from distdl.job.processes import send_when_the_parent_dies
from distdl.job.streams import say_line

#: A stage that takes this long is named.
SECONDS_TO_NOTICE = 20.0
#: The launcher gets this long to read the report, and a killed child to end: it may wait for a disk.
SECONDS_TO_END = 0.3
Facts = dict[str, Any]


class Tell:
    """The child's end of the pipe."""

    def __init__(self, handle: int) -> None:
        self.pipe = os.fdopen(handle, "wb")

    def stage(self, name: str) -> None:
        """Report the work that begins now: the words after "waits for"."""
        self._send({"stage": name})

    def facts(self, **facts: Any) -> None:
        """Report facts."""
        self._send({"facts": facts})

    def end(self) -> None:
        """Report that nothing follows."""
        self.pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        self.pipe.write(json.dumps(message).encode() + b"\n")
        self.pipe.flush()


@dataclass
class Outcome:
    """The facts that the child has reported, and its failure, if any."""

    child: int
    """The process id of the child; 0 if it has ended."""
    facts: Facts = field(default_factory=dict)
    failure: str | None = None
    """Why the examination did not end: the words after the name of the rank."""
    stage: str = "Python"

    def end_child(self) -> None:
        """Kill the child if it still lives. Call it after the report, and then end: a launcher may end all processes.

        The child must end first. Otherwise MPICH's launcher returns the exit code of a process that it has killed.
        """
        if not self.child:
            return
        time.sleep(SECONDS_TO_END)
        os.kill(self.child, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS_TO_END
        while os.waitpid(self.child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.001)


def examined(examine: Callable[[Tell], None], seconds: float, *, notices: bool, name: str) -> Outcome | None:
    """Call `examine` in a child process and return its outcome; return None in the child, which must then end.

    A stage may take `seconds`. After some time a line says what it waits for, if this rank `notices`.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the only other thread watches the launcher
        child = os.fork()
    if child == 0:
        os.close(reading)
        send_when_the_parent_dies(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        _examine_as_child(examine, Tell(writing))
        return None
    os.close(writing)
    outcome = Outcome(child)
    try:
        _follow(reading, outcome, seconds, notices=notices, name=name)
    finally:
        os.close(reading)
    if outcome.failure is not None or "error" in outcome.facts:
        return outcome
    _, status = os.waitpid(child, 0)
    outcome.child = 0
    if status:
        how = f"by {signal.Signals(status).name}" if os.WIFSIGNALED(status) else f"with code {os.WEXITSTATUS(status)}"
        outcome.failure = f"ended {how} during: {outcome.stage}"
    return outcome


def _examine_as_child(examine: Callable[[Tell], None], tell: Tell) -> None:
    try:
        examine(tell)
    except (DistdlError, ImportError, OSError) as error:
        tell.facts(error=f"{'' if isinstance(error, DistdlError) else type(error).__name__ + ': '}{error}")
        tell.end()
        while True:
            signal.pause()
    except KeyboardInterrupt:
        os._exit(130)
    tell.stage("the end of MPI")


def _follow(reading: int, outcome: Outcome, seconds: float, *, notices: bool, name: str) -> None:
    """Read the messages of the child until it closes the pipe, or until a stage takes too long."""
    unread, begun, noticed = b"", time.monotonic(), False
    while True:
        waited = time.monotonic() - begun
        if waited > seconds:
            outcome.failure = f"waited {waited:.0f} s for {outcome.stage}"
            return
        if waited > SECONDS_TO_NOTICE and notices and not noticed:
            say_line(f"doctor: {name} has waited {waited:.0f} s for {outcome.stage}")
            noticed = True
        if not select.select([reading], [], [], 0.5)[0]:
            continue
        data = os.read(reading, 2**16)
        if not data:
            return
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            outcome.facts |= message.get("facts", {})
            if "stage" in message:
                outcome.stage, begun, noticed = message["stage"], time.monotonic(), False
