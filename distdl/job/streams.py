"""Writing to the two output streams of a process, even if they are closed, nobody reads them, or a disk is full."""

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from distdl.errors import one_line

#: The errors of a full disk.
FULL = {errno.ENOSPC, errno.EDQUOT}
#: Ways to treat characters that an encoding lacks that can raise an error, and the name of ours.
CAN_FAIL = {"strict", "surrogateescape", "surrogatepass", "backslashreplace"}
PLAIN = "distdl.plain"
#: Characters of our texts in plain letters.
SIMILAR = {"·": "|", "–": "-", "…": "...", "×": "x", "→": "->", "±": "+/-", "µ": "u", "≥": ">=", "²": "^2"}
#: The streams that replace closed ones.
_replacements: list[TextIO] = []


def prepare() -> None:
    """Make both streams write whole lines, with any character, and open closed streams.

    - A closed stream is opened on the null device. Otherwise a file opened later would get the stream's number, and
      libraries would write into it.
    - An unbuffered Python writes the end of a line separately: Open MPI's launcher would mix it with other lines.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            _replacements.append(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
            setattr(sys, name, _replacements[-1])
        elif isinstance(stream, io.TextIOWrapper):
            errors = PLAIN if stream.errors in CAN_FAIL else stream.errors
            stream.reconfigure(errors=errors, line_buffering=True, write_through=False)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Return plain characters for one that the stream's encoding lacks, or its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":  # a byte of a file's name that is no text
        return f"\\x{ord(letter) - 0xDC00:x}", error.start + 1
    return SIMILAR.get(letter, letter.encode("ascii", "backslashreplace").decode()), error.start + 1


codecs.register_error(PLAIN, _plain)


def use_utf8_names() -> None:
    """Start this command again in Python's UTF-8 mode if names of files would be read in another encoding.

    In the plain locale "C" a name such as "Käse" would become another text, in class names, logs and checkpoints. The
    streams keep the encoding of the locale.
    """
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode or not sys.executable or not sys.orig_argv[1:]:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    environment = {**os.environ, "PYTHONIOENCODING": os.environ.get("PYTHONIOENCODING") or encoding}
    argv = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
    with suppress(OSError):
        os.execve(sys.executable, argv, environment)  # noqa: S606  no shell is wanted


def was_closed(stream: TextIO | None) -> bool:
    """Return whether nobody can ever read the stream, because it was closed before this process started."""
    return stream is None or any(stream is one for one in _replacements)


def write(stream: TextIO | None, text: str) -> OSError | None:
    """Write and flush the text; return the error, if any.

    After an error the stream leads to the null device, and nothing stays buffered: it could fail at exit and change the
    exit code. If only the disk is full, this text is lost: the disk may have room for the next one.
    """
    if stream is None:  # closed before Python started
        return None
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:  # a script's stream
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, PLAIN).decode(encoding, "backslashreplace"))
        stream.flush()
    except OSError as error:
        with suppress(OSError):  # a stream that a script has set may have no file
            kept = os.dup(stream.fileno()) if error.errno in FULL else None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            if kept is not None:
                stream.flush()  # drops the rest of its buffer
                os.dup2(kept, stream.fileno())
                os.close(kept)
        return error
    return None


def say(text: str = "") -> None:
    """Flush standard output, then write `text` to the error stream."""
    write(sys.stdout, "")
    write(sys.stderr, text)


@contextmanager
def said_after(seconds: float, text: str) -> Iterator[None]:
    """Print ``distdl: text`` to the error stream if the ``with`` block takes longer.

    A process prints it: no other thread of this process runs during MPI_Init.
    """
    over, end = os.pipe()
    try:
        printer = os.fork()
    except OSError:  # too many processes
        printer = None
    if printer == 0:
        try:
            os.close(end)
            if not select.select([over], [], [], seconds)[0]:
                say_line(text)
        finally:
            os._exit(0)
    os.close(over)
    try:
        yield
    finally:
        os.close(end)
        if printer:
            os.waitpid(printer, 0)


def say_line(text: str) -> None:
    """Print ``distdl: text`` to the error stream, as one line."""
    say(f"distdl: {one_line(text)}\n")
