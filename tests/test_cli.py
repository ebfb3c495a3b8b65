"""What a person sees of an error: one line, once, and the exit code that the design gives it."""

import io
import os
import runpy
import signal
import subprocess
import sys

import pytest

from distdl import cli
from distdl.errors import DamagedFileError, DistdlError, PeerLost, UserError
from distdl.job import signals
from distdl.job.launcher import OPEN_MPI, RANK_AND_SIZE


@pytest.fixture
def launched(monkeypatch):
    """Makes this process look like a rank that a launcher started; by default it is none."""
    for _, rank, size in RANK_AND_SIZE:
        monkeypatch.delenv(rank, raising=False)
        monkeypatch.delenv(size, raising=False)

    def as_rank(rank, size=4):
        monkeypatch.setenv("PMI_RANK", str(rank))
        monkeypatch.setenv("PMI_SIZE", str(size))

    return as_rank


@pytest.fixture(autouse=True)
def slept(monkeypatch, launched):
    """The pauses that were asked for; none is made."""
    pauses = []
    monkeypatch.setattr(cli.time, "sleep", pauses.append)
    return pauses


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """The errors that the other ranks were told of; nobody is."""
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


def test_the_other_ranks_leave_it_to_rank_0_to_speak(launched, slept, told, capsys):
    errors = [UserError("--lr is 0"), DamagedFileError("torn")]
    for rank in (1, 3):
        launched(rank)
        assert [cli.run(raising(error), []) for error in errors] == [2, 3]
    assert capsys.readouterr() == ("", "")
    assert told == errors * 2
    assert slept == []


def test_one_rank_has_nobody_to_tell(launched, told):
    launched(0, size=1)
    assert cli.run(raising(UserError("--lr is 0")), []) == 2
    assert told == []


@pytest.mark.parametrize("why", [UserError("4 separate processes"), ImportError("no numpy")], ids=repr)
def test_where_ranks_cannot_meet_the_others_wait_for_rank_0_to_speak(why, launched, slept, monkeypatch, capsys):
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
    assert slept == [cli.OTHERS_SILENT_SECONDS, cli.SILENT_SECONDS[OPEN_MPI]]


class Unread(io.StringIO):
    """A stream whose reader is gone."""

    def flush(self):
        raise BrokenPipeError


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("stream", [None, Unread()], ids=["closed", "unread"])
def test_an_error_that_nobody_can_read_still_has_its_exit_code(name, stream, monkeypatch):
    monkeypatch.setattr(sys, name, stream)
    assert cli.run(raising(UserError("--lr is 0")), []) == 2
    if stream is None:
        getattr(sys, name).close()


@pytest.mark.parametrize("closed", [">&- 2>&-", "2>&-", "2> /dev/full", "> /dev/full 2>&1", "2> >(true)"])
def test_what_cannot_be_said_does_not_change_the_exit_code_at_the_end_of_python(closed):
    command = f"{sys.executable} -m distdl.train --epohcs 1 {closed}"
    assert subprocess.run(["bash", "-c", command], check=False, timeout=60).returncode == 2


@pytest.mark.parametrize("output", [">&-", "| true", "> /dev/full"])
def test_help_that_nobody_can_read_ends_quietly(output):
    command = f"set -o pipefail; {sys.executable} -m distdl.train --help {output}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_that_all_ranks_agreed_on_needs_no_waiting(launched, slept, capsys):
    launched(1)
    assert cli.run(raising(agreed(UserError("--lr is 0"))), []) == 2
    assert capsys.readouterr() == ("", "")
    assert slept == []


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), SystemExit(0)], ids=repr)
def test_what_is_no_error_of_the_users_passes_as_it_is(error, capsys):
    with pytest.raises(type(error)) as caught:
        cli.run(raising(error), [])
    assert caught.value is error
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_command_says_how_to_go_on(capsys):
    assert cli.run(raising(KeyboardInterrupt()), []) == 130
    out, said = capsys.readouterr()
    assert (out, said.count("\n")) == ("", 1)
    assert said.startswith("distdl: interrupted; --resume")


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


def test_what_was_printed_comes_before_the_error(monkeypatch):
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)

    def command(_arguments):
        print("banner")
        raise UserError("wrong")

    cli.run(command, [])
    assert both.getvalue() == "banner\ndistdl: error: wrong\n"


def test_a_character_that_the_terminal_lacks_does_not_end_the_command(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.run(lambda arguments: print("4 ranks · λ") or 0, []) == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"4 ranks \\xb7 \\u03bb\n"


class Pieces(io.RawIOBase):
    """Takes down what is written at a time."""

    def __init__(self):
        self.written = []

    def writable(self):
        return True

    def write(self, piece):
        self.written.append(bytes(piece))
        return len(piece)


def test_a_line_leaves_in_one_piece_where_python_is_unbuffered(monkeypatch):
    """Open MPI's launcher would put a line without its end in front of what comes on the other stream."""
    pieces = Pieces()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pieces, write_through=True))
    assert cli.run(lambda arguments: print("one", 1) or print("two", end="") or 0, []) == 0
    assert pieces.written == [b"one 1\n"]
    sys.stdout.flush()
    assert pieces.written == [b"one 1\n", b"two"]


def test_the_number_of_threads_is_told_to_every_blas(monkeypatch):
    names = [f"{name}_NUM_THREADS" for name in ("OPENBLAS", "OMP", "MKL", "BLIS")] + ["VECLIB_MAXIMUM_THREADS"]
    for name in names:
        monkeypatch.setenv(name, "9")
    cli.set_blas_threads(3)
    assert {name: os.environ[name] for name in names} == dict.fromkeys(names, "3")


def test_a_command_hands_on_what_stands_behind_the_first_dashes():
    assert cli.split_at_dashes(["-n", "4"]) == (["-n", "4"], [])
    assert cli.split_at_dashes(["-n", "4", "--"]) == (["-n", "4"], [])
    assert cli.split_at_dashes(["-n", "4", "--", "--lr", "--", "x"]) == (["-n", "4"], ["--lr", "--", "x"])


def test_a_parser_raises_one_line_and_takes_no_abbreviation():
    parser = cli.OneLineParser(prog="program", advice="see --help")
    parser.add_argument("--ranks", type=int)
    assert parser.parse_args(["--ranks", "2"]).ranks == 2
    for wrong in (["--ranks", "two"], ["--rank", "2"], ["2"]):
        with pytest.raises(UserError, match=r"^[^\n]*; see --help$"):
            parser.parse_args(wrong)


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


@pytest.mark.parametrize(
    ("module", "trains"),
    [("train", True), ("search", True), ("evaluate", False), ("bench", False), ("verify", False), ("mpirun", False)],
)
def test_commands_that_train_hold_signals_from_the_start_and_no_others_do(module, trains, monkeypatch):
    """Who never listens must be ended by SIGTERM, and so must what it starts: programs keep what is blocked."""
    asked = []
    monkeypatch.setattr(cli, "run", lambda _, trains=False: asked.append(trains))
    monkeypatch.delitem(sys.modules, f"distdl.{module}", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module(f"distdl.{module}", run_name="__main__")
    assert asked == [trains]


def test_signals_are_held_before_a_command_that_trains_and_for_no_other(monkeypatch):
    monkeypatch.setattr("distdl.job.signals._held", set())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    seen = []
    try:
        for trains in (False, True):
            cli.run(
                lambda _: seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()) - before) or 0, [], trains=trains
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert seen == [set(), signals.HELD]
