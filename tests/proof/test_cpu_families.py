"""Two kinds of CPU, NumPy kernels: compare and replay name the first step, tensor and array that differ."""

import os
import re
import subprocess
import sys

import pytest
from cpu_families import FAMILIES, can_pretend

from distdl.job.launched_by import read_launch
from distdl.proof import replay_files

pytestmark = [
    pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher"),
    pytest.mark.skipif(not can_pretend(), reason="this CPU cannot compute as another kind"),
]

SETTINGS = ("--model", "mlp", "--max-steps", "12", "--record-hashes", "--log-every", "1")


def run_as(family, *arguments):
    """Run a command in a process that computes as this family; return its exit code and output."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **FAMILIES[family]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 1}, done.stderr
    return done.returncode, done.stdout


def trained_as(family, folder, kernels):
    code, _ = run_as(family, "distdl.train", *SETTINGS, "--kernels", kernels, "--run-dir", str(folder))
    assert code == 0
    return folder


def test_numpy_kernels_of_two_families_differ_first_in_the_output_of_a_layer(tmp_path):
    families = ("Haswell", "without AVX2 and FMA")  # any CPU that can pretend can compute as both
    runs = {family: trained_as(family, tmp_path / f"{n}", "numpy") for n, family in enumerate(families)}
    code, output = run_as("its own", "distdl.compare", *map(str, runs.values()))
    assert code == 1
    [step] = re.findall(r"DIFFERENT, first at step (\d+), tensor \w+\.\w+: hash", output)
    assert re.search(r"\n  fingerprint: \d+ of \d+ operations differ, first product ", output)
    assert "kernel families: " in output
    files = []
    for family, folder in runs.items():
        code, text = run_as(family, "distdl.replay", str(folder), "--step", step, "--micro-batch", "0")
        assert code == 0, text
        assert "the same bits as the run has recorded" in text
        files.append(str(replay_files.path_of(folder, int(step), 0)))
    code, output = run_as("its own", "distdl.compare", *files)
    assert code == 1
    assert re.match(r"DIFFERENT, first in (activations/affine_\d|losses|weights/\w+\.\w+), element ", output)
    code, text = run_as("Haswell", "distdl.replay", str(runs["without AVX2 and FMA"]), "--step", step)
    assert code == 1
    assert f"DIFFERENT from the records of the run, first at step {step}, tensor " in text
    assert "computed other bits than this one, first in: " in text


def test_compiled_kernels_of_two_families_are_equal(tmp_path):
    pytest.importorskip("numba")
    runs = [trained_as(family, tmp_path / f"{n}", "compiled") for n, family in enumerate(("Haswell", "its own"))]
    code, output = run_as("its own", "distdl.compare", *map(str, runs))
    assert code == 0, output
    assert "equal bit for bit: every record that both runs have, and all tensors after step 12\n" in output
