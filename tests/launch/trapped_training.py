"""Trainings with a fault in their eighth step, started as a user starts them, and the receipt without the fault."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest

from distdl.job.launched_by import read_launch
from distdl.job.processes import look_at

REPOSITORY = Path(__file__).parents[2]
LOCAL_SH = REPOSITORY / "launch" / "local.sh"
TRAINING = ["--model", "mlp", "--epochs", "2", "--checkpoint-every", "3", "--kernels", "numpy"]
SECONDS_AGAINST_HANGING = 120

#: Before its eighth step a rank runs the trap, unless an earlier start has created the file `sprung`.
PROGRAM = """
import os, pathlib, signal, sys, time
from distdl import cli
from distdl.job.processes import ancestors

def spring(rank):
{trap}

def main(arguments):
    from distdl.train_command import parse
    config = parse(arguments)
    cli.set_blas_threads(1)
    from distdl.engine import train
    from distdl.engine.fault_injection import fail_at
    from distdl.job.launched_by import read_launch
    rank = read_launch().rank
    process = pathlib.Path(f"process-{{rank}}")
    fail_at("step", rank=None, action=lambda _: process.write_text(str(os.getpid())))
    if not pathlib.Path("sprung").exists():
        fail_at("step", rank=None, step=8, action=lambda _: spring(rank))
    train(config)
    return 0

sys.exit(cli.run(main))
"""
WAIT_FOREVER = """
pathlib.Path("sprung").touch()
pathlib.Path(f"waits-{rank}").touch()
time.sleep(600)
"""

needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None
    or read_launch().by is not None,
    reason="this environment has no mpirun, or this process is a rank",
)


def write_trap(folder, trap):
    """Write the module `trapped` and return its environment; the code of the trap can use the variable `rank`.

    The temporary folder lies in `folder`, so files of a killed launcher are removed with it.
    """
    lines = [f"    {line}" for line in trap.strip().splitlines()]
    (folder / "trapped.py").write_text(PROGRAM.format(trap="\n".join(lines)))
    (folder / "tmp").mkdir(exist_ok=True)
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}",
        "TMPDIR": str(folder / "tmp"),
    }


def start(folder, trap, *arguments, flags=()):
    """Start `launch/local.sh` on three ranks in the folder."""
    return subprocess.Popen(
        [LOCAL_SH, "-n", "3", "--module", "trapped", *arguments, "--", *TRAINING, *flags],
        cwd=folder,
        env=write_trap(folder, trap),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """Wait for the end; return the exit code, the output and the errors."""
    with process:
        try:
            printed, errors = process.communicate(timeout=SECONDS_AGAINST_HANGING)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, printed, errors


def receipt_of(printed):
    return re.findall(r"^weights sha256: (\w{64})$", printed, re.MULTILINE)


@cache
def undisturbed_receipt():
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "distdl.train", *TRAINING, "--run-dir", f"{folder}/run"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return receipt_of(done.stdout)


def until(condition):
    """Wait until the condition holds; the time limit is only against hanging."""
    deadline = time.monotonic() + SECONDS_AGAINST_HANGING
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def ranks_of(folder):
    """Return the process numbers of the ranks that have taken a step."""
    return [int(text) for path in folder.glob("process-*") if (text := path.read_text())]


def are_gone(processes):
    return all(look_at(process) is None for process in processes)
