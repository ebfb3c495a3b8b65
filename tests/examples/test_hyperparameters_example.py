"""The book's search, reduced: it draws its picture, and ends with the book's figure beside its own, on any ranks."""

import json
import sys
from pathlib import Path

import pytest

from distdl.launcher import read_launch
from distdl.mpirun import mpirun_command

EXAMPLE = Path(__file__).parents[2] / "examples" / "chapter_6_hyperparameters.py"
SECONDS = 120

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")


def of_search(folder, name):
    [found] = (folder / "runs").glob(f"*-search/{name}")
    return found


def test_the_search_ends_with_the_figure_of_the_book_beside_its_own(run_program, tmp_path):
    pytest.importorskip("matplotlib")
    done = run_program([sys.executable, EXAMPLE, "--quick", "--seed", "1"], cwd=tmp_path, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    best = json.loads(of_search(tmp_path, "summary.json").read_text())["best"]
    last = done.stdout.splitlines()[-1]
    assert last.startswith(
        f"best: validation {best['validation_accuracy']:.4f}, test {best['test_accuracy']:.4f} with lr"
    )
    assert last.endswith("(the book, on MNIST: .83 with lr .0092 and weight decay 3.86e-07)")
    assert (tmp_path / "runs" / "chapter_6_hyperparameters.png").read_bytes().startswith(b"\x89PNG")
    samples = json.loads(of_search(tmp_path, "search.json").read_text())
    assert samples["ranges"] == ["lr=1e-06:0.01:log", "weight-decay=1e-08:0.0001:log"]


def test_a_wrong_option_ends_in_one_line_on_any_number_of_ranks(run_job, tmp_path):
    pytest.importorskip("matplotlib")
    done = run_job(
        mpirun_command(2, [sys.executable, str(EXAMPLE), "--dataset", "mnits"]), timeout=SECONDS, cwd=tmp_path
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("distdl: error: unknown dataset 'mnits'") == 1
