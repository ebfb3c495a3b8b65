"""Every command in the README of the examples runs, alone and under mpirun."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import find_mpirun, mpirun_command

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "examples" / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    ")]
OF_TRAIN_DIGITS = [command for command in COMMANDS if "own_" not in command]
OF_OWN_MODEL = [command for command in COMMANDS if "own_model" in command]
OF_OWN_NETWORK = [command for command in COMMANDS if "own_network" in command]
SECONDS = 120

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")


@pytest.fixture(scope="module")
def finish(run_program):
    """Run a command line in a folder to its end."""
    # As on a user's machine, without the limits of threads in the tests' own process. A copy, because pytest changes
    # its environment in every test, while threads start programs.
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}

    def finish(command, folder):
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        variables = {}
        if "mpirun" in command:
            try:
                find_mpirun()
            except UserError as error:
                pytest.skip(str(error))
        if words[0] == "mpirun":
            assert words[1] == "-n"
            launch = mpirun_command(int(words[2]), words[3:])
            words, variables = launch.argv, launch.environment
        return run_program(words, env=env | {"PYTHONPATH": str(REPOSITORY)} | variables, cwd=folder, timeout=SECONDS)

    return finish


@pytest.fixture(scope="module")
def run(side_by_side, finish, tmp_path_factory):
    """Run a command line in its own folder with the examples; each only once."""

    def start(command):
        folder = tmp_path_factory.mktemp("run")
        (folder / "examples").symlink_to(REPOSITORY / "examples")
        return finish(command, folder)

    finished = side_by_side(test_the_command_succeeds_and_prints_its_receipt_once, start)
    return lambda command: finished(command=command)


def ranks_of(command):
    found = re.search(r"-n (\d+)", command)
    return int(found[1]) if found else 1


@pytest.mark.parametrize("commands", [OF_TRAIN_DIGITS, OF_OWN_NETWORK], ids=["train_digits", "own_network"])
def test_the_readme_has_commands_for_several_numbers_of_ranks(commands):
    assert len({ranks_of(command) for command in commands}) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_succeeds_and_prints_its_receipt_once(run, command):
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^weights sha256: [0-9a-f]{64}$", done.stdout, re.MULTILINE)) == 1
    if "distdl.train" not in command and "own_model" not in command:
        [(ranks, receipt)] = re.findall(r"the receipt of (\d+) rank\(s\) is ([0-9a-f]{64})", done.stdout)
        assert int(ranks) == ranks_of(command)
        assert f"weights sha256: {receipt}" in done.stdout
        [correct] = re.findall(r"([0-9.]+)% of the test images", done.stdout)
        assert float(correct) > 94


def test_your_own_network_takes_fifteen_lines():
    text = (REPOSITORY / "examples" / "own_model.py").read_text(encoding="utf-8")
    _, _, code = text.partition("import sys")
    lines = [line for line in ("import sys" + code).splitlines() if line.strip() and '"""' not in line]
    assert len(lines) <= 15
    assert len(OF_OWN_MODEL) == 3


@pytest.mark.parametrize(
    "commands", [OF_TRAIN_DIGITS, OF_OWN_MODEL, OF_OWN_NETWORK], ids=["train_digits", "own_model", "own_network"]
)
def test_all_commands_of_an_example_give_the_same_receipt(run, commands):
    receipts = {command: re.findall("weights sha256: (.*)", run(command).stdout) for command in commands}
    assert len({receipt for found in receipts.values() for receipt in found}) == 1, receipts


@pytest.mark.parametrize("command", OF_OWN_NETWORK)
def test_the_gradients_of_your_own_network_are_checked_and_printed_once(run, command):
    [error] = re.findall("gradient check: the largest relative error is (.*)", run(command).stdout)
    assert float(error) < 1e-7


def test_a_wrong_backward_ends_in_one_line_before_any_training(finish, tmp_path):
    text = (REPOSITORY / "examples" / "own_network.py").read_text(encoding="utf-8")
    right, wrong = "np.minimum(self.x, 0)", "np.maximum(self.x, 0)"
    assert text.count(right) == 1
    (tmp_path / "own_network.py").write_text(text.replace(right, wrong), encoding="utf-8")
    done = finish("mpirun -n 2 python own_network.py", tmp_path)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("distdl: error: the gradients")]) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_too_many_ranks_end_in_one_line_before_any_training(finish, tmp_path):
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    done = finish("mpirun -n 5 python examples/own_network.py", tmp_path)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("distdl: error: ")]
    assert len(told) == 1
    assert "5 ranks cannot share a batch of 4 micro-batches" in told[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
