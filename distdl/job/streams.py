"""What is printed: the two streams of a process, and what becomes of it where nobody reads or a disk is full."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

from distdl.errors import one_line

#: What a disk without room says.
FULL = {errno.ENOSPC, errno.EDQUOT}


def prepare() -> None:
    """Let each line leave in one piece, with what the terminal has no character for as an escape; open what is closed.

    What is printed leads nowhere where a stream was closed before Python was started; no file that is opened later then
    gets the number of the stream, which libraries write to. An unbuffered Python (`PYTHONUNBUFFERED`) writes the end of
    a line apart, and Open MPI's launcher passes on what has no end yet in front of the next line, be that of the other
    stream. A dot in the banner must not end a training.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            errors = "backslashreplace" if stream.errors == "strict" else stream.errors
            stream.reconfigure(errors=errors, line_buffering=True, write_through=False)


def write(stream: TextIO | None, text: str) -> OSError | None:
    """Write at once; return what went wrong. A stream that fails leads nowhere from then on.

    Nothing of it is left to fail when Python ends, which would change the exit code. A full disk costs what was to be
    written, and no more: there may be room for the next.
    """
    if stream is None:  # closed before Python was started
        return None
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        with suppress(OSError):  # a stream that a script has put in place may have no file behind it
            kept = os.dup(stream.fileno()) if error.errno in FULL else None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            if kept is not None:
                stream.flush()  # of what is left in its buffer
                os.dup2(kept, stream.fileno())
                os.close(kept)
        return error
    return None


def say(text: str = "") -> None:
    """Hand on what was printed, and then `text` to the error stream."""
    write(sys.stdout, "")
    write(sys.stderr, text)


def say_line(text: str) -> None:
    """Print ``distdl: text`` to the error stream, as one line."""
    say(f"distdl: {one_line(text)}\n")
