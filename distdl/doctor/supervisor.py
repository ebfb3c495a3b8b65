"""Examine in a child process, so that nothing in it can keep the doctor from its report.

MPI may wait forever for a rank that does not start, and may end the process: by a signal, or by its own exit. So a
child process loads NumPy and MPI. It sends a line of JSON through a pipe for each stage and for each group of facts.
This process reads them, and imports neither.
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

    def _send(self, message: dict[str, Any]) -> None:
        self.pipe.write(json.dumps(message).encode() + b"\n")
        self.pipe.flush()


@dataclass
class Outcome:
    """The facts that the child has reported, and its failure, if any."""

    facts: Facts = field(default_factory=dict)
    failure: str | None = None
    """Why the examination did not end: the words after the name of the rank."""
    stage: str = "Python"


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
    outcome = Outcome()
    try:
        _follow(reading, outcome, seconds, notices=notices, name=name)
        if outcome.failure is not None:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reading)
    _, status = os.waitpid(child, 0)
    if outcome.failure is None and status:
        how = f"by {signal.Signals(status).name}" if os.WIFSIGNALED(status) else f"with code {os.WEXITSTATUS(status)}"
        outcome.failure = f"ended {how} during: {outcome.stage}"
    return outcome


def _examine_as_child(examine: Callable[[Tell], None], tell: Tell) -> None:
    try:
        examine(tell)
    except (DistdlError, ImportError, OSError) as error:
        tell.facts(error=f"{'' if isinstance(error, DistdlError) else type(error).__name__ + ': '}{error}")
        tell.stage("nothing more")
        os._exit(0)  # MPI may not be able to end in order
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
