"""The examples that draw a trained network draw it, and end with the accuracy beside the book's."""

import os
import re
import sys
from pathlib import Path

import pytest

from distdl.launcher import read_launch

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")

REPOSITORY = Path(__file__).parents[2]
SECONDS = 120
PICTURES = {
    "chapter_7_filters": ["chapter_7_filters.png", "chapter_7_filters_maps.png"],
    "chapter_8_mistakes": ["chapter_8_mistakes.png", "chapter_8_mistakes_confusion.png"],
}


@pytest.fixture(scope="module")
def run(run_program):
    """Run an example in a folder, on a machine without a screen."""

    def run(name, folder, *flags):
        program = [sys.executable, str(REPOSITORY / "examples" / f"{name}.py"), *flags]
        env = {name: value for name, value in os.environ.items() if name not in {"DISPLAY", "MPLBACKEND"}}
        return run_program(program, env=env, cwd=folder, timeout=SECONDS)

    return run


@pytest.mark.parametrize("name", PICTURES)
def test_it_draws_and_ends_with_its_accuracy_beside_the_books(run, name, tmp_path):
    done = run(name, tmp_path, "--quick")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == PICTURES[name]
    for picture in PICTURES[name]:
        assert (tmp_path / "runs" / picture).read_bytes()[:4] == b"\x89PNG"
    trained = re.search(r"^test accuracy: ([0-9.]+)%$", done.stdout, re.MULTILINE)[1]
    *_, last = done.stdout.splitlines()
    assert re.match(r"test accuracy: (0\.\d+).*the book's.*0\.9", last), last
    assert f"{float(re.search(r'0.[0-9]+', last)[0]):.2%}" == f"{trained}%"


@pytest.mark.parametrize("name", PICTURES)
def test_a_wrong_flag_is_one_line(run, name, tmp_path):
    done = run(name, tmp_path, "--dataset", "mnst")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("distdl: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not any(path.stat().st_size for path in tmp_path.rglob("*.png"))
