"""Under mpirun, `distdl.export` writes the file of one process, once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import without_launcher
from exported import command

from distdl.config import TrainConfig
from distdl.engine import train
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import mpirun_command
from distdl.parallel import OneProcess

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="starts its own mpirun")
pytest.importorskip("onnx")


def export_on(ranks, folder, *arguments):
    """Run `distdl.export` on several ranks in a folder; return the finished process."""
    launch = mpirun_command(ranks, [sys.executable, "-m", "distdl.export", *arguments])
    environment = {**without_launcher(os.environ), "PYTHONPATH": str(REPOSITORY), **launch.environment}
    return subprocess.run(
        launch.argv, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def run(tmp_path):
    train(TrainConfig(dataset="digits", model="mlp", max_steps=1, run_dir=tmp_path / "run"), OneProcess())
    return tmp_path / "run"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_the_file_of_one_process_once(ranks, run, tmp_path, needs_mpirun):
    done = export_on(ranks, tmp_path, "run", "--to", "onnx", "--out", "ranks.onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ranks.onnx") == 1
    assert command(run, "--to", "onnx", "--out", tmp_path / "one.onnx")[0] == 0
    assert (tmp_path / "ranks.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()


def test_ranks_report_an_error_once(run, tmp_path, needs_mpirun):
    for arguments in (["run", "--to", "onnx", "--out", "run"], ["missing", "--to", "npz"], ["run", "--to", "onx"]):
        done = export_on(2, tmp_path, *arguments)
        assert done.returncode == 2, done.stderr
        assert (done.stdout + done.stderr).count("distdl: error: ") == 1
        assert "Traceback" not in done.stderr
