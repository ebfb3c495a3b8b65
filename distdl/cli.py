"""What every command does around its work: BLAS threads, one voice, exit codes, an end with the launcher.

Neither NumPy nor MPI is imported here, since the number of BLAS threads is read when NumPy is loaded.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from distdl.errors import EXIT_INTERRUPTED, DistdlError, UserError, one_line
from distdl.job import signals, streams
from distdl.job.launcher import OPEN_MPI, Launch, read_launch
from distdl.job.lifeline import end_with_the_launcher

#: How long ranks that stay silent about an error wait for rank 0 to speak. Open MPI's launcher ends them as soon as
#: rank 0 has ended, and would end rank 0 as soon as one of them has.
SILENT_SECONDS = {OPEN_MPI: 10.0}
OTHERS_SILENT_SECONDS = 1.0
#: How long a rank that has failed before MPI was started waits for the others, who may need that long to come there.
SECONDS_TO_MEET = 60


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

    Under a launcher most errors, such as a wrong flag, are met by every rank, and rank 0 alone says so. Some are met
    by one alone, such as a file that is missing on its host: see `_tell_the_others`.

    Of a command that `trains` the signals that stop a training wait until it listens, in `distdl.engine.train`.
    """
    if trains:
        signals.hold_signals()  # before there is a second thread
    launch = read_launch()
    if launch.by is not None:
        end_with_the_launcher()
    streams.prepare()
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        if {"-h", "--help"} & set(arguments):
            return _show_help(command, arguments) if launch.prints_for_all else 0
        return command(arguments)
    except DistdlError as error:
        if launch.prints_for_all:
            _say(f"{error.label}{error}")
        if launch.size > 1 and not error.agreed:
            _tell_the_others(error, launch)
        return error.exit_code
    except KeyboardInterrupt:
        if launch.prints_for_all:
            _say("interrupted; --resume goes on from the last checkpoint")
        return EXIT_INTERRUPTED


def _show_help(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command that is asked for its help; that nobody reads it to the end is no error."""
    try:
        return command(arguments)
    except OSError:
        return 0
    finally:
        streams.write(sys.stdout, "")


def _tell_the_others(error: DistdlError, launch: Launch) -> None:
    """See to it that no rank waits for this one, and that what this rank alone has met is said.

    Before the world is made, all meet there: whoever has not failed raises this error too. Later the job is ended.
    Where no world can be made, rank 0 has the time to say so before one of the others ends.
    """
    with Path(os.devnull).open("w") as nowhere:
        # Ends this process with exit code 1. No Python runs while MPI starts; this is a thread without it.
        faulthandler.dump_traceback_later(SECONDS_TO_MEET, exit=True, file=nowhere)
        try:
            from distdl.parallel import tell_the_others  # noqa: PLC0415  NumPy is loaded for that

            tell_the_others(error)
        except (UserError, ImportError):
            if not launch.prints_for_all:
                time.sleep(SILENT_SECONDS.get(launch.by or "", OTHERS_SILENT_SECONDS))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _say(text: str) -> None:
    """Print one line to the error stream, whatever line breaks the text has."""
    streams.say(f"distdl: {one_line(text)}\n")
