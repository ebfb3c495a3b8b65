"""What every command does around its work: BLAS threads, one voice, exit codes, an end with the launcher.

Neither NumPy nor MPI is imported here, since the number of BLAS threads is read when NumPy is loaded.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from distdl import signals
from distdl.errors import EXIT_INTERRUPTED, DistdlError, UserError, one_line
from distdl.launcher import read_launch
from distdl.lifeline import end_with_the_launcher

#: How long ranks that stay silent about an error wait for rank 0 to speak and the launcher to end them.
SILENT_SECONDS = 1.0


class OneLineParser(argparse.ArgumentParser):
    """Raises `UserError` where argparse would print its usage as well; `advice` ends the message."""

    def __init__(self, *, advice: str, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)
        self._advice = advice

    def error(self, message: str) -> NoReturn:
        """Raise the error."""
        raise UserError(f"{message}; {self._advice}")


def split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into a command's own flags and those, after the first ``--``, that it hands on."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


def set_blas_threads(count: int) -> None:
    """Tell every BLAS that NumPy may be linked with how many threads to start; must come before NumPy."""
    for name in ("OPENBLAS_NUM", "OMP_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM"):
        os.environ[f"{name}_THREADS"] = str(count)


def run(
    command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None, *, trains: bool = False
) -> int:
    """Run a command with the process's arguments and return its exit code; `UserError` becomes one line.

    Under a launcher every rank meets the same wrong flag; rank 0 alone says so. The others wait a little, so
    that it has spoken before the launcher sees one of them end, and then end by themselves: not every launcher
    ends them.

    Of a command that `trains` the signals that stop a training wait until it listens, in `distdl.engine.train`.
    """
    if trains:
        signals.hold()  # before there is a second thread
    launch = read_launch()
    if launch.by is not None:
        end_with_the_launcher()
    _open_what_is_closed()
    _escape_what_the_terminal_lacks()
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        if {"-h", "--help"} & set(arguments):
            return _show_help(command, arguments) if launch.speaks else 0
        return command(arguments)
    except DistdlError as error:
        if launch.speaks:
            _say(f"{error.label}{error}")
        elif not error.agreed:
            time.sleep(SILENT_SECONDS)
        return error.exit_code
    except KeyboardInterrupt:
        if launch.speaks:
            _say("interrupted; --resume goes on from the last checkpoint")
        return EXIT_INTERRUPTED


def _show_help(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command that is asked for its help; that nobody reads it to the end is no error."""
    try:
        try:
            return command(arguments)
        finally:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in its buffer at exit
        return 0


def _open_what_is_closed() -> None:
    """Let what is printed lead nowhere where a stream was closed before Python was started.

    No file that is opened later then gets the number of the stream, which libraries write to.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _escape_what_the_terminal_lacks() -> None:
    """Show as an escape what its encoding has no character for; a dot in the banner must not end a training."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _say(text: str) -> None:
    """Print one line to the error stream, whatever line breaks the text has."""
    for stream, line in ((sys.stdout, ""), (sys.stderr, f"distdl: {one_line(text)}\n")):
        with suppress(OSError):  # nobody is there to be told; the exit code still tells
            stream.write(line)
            stream.flush()
