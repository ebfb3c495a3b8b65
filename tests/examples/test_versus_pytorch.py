"""The comparison with PyTorch runs, and reports errors in one line.

PyTorch is that of this environment, or of the interpreter that DISTDL_TORCH_PYTHON names.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.nn import MODELS, build_model

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


@pytest.fixture
def example(monkeypatch):
    """Return a module of the examples by name."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return importlib.import_module


@pytest.mark.parametrize("name", ["mlp-2", "deep_convnet-1"])
def test_the_turns_of_distdl_need_no_pytorch(example, needs_mpirun, name):
    job = replace(example("versus_results").ROWS[name], steps=2, kernels="numpy")
    with example("versus_turns").distdl_side(job) as side:
        assert (side.forms, side.kernels) == (["distdl"], "numpy")
        assert side.samples_per_second("distdl", 3) > 0


@pytest.mark.parametrize("source", ["random pixels", "MNIST"])
def test_a_run_of_distdl_trains_on_the_samples_of_its_steps(example, needs_mpirun, request, tmp_path, source):
    data_dir = request.getfixturevalue("mnist_dir") if source == "MNIST" else None
    runs, row = example("versus_runs"), example("versus_results").ROWS["mlp-2"]
    job = replace(row, steps=5, epochs=3)
    runs.write_mnist(tmp_path, job, data_dir)
    done = runs.run_distdl(tmp_path, job)
    assert [epoch["samples"] for epoch in done["epochs"]] == [5 * 128] * 3
    assert done["about"].startswith("distdl on NumPy ")
    assert runs.rate_after_warm_up(done["epochs"]) > 0


def test_the_warm_up_does_not_count(example):
    epochs = [{"samples": 10, "seconds": 9.0}, {"samples": 10, "seconds": 1.0}, {"samples": 10, "seconds": 4.0}]
    assert example("versus_runs").rate_after_warm_up(epochs) == 4.0


def test_too_few_images_are_refused(example, mnist_dir, tmp_path):
    job = replace(example("versus_results").ROWS["mlp-2"], steps=500)
    with pytest.raises(UserError, match="70000 images: MLP 784-100-10, 2 ranks, batch 128 needs 71211"):
        example("versus_runs").write_mnist(tmp_path, job, mnist_dir)


def test_both_sides_have_the_same_networks(torch_python, tmp_path):
    """Each has the same parameters and the same operations of products as its twin."""
    program = tmp_path / "count.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r})\n"
        "import json, torch, pytorch_models\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "found = {}\n"
        "for name, model in pytorch_models.MODELS.items():\n"
        "    with torch.device('meta'), FlopCounterMode(display=False) as counter:\n"
        "        network = model()\n"
        "        network(torch.zeros(2, 1, 28, 28))\n"
        "    sizes = sorted(weights.numel() for weights in network.parameters())\n"
        "    found[name] = [sizes, counter.get_total_flops()]\n"
        "print(json.dumps(found))\n"
    )
    printed = subprocess.run([torch_python, program], capture_output=True, text=True, check=True).stdout
    expected = {}
    for name in MODELS:
        network = build_model(name, (28, 28, 1), 10)
        sizes = sorted(weights.size for _, weights in network.named_parameters())
        products = [product for _, _, products in network.parts(2) for product in products.forward]
        expected[name] = [sizes, sum(product.operations for product in products)]
    assert json.loads(printed) == expected


def test_whole_runs_are_compared_and_kept(versus_pytorch, torch_python, tmp_path):
    kept = tmp_path / "days.jsonl"
    row = ("--rows", "mlp-1", "--torch-python", torch_python)
    done = versus_pytorch("--quick", "--whole-runs", *row, "--json", kept)
    [cells] = cells_of(done, 1)
    assert cells[0] == "MLP 784-100-10, 1 rank, batch 100"
    [merged] = [line for line in versus_pytorch("--table", kept).stdout.splitlines() if line.startswith("| MLP")]
    assert merged.split("|")[2].strip() == "runs"
    assert cells[4].split()[0] in merged


def result_of(example, date, ours, **changes):
    results = example("versus_results")
    known = {
        "job": results.ROWS["lenet-2"],
        "way": "runs",
        "kernels": "compiled",
        "theirs": {"default, fused Adam": [10.0, 10.0], "channels-last, foreach Adam": [5.0, 5.0]},
        "about": "distdl; PyTorch",
        "cpu": "a CPU",
    }
    return results.Result(ours=ours, date=date, **{**known, **changes})


def test_results_of_several_days_become_one_table(example, tmp_path):
    results = example("versus_results")
    days = [
        result_of(example, "2026-01-01", [20.0, 20.0]),
        result_of(example, "2026-01-02", [30.0, 30.0]),
        result_of(example, "2026-01-02", [10.0, 20.0]),
        result_of(example, "2026-01-02", [9.0, 9.0], kernels="numpy"),
        result_of(example, "2026-01-02", [8.0, 8.0], way="turns"),
    ]
    for day in days:
        results.save(tmp_path / "days.jsonl", day)
    read = results.load(tmp_path / "days.jsonl")
    assert read == days
    _, _, compiled, numpy, turns, *notes = results.merged_table(read)
    title = "LeNet, 2 ranks, batch 128"
    assert [cell.strip() for cell in compiled.split("|")[1:-1]] == [
        *(title, "runs", "compiled", "64", "2 (3 times)", "20 (15 to 30)", "10 (10 to 10)", "**2.00 ×** (1.50 to 3.00)")
    ]
    assert [cell.strip() for cell in numpy.split("|")[1:5]] == [title, "runs", "numpy", "64"]
    assert [cell.strip() for cell in turns.split("|")[1:5]] == [title, "turns", "compiled", "64"]
    assert notes[2:] == ["2026-01-01: a CPU; distdl; PyTorch.", "2026-01-02: a CPU; distdl; PyTorch."]


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
        (["--kernels", "fast"], "unknown kernels 'fast'"),
        (["--whole-runs", "--epochs", "1"], "expected at least 2"),
        (["--epochs", "3"], "give --whole-runs too"),
        (["--data-dir", "folder"], "give --whole-runs too"),
        (["--json", "."], "--json . is a folder"),
        (["--table", "no/such/file"], "cannot read no/such/file: No such file or directory"),
        (["--table", EXAMPLE], "does not hold results"),
    ],
)
def test_invalid_flags_end_in_one_line(versus_pytorch, arguments, said):
    assert_one_line(versus_pytorch(*arguments), said)


def test_without_pytorch_the_line_says_how_to_get_it(versus_pytorch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert_one_line(versus_pytorch("--torch-python", python), "pip install torch")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "PyTorch's side of SimpleConvNet, 1 rank, batch 100 did not stay alive"),
        (["--whole-runs"], "PyTorch's run of SimpleConvNet, 1 rank, batch 100 failed"),
    ],
)
def test_a_side_that_dies_ends_the_comparison(versus_pytorch, tmp_path, flags, said):
    """The side has PyTorch, but ends instead of connecting."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n[ \"$1\" = -c ] && exit 0\necho 'it broke' >&2\nexit 3\n")
    python.chmod(0o755)
    done = versus_pytorch("--quick", *flags, "--rows", "simple_convnet-1", "--torch-python", python)
    assert done.returncode == 2
    assert "it broke" in done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def assert_one_line(done, said):
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert said in line
    assert done.stdout == ""
