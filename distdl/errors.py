"""What can go wrong, and the exit code of each.

| exit code | class              | meaning                                                        |
|-----------|--------------------|----------------------------------------------------------------|
| 1         | any other          | a defect of ours: shown with its traceback                     |
| 2         | `UserError`        | what the user gave is wrong: one line, no traceback            |
| 3         | `DamagedFileError` | a file is damaged: one line that names it                      |
| 4         | `CorruptionError`  | memory or a computation went wrong unnoticed: one line         |
| 75        | `Stopped`          | stopped by a signal, after a checkpoint: start it again later  |
| 130       | KeyboardInterrupt  | stopped at once: by a second signal, or before the first step  |
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

EXIT_DEFECT = 1
EXIT_USER = 2
EXIT_DAMAGED = 3
EXIT_CORRUPTION = 4
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: what schedulers and scripts take for "try again"
EXIT_INTERRUPTED = 130  # as a shell says it of Ctrl-C


class DistdlError(Exception):
    """An error with a message for a person, in one line, and an exit code.

    `agreed` is set once every rank is known to raise the same error; such an error needs no abort.
    """

    exit_code = EXIT_DEFECT
    agreed = False
    #: What stands in front of the message when a command prints it.
    label = "error: "


class UserError(DistdlError):
    """What the user gave is wrong. The message says what was given, what was expected, what to do."""

    exit_code = EXIT_USER


class DamagedFileError(UserError):
    """A file that we read is damaged: torn, truncated, altered, or not what its header says."""

    exit_code = EXIT_DAMAGED


class DivergedError(UserError):
    """The loss, a gradient or the weights have left the range of numbers: most often the learning rate is too large."""


class CorruptionError(DistdlError):
    """Ranks that must have the same bits have not: memory or a computation went wrong, and nothing said so."""

    exit_code = EXIT_CORRUPTION


class Stopped(DistdlError):  # noqa: N818  it is what was asked for
    """A signal asked the training to stop; it did so after a step, on all ranks, with a checkpoint."""

    exit_code = EXIT_STOPPED
    label = ""


class PeerLost(DistdlError):  # noqa: N818  the event has this name in the design
    """A rank of the world has died or the world was revoked by one that saw it die.

    Where it is `agreed`, every rank that is left knows that what they were about to agree on does not count.
    """


def one_line(text: str) -> str:
    r"""Return the text with line breaks as spaces, and whatever a terminal would not show, or obey, as an escape.

    >>> one_line("a name\nwith \x1b[31m")
    'a name with \\x1b[31m'
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(text.split()))


def quoted(path: Path) -> str:
    """Return the path in quotes, with control characters escaped, so that a message stays one line."""
    return repr(os.fspath(path))


def unknown_name(kind: str, given: str, known: Iterable[str], other: Mapping[str, str] | None = None) -> UserError:
    """Return the error for a name that is not known, with the nearest known one suggested: see `nearest`.

    >>> str(unknown_name("optimizer", "adma", ["adam", "sgd"]))
    "unknown optimizer 'adma': expected one of adam, sgd; did you mean 'adam'?"
    """
    known = sorted(known)
    near = nearest(given, known, other or {})
    hint = f"; did you mean {near!r}?" if near else ""
    return UserError(f"unknown {kind} {given!r}: expected one of {', '.join(known)}{hint}")


def nearest(given: str, known: Iterable[str], other: Mapping[str, str]) -> str | None:
    """Return the known name that may be meant, None if none is near; `other` has what else one is called.

    >>> nearest("SDG", ["adam", "sgd"], {}), nearest("learning_rate", ["lr", "seed"], {"learning_rate": "lr"})
    ('sgd', 'lr')
    """
    of_lower_case = {name.lower(): name for name in known}
    given = given.lower()
    near = difflib.get_close_matches(other.get(given, given), of_lower_case, n=1)
    return of_lower_case[near[0]] if near else None
