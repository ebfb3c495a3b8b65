"""The comparison with PyTorch runs, and reports errors in one line.

PyTorch is that of this environment, or of the interpreter that DISTDL_TORCH_PYTHON names.
"""

import importlib.util
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distdl.job.launched_by import read_launch

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "versus_pytorch.py"
SECONDS = 300

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")


@pytest.fixture(scope="module")
def versus_pytorch(run_program):
    """Run the comparison to its end."""
    return lambda *arguments: run_program([sys.executable, EXAMPLE, *arguments], timeout=SECONDS)


@pytest.fixture(scope="module")
def torch_python():
    named = os.environ.get("DISTDL_TORCH_PYTHON")
    if named is None and importlib.util.find_spec("torch") is None:
        pytest.skip("no PyTorch here: pip install torch, or set DISTDL_TORCH_PYTHON to an interpreter that has it")
    return named or sys.executable


def cells_of(done, rows):
    """Return the cells of the table, row by row; check that all ratios and speeds are above 0."""
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"
    assert len(lines) == 2 + rows
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    for _, ours, default, _, ratio in cells:
        assert int(re.fullmatch(r"([\d,]+) ±\d+%", ours)[1].replace(",", "")) > 0
        assert int(re.fullmatch(r"([\d,]+) ±\d+% \((?:fused|foreach)\)", default)[1].replace(",", "")) > 0
        assert float(re.fullmatch(r"\*\*(\d+\.\d\d) ×\*\* \(\d+\.\d\d to \d+\.\d\d\)", ratio)[1]) > 0
    return cells


def test_one_rank_takes_turns_with_pytorch(versus_pytorch, torch_python):
    done = versus_pytorch("--quick", "--rows", "simple_convnet-1,deep_convnet-1", "--torch-python", torch_python)
    cells = cells_of(done, 2)
    assert [row[0] for row in cells] == ["SimpleConvNet, 1 rank, batch 100", "DeepConvNet, 1 rank, batch 100"]
    assert all(row[3] != "–" for row in cells)
    assert "simple_convnet-1 100, deep_convnet-1 100" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("DeepConvNet, 1 rank, batch 100: ")]


@pytest.mark.parametrize("name", ["mlp-2", "deep_convnet-1"])
def test_the_side_of_distdl_needs_no_pytorch(monkeypatch, needs_mpirun, name):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    example = __import__("versus_pytorch")
    job = replace(example.ROWS[name], samples=256)
    with example.distdl_side(job) as side:
        assert side.forms == ["distdl"]
        assert side.samples_per_second("distdl", 3) > 0


def test_two_ranks_take_turns_with_ddp(versus_pytorch, torch_python, needs_mpirun):
    rows = ("--rows", "mlp-2", "--micro-batch-size", "32")
    done = versus_pytorch("--quick", *rows, "--torch-python", torch_python)
    [cells] = cells_of(done, 1)
    assert cells[0] == "MLP 784-100-10, 2 ranks, batch 128"
    assert cells[3] == "–"  # an MLP has no channels
    assert "mlp-2 32" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "simple_convnet"], "simple_convnet-"),
        (["--rounds", "0"], "--rounds 0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--seconds", "soon"], "--seconds must be a number, not 'soon'"),
        (["--micro-batch-size", "80"], "expected 1 to 64"),
        (["--torch-python", "no/such/python"], "cannot run no/such/python: No such file or directory"),
    ],
)
def test_invalid_flags_end_in_one_line(versus_pytorch, arguments, said):
    assert_one_line(versus_pytorch(*arguments), said)


def test_without_pytorch_the_line_says_how_to_get_it(versus_pytorch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert_one_line(versus_pytorch("--torch-python", python), "pip install torch")


def test_a_side_that_dies_ends_the_comparison(versus_pytorch, tmp_path):
    """The side has PyTorch, but ends instead of connecting."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n[ \"$1\" = -c ] && exit 0\necho 'it broke' >&2\nexit 3\n")
    python.chmod(0o755)
    done = versus_pytorch("--quick", "--rows", "simple_convnet-1", "--torch-python", python)
    assert done.returncode == 2
    assert "it broke" in done.stderr
    assert "PyTorch's side of SimpleConvNet, 1 rank, batch 100 did not stay alive" in done.stderr
    assert "Traceback" not in done.stderr


def assert_one_line(done, said):
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert said in line
    assert done.stdout == ""
