"""The main job ends as README shows, and the commands of README for training work."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import find_mpirun

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="starts its own mpirun")

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
TIMEOUT_SECONDS = 120


def section(title):
    """Return the commands of a section of README, without their comments."""
    text = re.search(rf"^## {title}$(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("    ")]


def run(words, folder):
    here = {".venv/bin/python": [sys.executable], "launch/local.sh": ["env", f"PYTHON={sys.executable}"]}
    if words[0] == "launch/local.sh":
        here["launch/local.sh"].append(str(REPOSITORY / "launch" / "local.sh"))
    if "-n" in words or "--ranks" in words:
        try:
            find_mpirun()
        except UserError as error:
            pytest.skip(str(error))
    return subprocess.run(
        [*here[words[0]], *words[1:]],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """Return the output of the main job in one process and on four ranks, in lines."""
    commands = {1: ["-m", "distdl.train"], 4: ["-m", "distdl.mpirun", "-n", "4"]}
    ends = {}
    for ranks, words in commands.items():
        done = run([".venv/bin/python", *words], tmp_path_factory.mktemp(f"{ranks}-ranks"))
        assert done.returncode == 0, done.stderr
        assert max(map(len, done.stdout.splitlines())) <= 80
        ends[ranks] = done.stdout.splitlines()
    return ends


@pytest.fixture(scope="module")
def promised():
    """Return the last lines of a first run, as README shows them."""
    return [line[4:] for line in re.search(r"ends like this:\n\n((?: {4}.*\n)+)", README)[1].splitlines()]


def form(lines):
    """Return the lines without their figures, the digits of a receipt, and the kernels, which depend on the machine."""
    lines = [re.sub(r"^kernels: \w+$", "kernels: …", line) for line in lines]
    return [re.sub(r"\d[\d.,]*", "#", re.sub(r"[0-9a-f]{64}", "…", re.sub(r"\s+", " ", line))) for line in lines]


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_main_job_classifies_at_least_96_percent_of_the_test_images_correctly(ranks, printed):
    [found] = re.findall(r"^test accuracy: (\d+\.\d\d)%$", "\n".join(printed[ranks]), re.MULTILINE)
    assert float(found) >= 96


def test_the_main_job_has_the_same_receipt_in_one_process_and_on_four_ranks(printed):
    assert re.fullmatch("weights sha256: [0-9a-f]{64}", printed[1][-1])
    assert printed[4][-1] == printed[1][-1]


def test_a_first_run_ends_as_readme_shows_it(printed, promised):
    assert form(printed[4])[-len(promised) :] == form(promised)


@pytest.mark.parametrize("words", section("Train"), ids=" ".join)
def test_the_commands_for_training_work(words, tmp_path):
    if "--epochs" in words:
        words[words.index("--epochs") + 1] = "1"
    elif "--" in words:
        words = [*words, "--epochs", "1"]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("weights sha256: " in done.stdout) != ("--help" in words)
