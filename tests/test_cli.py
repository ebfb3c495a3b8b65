"""Command lines, `--help`, the console command, and the run of a command: one line and one exit code per error."""

import importlib
import io
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import distdl
from distdl import __main__ as console
from distdl import cli, train_command
from distdl.cli import Command, Flag
from distdl.errors import DamagedFileError, DistdlError, PeerLost, UserError
from distdl.job import held_signals
from distdl.job.launched_by import MPICH, OPEN_MPI, RANK_AND_SIZE


@pytest.fixture
def launched(monkeypatch):
    """Return a function that makes this process look like a rank of a launcher. By default there is no launcher."""
    for _, rank, size in RANK_AND_SIZE:
        monkeypatch.delenv(rank, raising=False)
        monkeypatch.delenv(size, raising=False)

    monkeypatch.setattr(cli, "launcher_is_missing", lambda _launch: False)

    def as_rank(rank, size=4):
        monkeypatch.setenv("PMI_RANK", str(rank))
        monkeypatch.setenv("PMI_SIZE", str(size))

    return as_rank


@pytest.fixture(autouse=True)
def slept(monkeypatch, launched):
    """Record the pauses instead of making them."""
    pauses = []
    monkeypatch.setattr(cli.time, "sleep", pauses.append)
    return pauses


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """Record the errors for the other ranks instead of sending them."""
    errors = []
    monkeypatch.setattr("distdl.parallel.tell_the_others", errors.append)
    return errors


def raising(error):
    def command(_arguments):
        raise error

    return command


def agreed(error):
    error.agreed = True
    return error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("--lr is 0"), 2, "distdl: error: --lr is 0\n"),
        (agreed(UserError("--lr is 0")), 2, "distdl: error: --lr is 0\n"),
        (DamagedFileError("a.safetensors is torn"), 3, "distdl: error: a.safetensors is torn\n"),
        (UserError("one\n  two\tthree\r\n\nfour "), 2, "distdl: error: one two three four\n"),
        (PeerLost("rank 1 is gone"), 1, "distdl: error: rank 1 is gone\n"),
        (DistdlError("odd"), 1, "distdl: error: odd\n"),
    ],
    ids=["user", "agreed", "damaged", "newlines", "peer lost", "other"],
)
@pytest.mark.parametrize("rank", [None, 0])
def test_an_error_is_one_line_and_an_exit_code(error, code, said, rank, launched, slept, told, capsys):
    if rank is not None:
        launched(rank)
    assert cli.run(raising(error), []) == code
    assert capsys.readouterr() == ("", said)
    assert told == ([] if rank is None or error.agreed else [error])
    assert slept == []


def test_only_rank_0_prints_an_error(launched, slept, told, capsys):
    errors = [UserError("--lr is 0"), DamagedFileError("torn")]
    for rank in (1, 3):
        launched(rank)
        assert [cli.run(raising(error), []) for error in errors] == [2, 3]
    assert capsys.readouterr() == ("", "")
    assert told == errors * 2
    assert slept == []


def test_a_single_rank_tells_no_other(launched, told):
    launched(0, size=1)
    assert cli.run(raising(UserError("--lr is 0")), []) == 2
    assert told == []


@pytest.mark.parametrize("why", [UserError("4 separate processes"), ImportError("no numpy")], ids=repr)
def test_if_ranks_cannot_meet_the_others_wait_until_rank_0_has_printed(why, launched, slept, monkeypatch, capsys):
    monkeypatch.setattr("distdl.parallel.tell_the_others", raising(why))
    launched(0)
    assert cli.run(raising(UserError("--lr is 0")), []) == 2
    assert (capsys.readouterr(), slept) == (("", "distdl: error: --lr is 0\n"), [])
    launched(1)
    assert cli.run(raising(UserError("--lr is 0")), []) == 2
    for name in ("PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert cli.run(raising(UserError("--lr is 0")), []) == 2
    assert capsys.readouterr() == ("", "")
    assert slept == [cli.SILENT_SECONDS[MPICH], cli.SILENT_SECONDS[OPEN_MPI]]


class Unread(io.StringIO):
    """A stream without a reader."""

    def flush(self):
        raise BrokenPipeError


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("stream", [None, Unread()], ids=["closed", "unread"])
def test_an_error_without_a_reader_still_has_its_exit_code(name, stream, monkeypatch):
    monkeypatch.setattr(sys, name, stream)
    assert cli.run(raising(UserError("--lr is 0")), []) == 2
    if stream is None:
        getattr(sys, name).close()


@pytest.mark.parametrize("closed", [">&- 2>&-", "2>&-", "2> /dev/full", "> /dev/full 2>&1", "2> >(true)"])
def test_a_message_that_cannot_be_printed_does_not_change_the_exit_code(closed):
    command = f"{sys.executable} -m distdl.train --epohcs 1 {closed}"
    assert subprocess.run(["bash", "-c", command], check=False, timeout=60).returncode == 2


@pytest.mark.parametrize("output", [">&-", "| true", "> /dev/full"])
def test_help_without_a_reader_exits_quietly(output):
    command = f"set -o pipefail; {sys.executable} -m distdl.train --help {output}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_agreed_error_needs_no_waiting(launched, slept, capsys):
    launched(1)
    assert cli.run(raising(agreed(UserError("--lr is 0"))), []) == 2
    assert capsys.readouterr() == ("", "")
    assert slept == []


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), SystemExit(0)], ids=repr)
def test_other_exceptions_pass_unchanged(error, capsys):
    with pytest.raises(type(error)) as caught:
        cli.run(raising(error), [])
    assert caught.value is error
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("trains", "words", "said"),
    [
        (True, (), "interrupted; --resume continues from the last checkpoint, if there is one"),
        (True, ("before the first step",), "interrupted (before the first step); --resume continues from the last"),
        (False, (), "interrupted\n"),
    ],
)
def test_an_interrupted_command_says_how_to_continue(trains, words, said, capsys, monkeypatch):
    monkeypatch.setattr("distdl.job.held_signals.hold_signals", lambda: None)
    assert cli.run(raising(KeyboardInterrupt(*words)), [], trains=trains) == 130
    out, found = capsys.readouterr()
    assert (out, found.count("\n")) == ("", 1)
    assert found.startswith(f"distdl: {said}")


@pytest.mark.parametrize("code", [0, 1, 75])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_returns_its_own_exit_code_on_every_rank(code, rank, launched):
    launched(rank)
    assert cli.run(lambda arguments: code, []) == code


def test_a_command_gets_the_arguments_of_the_process(monkeypatch):
    given = []
    monkeypatch.setattr(sys, "argv", ["program", "--lr", "0.1"])
    cli.run(lambda arguments: given.append(list(arguments)) or 0)
    cli.run(lambda arguments: given.append(list(arguments)) or 0, ["--seed", "1"])
    assert given == [["--lr", "0.1"], ["--seed", "1"]]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_shown_by_rank_0_alone(flag, launched, slept, monkeypatch, capsys):
    def command(_arguments):
        print("usage")
        return 0

    for rank in range(3):
        launched(rank)
        assert cli.run(command, ["--lr", "1", flag]) == 0
    assert capsys.readouterr() == ("usage\n", "")
    monkeypatch.setattr(sys, "argv", ["program", flag])
    assert cli.run(command) == 0
    assert capsys.readouterr() == ("", "")
    assert slept == []


def test_earlier_output_comes_before_the_error(monkeypatch):
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)

    def command(_arguments):
        print("banner")
        raise UserError("wrong")

    cli.run(command, [])
    assert both.getvalue() == "banner\ndistdl: error: wrong\n"


def test_a_character_that_the_terminal_cannot_show_is_plain_or_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.run(lambda arguments: print("4 ranks · λ") or 0, []) == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"4 ranks | \\u03bb\n"


class Pieces(io.RawIOBase):
    """Record each write."""

    def __init__(self):
        self.written = []

    def writable(self):
        return True

    def write(self, piece):
        self.written.append(bytes(piece))
        return len(piece)


def test_an_unbuffered_python_writes_a_line_in_one_piece(monkeypatch):
    """Open MPI's launcher would mix the start of a line with the output of the other stream."""
    pieces = Pieces()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pieces, write_through=True))
    assert cli.run(lambda arguments: print("one", 1) or print("two", end="") or 0, []) == 0
    assert pieces.written == [b"one 1\n"]
    sys.stdout.flush()
    assert pieces.written == [b"one 1\n", b"two"]


def test_every_blas_gets_the_number_of_threads(monkeypatch):
    names = [f"{name}_NUM_THREADS" for name in ("OPENBLAS", "OMP", "MKL", "BLIS")] + ["VECLIB_MAXIMUM_THREADS"]
    for name in names:
        monkeypatch.setenv(name, "9")
    cli.set_blas_threads(3)
    assert {name: os.environ[name] for name in names} == dict.fromkeys(names, "3")


def test_a_command_line_is_split_at_the_first_dashes():
    assert cli.split_at_dashes(["-n", "4"]) == (["-n", "4"], [])
    assert cli.split_at_dashes(["-n", "4", "--"]) == (["-n", "4"], [])
    assert cli.split_at_dashes(["-n", "4", "--", "--lr", "--", "x"]) == (["-n", "4"], ["--lr", "--", "x"])


@dataclass(frozen=True, kw_only=True)
class Example:
    """Flags of every type."""

    folder: Path
    """A folder."""
    count: int
    """A count."""
    names: tuple[str, ...] = ()
    """Names."""
    rate: float | None = None
    """A rate."""
    mode: Literal["fast", "slow"] = "fast"
    """A mode."""
    is_loud: bool = False
    """A switch."""
    shape: tuple[int, int] = (1, 1)
    """A shape."""
    hidden: int = 7
    """No flag."""


EXAMPLE = Command(
    program="example",
    summary="Show everything.",
    settings=Example,
    examples=("example FOLDER -n 2",),
    groups={"first": ("folder", "count", "shape"), "second": ("names", "rate", "mode", "is_loud")},
    flags={
        "folder": Flag(name="FOLDER"),
        "count": Flag(name="-n", value="COUNT"),
        "names": Flag(name="--name", repeated=True, names=("ada", "bob")),
        "shape": Flag(value="HxW", parse=lambda text: tuple(map(int, text.split("x")))),
    },
    flags_after_dashes="another program",
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("here -n 2", {}),
        ("-n=2 here", {}),
        ("-n2 here", {}),
        ("-n 1 here -n 2", {}),
        ("here -n 2 --rate -1e3", {"rate": -1e3}),
        ("here -n 2 --rate=3 --rate None", {}),
        ("here -n 2 --name=ada --name -", {"names": ("ada", "-")}),
        ("here -n 2 --is-loud --is_loud", {"is_loud": True}),
        ("here -n 2 --mode slow --shape=2x3", {"mode": "slow", "shape": (2, 3)}),
    ],
)
def test_a_command_line_becomes_an_object(line, expected):
    assert EXAMPLE.parse(line.split()) == Example(folder=Path("here"), count=2, **expected)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-n 2", "required: FOLDER; --help lists all flags (flags of another program go after --)"),
        ("here", "required: -n COUNT"),
        ("here there -n 2", "unexpected argument 'there': --help lists all flags"),
        ("here -n two", "-n must be a whole number, not 'two'; --help lists all flags"),
        ("here -n 2 --rate x", "--rate must be a number, not 'x'"),
        ("here -n 2 --mode last", "unknown mode 'last': expected one of fast, slow; did you mean 'fast'?"),
        ("here -n 2 --is-loud=yes", "--is-loud is a switch and takes no value: leave 'yes' out"),
        ("here -n 2 --name --is-loud", "--name has no value: give --name TEXT"),
        ("here -n", "-n has no value: give -n COUNT"),
        ("here -n 2 --nam x", "unknown flag --nam: did you mean --name? (flags of another program go after --)"),
        ("here -n 2 --hidden 3", "unknown flag --hidden: "),
        ("here -n 2 -x", "unexpected argument '-x'"),
        ("here -n 2 --help=3", "--help takes no value: leave '=3' out"),
        ("here -n 2 --", "unknown flag --: leave it out"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_a_remedy(line, said):
    with pytest.raises(UserError) as caught:
        EXAMPLE.parse(line.split())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_given_flags_are_in_the_texts():
    assert EXAMPLE.given(["--rate", "0.5", "--is-loud"]) == {"rate": "0.5", "is_loud": True}


def test_the_help_has_examples_and_then_groups():
    assert (
        EXAMPLE.help()
        == """\
usage: example FOLDER -n COUNT [flags] [-- flags of another program]

Show everything.

examples:
  example FOLDER -n 2

first:
  FOLDER                  A folder.
  -n COUNT                A count.
  --shape HxW             A shape.

second:
  --name TEXT             Names. Names: ada, bob.
  --rate X                A rate.
  --mode fast|slow        A mode. (default: fast)
  --is-loud               A switch.

  -h, --help              Print this text.
"""
    )


GROUPS = {
    "train": ["data", "model", "optimizer", "run and checkpoints", "faults", "ranks"],
    "mpirun": ["flags"],
    "verify": ["flags"],
    "evaluate": ["runs", "data", "results"],
    "predict": ["what", "results", "code and old checkpoints"],
    "report": ["flags"],
    "export": ["flags", "code and old checkpoints"],
    "compare": ["flags"],
    "replay": ["step", "data and model"],
    "audit": ["audit", "data and model"],
    "search": ["search", "run"],
    "bench": ["training", "measurement", "results"],
    "doctor": ["flags"],
}


@pytest.mark.parametrize("name", console.COMMANDS)
def test_the_help_of_each_command_fits_80_columns_and_shows_three_examples_and_its_groups(name):
    command = importlib.import_module(console.COMMANDS[name]).COMMAND
    lines = command.help().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:-1] for line in lines if re.fullmatch("[a-z ]+:", line)] == ["examples", *GROUPS[name]]
    assert lines[lines.index("examples:") + 4] == ""
    assert "None" not in command.help()
    for example in command.examples:
        words = example.split()
        own, _ = cli.split_at_dashes(words[words.index(f"distdl.{name}") + 1 :])
        command.parse(own)


@pytest.fixture
def distdl_command(pytestconfig, run_program):
    """Run `python -m distdl` with these arguments."""
    return lambda *arguments: run_program(
        [sys.executable, "-m", "distdl", *arguments], cwd=pytestconfig.rootpath, timeout=60
    )


def test_the_console_command_lists_all_commands_on_one_line_each(distdl_command):
    done = distdl_command("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert distdl_command().stdout == done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed == list(console.COMMANDS)


def test_the_console_command_prints_its_version(distdl_command):
    assert distdl_command("--version").stdout == f"distdl {distdl.__version__}\n"


@pytest.mark.parametrize("name", console.COMMANDS)
def test_the_console_command_runs_each_command(name, distdl_command):
    done = distdl_command(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m distdl.{name} ")
    wrong = distdl_command(name, "--nonsense")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("distdl: error: unknown flag --nonsense: ")


@pytest.mark.parametrize(
    ("name", "said"),
    [("--verison", "did you mean --version?"), ("--hepl", "did you mean --help?"), ("--x", "distdl --help lists all")],
)
def test_an_unknown_flag_of_the_console_command_is_reported_with_the_nearest(name, said, distdl_command):
    done = distdl_command(name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"distdl: error: unknown flag {name}: {said}")


def test_the_launchers_flag_leads_to_the_launcher():
    for words in (["-n", "4"], ["-n4"]):
        with pytest.raises(
            UserError, match=r"unknown flag -n: to start 4 ranks, use mpirun -n 4 python -m distdl\.train"
        ):
            train_command.COMMAND.parse(words)


def test_an_unknown_command_is_reported_with_the_nearest(distdl_command):
    done = distdl_command("evalaute", "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "distdl: error: unknown command 'evalaute': expected one of audit, bench, compare, doctor, "
    )
    assert done.stderr.endswith("; did you mean 'evaluate'?\n")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["tarin"]], ids=" ".join)
def test_the_console_command_needs_neither_numpy_nor_mpi(arguments, pytestconfig, run_program):
    program = (
        f"import sys; sys.argv = ['distdl', *{arguments}]\nfrom distdl.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'mpi4py'} & sys.modules.keys()))"
    )
    done = run_program([sys.executable, "-c", program], cwd=pytestconfig.rootpath, timeout=60)
    assert done.stdout.endswith("[]\n")
    assert "python -m" not in done.stdout


def test_the_console_command_runs_no_module_of_the_current_folder(monkeypatch, tmp_path):
    """As `python -m distdl.train` does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/distdl", "verify", "--nonsense"])
    assert console.main() == 2
    assert sys.path == ["elsewhere"]


def test_a_wrong_flag_ends_the_real_command_with_one_line_and_code_2(pytestconfig, launched):
    done = subprocess.run(
        [sys.executable, "-m", "distdl.train", "--epohcs", "3"],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "distdl: error: unknown flag --epohcs: did you mean --epochs?\n"


@pytest.mark.parametrize(("name", "module"), console.COMMANDS.items())
def test_only_commands_that_train_hold_signals_from_the_start(name, module, monkeypatch):
    """SIGTERM must end other commands and their child processes, which inherit blocked signals."""
    asked = []
    monkeypatch.setattr(cli, "run", lambda _, trains=False: asked.append(trains))
    module = "distdl.train" if module == "distdl.train_command" else module
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__")
    assert asked == [name in {"train", "search"}]


def test_signals_are_held_only_before_a_command_that_trains(monkeypatch):
    monkeypatch.setattr("distdl.job.held_signals._held", set())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    seen = []
    try:
        for trains in (False, True):
            cli.run(
                lambda _: seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()) - before) or 0, [], trains=trains
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert seen == [set(), held_signals.HELD]
