"""Commands: from the command line and a TOML file to a frozen dataclass, and the run of a command.

`Command` describes a command line by the dataclass of its settings. The name, type and default of a field give the
flag. The docstring after the field is its line of `--help`. `run` calls a command and returns its exit code.

This module imports neither NumPy nor MPI, because NumPy reads the number of BLAS threads when it is loaded.
"""

from __future__ import annotations

import atexit
import dataclasses
import faulthandler
import gc
import os
import sys
import time
import tomllib
import typing
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import MISSING, dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Generic, Literal, TypeVar

from distdl.config import check_kind, expand_home
from distdl.errors import EXIT_INTERRUPTED, DistdlError, HostError, UserError, nearest, unknown_name
from distdl.job import held_signals, limits, streams
from distdl.job.launched_by import MPICH, OPEN_MPI, Launch, launcher_is_missing, read_launch
from distdl.job.lifeline import end_with_the_launcher
from distdl.regular_files import NotRegularError, open_regular

#: Seconds for which a silent rank waits while rank 0 reports an error. Open MPI's launcher ends all ranks when one
#: rank has ended. So there no other rank may end before rank 0.
SILENT_SECONDS = {OPEN_MPI: 10.0, MPICH: 1.0, "srun": 1.0}
#: Seconds for which a rank that failed before MPI started waits for the other ranks, which may still be starting.
SECONDS_TO_MEET = 60
#: A larger file is not a config file, and is not read.
LARGEST_CONFIG_BYTES = 2**14
#: The columns of `--help`, and the column at which its texts begin.
COLUMNS, TEXT_COLUMN = 80, 26

Settings = TypeVar("Settings")
NUMBERS = {int: "a whole number", float: "a number"}
VALUES = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The properties of a flag that its field does not give."""

    name: str = ""
    """Another spelling than the field's name with hyphens. Without hyphens in front it is a positional argument."""
    value: str = ""
    """The word for its value in `--help`, such as HxWxC."""
    names: Collection[str] = ()
    """The known values, for `--help`."""
    parse: Callable[[str], Any] | None = None
    """Turns the text into the value; raises `UserError`."""
    is_path: bool = False
    """Whether its text is a path or ends in one; a field of the type `Path` needs no such note."""
    repeated: bool = False
    """Whether it may occur several times; the value is then a tuple."""


#: The flags of user code that a trained network needs (`LoadOptions`).
USER_CODE = {
    "model": Flag(value="FILE.py:FUNCTION", is_path=True, repeated=True),
    "dataset": Flag(value="FILE.py:FUNCTION", is_path=True),
}


class _Setting:
    """A field of the settings, as a flag."""

    def __init__(self, command: Command[Any], name: str, kind: Any) -> None:
        self.name, self.properties = name, command.flags.get(name, Flag())
        self.flag = self.properties.name or "--" + name.replace("_", "-")
        kinds = () if typing.get_origin(kind) is Literal else typing.get_args(kind)  # of int | None or tuple[Path, ...]
        self.is_optional = NoneType in kinds
        self.kind = next(one for one in kinds if one is not NoneType) if kinds else kind
        self.choices = typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()
        declared = next(one for one in dataclasses.fields(command.settings) if one.name == name)
        self.default = declared.default
        self.is_required = self.default is MISSING and declared.default_factory is MISSING
        self.word = self.properties.value or "|".join(self.choices) or VALUES.get(self.kind, "TEXT")

    @property
    def is_positional(self) -> bool:
        return not self.flag.startswith("-")

    @property
    def usage(self) -> str:
        """The flag with the word for its value."""
        return self.flag if self.kind is bool or self.is_positional else f"{self.flag} {self.word}"

    def expanded(self, text: str) -> str:
        """Return the text with the home folder for a ``~`` at the start of its path; raise `UserError`."""
        return expand_home(self.flag, text) if self.kind is Path or self.properties.is_path else text

    def value_of(self, text: str | bool | Sequence[str]) -> Any:
        """Return the value that a text means; raise `UserError`."""
        if isinstance(text, bool):
            return text
        return self._value_of(text) if isinstance(text, str) else tuple(map(self._value_of, text))

    def _value_of(self, text: str) -> Any:
        if self.properties.parse:
            return self.properties.parse(text)
        if self.is_optional and text == "None":
            return None
        if self.choices:
            check_kind(self.name, text, self.kind)
            return text
        try:
            return self.kind(text)
        except ValueError:
            shown = repr(text) if len(text) < 80 else repr(text)[:80] + "..."
            raise UserError(f"{self.flag} must be {NUMBERS[self.kind]}, not {shown}; --help lists all flags") from None

    def help(self, docstrings: Mapping[str, str]) -> list[str]:
        """Return its lines of `--help`."""
        text = docstrings[self.name]
        if self.properties.names:
            text += f" Names: {', '.join(self.properties.names)}."
        if isinstance(self.default, str | int | float | Path) and self.kind is not bool:
            default = f"{self.default:g}" if isinstance(self.default, float) else self.default
            text += f" (default: {default})"
        return _entry(self.usage, text)


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Settings]):
    """A command line that stands for an object of the dataclass `settings`."""

    program: str
    summary: str
    settings: type[Settings]
    examples: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]]
    """The headings of `--help`, each with its fields. A field in no group is not a flag."""
    flags: Mapping[str, Flag] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)
    """Names to suggest a field for."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Earlier names of fields, which a TOML file may hold."""
    not_in_file: Collection[str] = ()
    """The fields that a TOML file may not hold."""
    flags_after_dashes: str = ""
    """The program that the words after ``--`` are for, if any."""
    trains: bool = False
    """See `run`."""

    def parse(self, arguments: Sequence[str]) -> Settings:
        """Return the settings of a command line: see `given` and `made_from`."""
        return self.made_from(self.given(arguments))

    def given(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the texts of a command line by field: a list for a repeated flag, True for a switch.

        Of several texts for one field, the last one counts. Raises `UserError`, and `SystemExit(0)` after `--help`.
        """
        if {"-h", "--help"} & set(arguments):
            sys.stdout.write(self.help())
            raise SystemExit(0)
        given: dict[str, Any] = {}
        words = deque(arguments)
        while words:
            setting, text = self._setting_of(words.popleft(), given)
            if setting.kind is bool:
                if text is not None:
                    raise UserError(f"{setting.flag} is a switch and takes no value: leave {text!r} out")
                given[setting.name] = True
                continue
            if text is None:
                if not words or _looks_like_a_flag(words[0]):
                    raise UserError(f"{setting.flag} has no value: give {setting.usage}; --help lists all flags")
                text = words.popleft()
            text = setting.expanded(text)
            if setting.properties.repeated:
                given.setdefault(setting.name, []).append(text)
            else:
                given[setting.name] = text
        return given

    def made_from(self, texts: Mapping[str, Any]) -> Settings:
        """Return the settings with these texts; raise `UserError`."""
        values = {name: self._settings[name].value_of(text) for name, text in texts.items()}
        missing = [one.usage for one in self._settings.values() if one.is_required and one.name not in values]
        if missing:
            raise UserError(f"required: {', '.join(missing)}; --help lists all flags{self._after_dashes}")
        return self.settings(**values)

    def read_file(self, path: Path, without: Collection[str] = ()) -> dict[str, Any]:
        """Return the texts of a TOML file by field, except those named in `without`; raise `UserError`."""
        try:
            values = tomllib.loads(_text_of(path))
        except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
            raise UserError(f"the config file {path} is not valid TOML: {error}") from None
        except RecursionError:
            raise UserError(f"the config file {path} nests too deeply: give a flat TOML file") from None
        known, texts = self._settings.keys() - set(self.not_in_file), {}
        for name_in_file, value in values.items():
            name = self.renamed.get(name_in_file, name_in_file)
            if name in without:
                continue
            if name not in known:
                raise UserError(f"in the config file {path}: {unknown_name('setting', name, known, self.other_names)}")
            setting, is_switch = self._settings[name], isinstance(value, bool)
            if is_switch != (setting.kind is bool) or not isinstance(value, str | int | float):
                raise UserError(f"in the config file {path}: {name} = {value!r} is not a value for {setting.flag}")
            try:
                texts[name] = text = value if isinstance(value, bool) else setting.expanded(str(value))
                setting.value_of(text)
            except UserError as error:
                raise UserError(f"in the config file {path}: {error}") from None
        return texts

    def help(self) -> str:
        """Return the text of `--help`."""
        docstrings = docstrings_of(self.settings)
        required = [one for one in self._settings.values() if one.is_required]
        words = [f"{one.usage} ..." if one.is_positional and one.properties.repeated else one.usage for one in required]
        after = f" [-- flags of {self.flags_after_dashes}]" if self.flags_after_dashes else ""
        lines = [f"usage: {' '.join([self.program, *words])} [flags]{after}", "", *_wrapped(self.summary, 0), ""]
        lines += ["examples:", *(f"  {example}" for example in self.examples), ""] if self.examples else []
        for heading, names in self.groups.items():
            lines += [f"{heading}:", *(line for name in names for line in self._settings[name].help(docstrings)), ""]
        text = "\n".join([*lines, *_entry("-h, --help", "Print this text."), ""])
        return text.replace("python -m distdl.", "distdl ") if Path(sys.argv[0]).name == "distdl" else text

    @cached_property
    def _settings(self) -> dict[str, _Setting]:
        kinds = typing.get_type_hints(self.settings)
        return {name: _Setting(self, name, kinds[name]) for names in self.groups.values() for name in names}

    @property
    def _after_dashes(self) -> str:
        return f" (flags of {self.flags_after_dashes} go after --)" if self.flags_after_dashes else ""

    def _setting_of(self, word: str, given: Mapping[str, Any]) -> tuple[_Setting, str | None]:
        """Return the setting of a word, and the text in the same word, if any; raise `UserError`."""
        settings = self._settings.values()
        flag, equals, text = word.partition("=")
        if flag == "--help":
            raise UserError(f"--help takes no value: leave {equals + text!r} out")
        if word.startswith("--"):
            for setting in settings:
                if setting.flag == "--" + flag[2:].replace("_", "-"):
                    return setting, text if equals else None
            names = {one.flag[2:].replace("-", "_"): one.flag for one in settings if one.flag.startswith("--")}
            near = nearest(flag.replace("-", "_").removeprefix("__"), [*names, "help"], self.other_names)
            hint = f"did you mean {names.get(near, '--help')}?" if near else "--help lists all flags"
            raise UserError(f"unknown flag {flag}: {'leave it out' if flag == '--' else hint}{self._after_dashes}")
        for setting in settings:
            if len(setting.flag) == 2 and word.startswith(setting.flag):
                return setting, word[2:].removeprefix("=") or None
            is_free = setting.properties.repeated or setting.name not in given
            if setting.is_positional and is_free and not _looks_like_a_flag(word):
                return setting, word
        if word.startswith("-n"):
            raise UserError(f"unknown flag -n: to start 4 ranks, use mpirun -n 4 {self.program}{self._after_dashes}")
        raise UserError(f"unexpected argument {word!r}: --help lists all flags{self._after_dashes}")


def docstrings_of(settings: type) -> dict[str, str]:
    """Return the docstring after each field of a dataclass, from its source."""
    import ast  # noqa: PLC0415  only --help needs the source
    import inspect  # noqa: PLC0415
    import itertools  # noqa: PLC0415

    docstrings = {}
    for one in filter(dataclasses.is_dataclass, reversed(settings.__mro__)):
        (definition,) = ast.parse(inspect.getsource(one)).body
        assert isinstance(definition, ast.ClassDef)
        for declared, text in itertools.pairwise(definition.body):
            match declared, text:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(docstring))):
                    docstrings[name] = " ".join(docstring.split())
    return docstrings


def _wrapped(text: str, indent: int) -> list[str]:
    import textwrap  # noqa: PLC0415  only --help needs it

    before = " " * indent
    return textwrap.wrap(
        text, COLUMNS, initial_indent=before, subsequent_indent=before, break_on_hyphens=False, break_long_words=False
    )


def _entry(head: str, text: str) -> list[str]:
    """Return the lines of `--help` for a flag: the text beside it, or below if the flag is long."""
    lines = _wrapped(text, TEXT_COLUMN)
    if len(head) + 4 > TEXT_COLUMN:
        return [f"  {head}", *lines]
    return [f"  {head}".ljust(TEXT_COLUMN) + lines[0].lstrip(), *lines[1:]]


def _looks_like_a_flag(word: str) -> bool:
    """Return whether a word cannot be a value: it begins with a hyphen and is not a number."""
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word != "-"
    return False


def _text_of(path: Path) -> str:
    """Return the text of a config file. A device or pipe, which may never end, is not opened."""
    try:
        with open_regular(path, follow=True) as file:
            content = file.read(LARGEST_CONFIG_BYTES + 1)
    except NotRegularError:
        raise UserError(f"the config file {path} is not a regular file: give a TOML file") from None
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"cannot read the config file {str(path)!r}: no file can have this name") from None
    if len(content) > LARGEST_CONFIG_BYTES:
        raise UserError(
            f"the config file {path} is larger than {LARGEST_CONFIG_BYTES} bytes: give a TOML file of settings"
        )
    return content.decode()


def split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line at the first ``--`` into the command's own flags and those for another program."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


def set_blas_threads(count: int) -> None:
    """Set the number of threads of every BLAS that NumPy may use. Call it before the import of NumPy."""
    for name in ("OPENBLAS_NUM", "OMP_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM"):
        os.environ[f"{name}_THREADS"] = str(count)


def run(
    command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None, *, trains: bool = False
) -> int:
    """Call a command with the arguments of the process and return its exit code. Print a `DistdlError` as one line.

    Under a launcher, every rank raises most errors, such as a wrong flag, and rank 0 alone prints them. One rank alone
    may raise an error too, for example if a file is missing on its host: see `_tell_the_others`.

    If the command `trains`, the signals that stop a training wait until `distdl.engine.train` handles them.
    """
    if arguments is None:
        streams.use_utf8_names()
    if trains:
        held_signals.hold_signals()  # before there is a second thread
    launch = read_launch()
    if launch.by is not None:
        end_with_the_launcher()
    streams.prepare()
    atexit.register(gc.freeze)  # a search for garbage at exit takes a tenth of a second, for nothing
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        if {"-h", "--help"} & set(arguments):
            return _show_help(command, arguments) if launch.prints_for_all else 0
        return _called(command, arguments)
    except DistdlError as error:
        _report(error, launch)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        if launch.prints_for_all:
            when = f" ({interrupt})" if str(interrupt) else ""
            remedy = "; --resume continues from the last checkpoint, if there is one" if trains else ""
            streams.say_line(f"interrupted{when}{remedy}")
        return EXIT_INTERRUPTED


def _called(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Call a command; raise `UserError` if a limit of this process is behind its error."""
    limits.check_address_space()
    try:
        return command(arguments)
    except (RuntimeError, OSError, MemoryError, ImportError) as error:
        explained = limits.explained(error)
        if explained is error:
            raise
        raise explained from error


def _show_help(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Call a command that prints its help. A reader may stop reading before the end."""
    try:
        return command(arguments)
    except OSError:
        return 0
    finally:
        streams.write(sys.stdout, "")


def _report(error: DistdlError, launch: Launch) -> None:
    """Print an error once for all ranks, and let no rank wait for this one."""
    text = f"{error.label}{error}"
    if isinstance(error, HostError):
        if launch.local_rank == 0:
            from distdl.job.mpi_init import end_the_job_on_other_hosts  # noqa: PLC0415  rarely needed

            streams.say_line(text)
            end_the_job_on_other_hosts(launch)
        return
    is_printed = launch.prints_for_all
    if is_printed:
        streams.say_line(text)
    if launch.size > 1 and not error.agreed:
        _tell_the_others(error, launch)
        # The variables may be left over from another job: then there is no other rank, or this one is rank 0.
        if not is_printed and (launch.prints_for_all or launcher_is_missing(launch)):
            streams.say_line(text)


def _tell_the_others(error: DistdlError, launch: Launch) -> None:
    """Report an error that only this rank may have hit, and let no rank wait for this one.

    Before the world is made, all ranks meet there, and the others raise this error too. Later the job is aborted.
    If no world can be made, this rank waits, so that rank 0 can print its error first. If the others do not come, this
    rank prints its error and ends.
    """
    late: AbstractContextManager[None] = nullcontext()
    if "distdl.parallel.mpi" not in sys.modules:  # after the start of MPI nobody waits, and a rank should not fork
        late = streams.said_after(SECONDS_TO_MEET - 1, f"[rank {launch.rank}] {error.label}{error}")
    with late, Path(os.devnull).open("w") as nowhere:
        # This ends the process with exit code 1. It uses a thread without Python, which does not run while MPI starts.
        with suppress(RuntimeError):  # too many threads
            faulthandler.dump_traceback_later(SECONDS_TO_MEET, exit=True, file=nowhere)
        try:
            from distdl.parallel import tell_the_others  # noqa: PLC0415  it imports NumPy

            tell_the_others(error)
        except (UserError, ImportError, RuntimeError, OSError):
            if not launch.prints_for_all and not launcher_is_missing(launch):
                time.sleep(SILENT_SECONDS[launch.by or MPICH])
        finally:
            faulthandler.cancel_dump_traceback_later()
