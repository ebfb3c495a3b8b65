"""The errors and their exit codes; docs/exit-codes.md lists all codes."""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

EXIT_DEFECT = 1
EXIT_DIFFERENT = 1  # as of cmp and diff
EXIT_USER = 2
EXIT_DAMAGED = 3
EXIT_CORRUPTION = 4
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again" for schedulers and scripts
EXIT_INTERRUPTED = 130  # the exit code of a shell after Ctrl-C
#: It is of no use to start such a job again at once.
FINAL_EXIT_CODES = {0, EXIT_USER, EXIT_DAMAGED, EXIT_CORRUPTION, EXIT_STOPPED, EXIT_INTERRUPTED}


class DistdlError(Exception):
    """An error with a message of one line for the user, and an exit code.

    `agreed` is set if every rank raises the same error; such an error needs no abort.
    """

    exit_code = EXIT_DEFECT
    #: The text before the message when a command prints it.
    label = "error: "

    def __init__(self, message: str = "", *, agreed: bool = False) -> None:
        super().__init__(message if message.isprintable() else one_line(message))  # it may quote a name of the user
        self.agreed = agreed


class UserError(DistdlError):
    """The user's input is invalid. The message names the given value, the expected one and the remedy."""

    exit_code = EXIT_USER


class MissingPackageError(UserError, ImportError):
    """A package that is needed is not installed. The message has the command that installs it."""


class HostError(UserError):
    """A host cannot start MPI: all its ranks raise this, its first rank prints it, and none waits for other hosts."""


class DamagedFileError(UserError):
    """An input file is damaged: torn, truncated, altered, or different from its header."""

    exit_code = EXIT_DAMAGED


class TooSmallError(UserError):
    """The images are too small for a layer."""


class DivergedError(UserError):
    """The loss, a gradient or the weights are no longer finite; usually the learning rate is too large."""


class CorruptionError(DistdlError):
    """Bits that must be equal differ: memory or a computation went wrong without an error."""

    exit_code = EXIT_CORRUPTION


class Stopped(DistdlError):  # noqa: N818  the user asked for it
    """A signal asked the training to stop, and it stopped on all ranks after a step, with a checkpoint."""

    exit_code = EXIT_STOPPED
    label = ""


class PeerLost(DistdlError):  # noqa: N818  it names the event
    """A rank of the world has died, or a rank that saw it die has revoked the world.

    If it is `agreed`, every surviving rank knows that the agreement has failed.
    """


def one_line(text: str) -> str:
    r"""Return the text with spaces instead of line breaks, and escapes instead of control characters.

    >>> one_line("a name\nwith \x1b[31m")
    'a name with \\x1b[31m'
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(text.split()))


def quoted(path: Path) -> str:
    """Return the path in quotes, with control characters escaped, so that a message stays one line."""
    return repr(os.fspath(path))


def listed(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first texts, and the number of the others if there are more than `most`.

    >>> listed(["a", "b", "c"], 2), listed(["a", "b", "c"], 2, "; "), listed(["a", "b"], 2)
    ('a, b and 1 more', 'a; b; and 1 more', 'a, b')
    """
    more = f"{separator.strip(', ')} and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def counted(number: int, what: str) -> str:
    """Return a number of things.

    >>> counted(1, "rank"), counted(2, "rank")
    ('1 rank', '2 ranks')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def unknown_name(kind: str, given: str, known: Iterable[str], other: Mapping[str, str] | None = None) -> UserError:
    """Return the error for an unknown name; it suggests the nearest known one (see `nearest`).

    >>> str(unknown_name("optimizer", "adma", ["adam", "sgd"]))
    "unknown optimizer 'adma': expected one of adam, sgd; did you mean 'adam'?"
    """
    known = sorted(known)
    near = nearest(given, known, other or {})
    hint = f"; did you mean {near!r}?" if near else ""
    return UserError(f"unknown {kind} {given!r}: expected one of {', '.join(known)}{hint}")


def nearest(given: str, known: Iterable[str], other: Mapping[str, str]) -> str | None:
    """Return the known name that is nearest, or None; `other` maps further names to known ones.

    >>> nearest("SDG", ["adam", "sgd"], {}), nearest("learning_rate", ["lr", "seed"], {"learning_rate": "lr"})
    ('sgd', 'lr')
    """
    of_lower_case = {name.lower(): name for name in known}
    given = given.lower()
    near = difflib.get_close_matches(other.get(given, given), of_lower_case, n=1)
    return of_lower_case[near[0]] if near else None
