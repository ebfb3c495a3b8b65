"""`kill -9` of mpirun: no rank survives, and the next start sweeps the leftovers and continues the run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from trapped_training import (
    TRAINING,
    WAIT_FOREVER,
    are_gone,
    ended,
    needs_mpirun,
    ranks_of,
    receipt_of,
    start,
    undisturbed_receipt,
    until,
    write_trap,
)

from distdl.job import leftovers
from distdl.job.mpirun_command import mpirun_command
from distdl.parallel import shared

pytestmark = needs_mpirun
BUSY_FOREVER = WAIT_FOREVER.replace("time.sleep(600)", "while True:\n    pass")


def registers_of(launcher):
    """Return the registers of a job's ranks, and the files that they list."""
    found = {}
    for path in Path("/dev/shm").glob(leftovers.REGISTER + "*"):
        try:
            written = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):  # of another job, which starts or ends
            continue
        if launcher in [one["pid"] for one in written["launchers"]]:
            found[path] = written["made"]
    return found


@pytest.mark.parametrize("trap", [WAIT_FOREVER, BUSY_FOREVER], ids=["asleep", "busy"])
def test_no_rank_outlives_its_launcher_and_the_next_start_sweeps_and_continues(tmp_path, trap):
    process = start(tmp_path, trap, flags=["--run-dir", "run"])
    until(lambda: len(list(tmp_path.glob("waits-*"))) == 3)
    ranks, registers = ranks_of(tmp_path), registers_of(process.pid)
    assert len(registers) == 3
    made = {path for paths in registers.values() for path in paths}
    assert made
    assert all(Path(path).exists() for path in made)
    os.kill(ranks[1], signal.SIGSTOP)  # a stopped rank cannot watch its launcher
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    until(lambda: are_gone(ranks))

    code, printed, errors = ended(start(tmp_path, trap, flags=["--run-dir", "run", "--resume", "auto"]))
    assert code == 0, errors
    assert "resumed from run/checkpoints" in printed
    assert receipt_of(printed) == undisturbed_receipt()
    assert not [path for path in [*made, *registers] if Path(path).exists()]


def test_a_rank_started_by_a_shell_does_not_outlive_the_launcher_either(tmp_path):
    environment = write_trap(tmp_path, WAIT_FOREVER)
    training = [sys.executable, "-m", "trapped", *TRAINING, "--run-dir", "run"]
    launch = mpirun_command(3, ["/bin/sh", "-c", '"$@"; exit $?', "sh", *training])
    process = subprocess.Popen(launch.argv, cwd=tmp_path, env=environment | launch.environment)
    until(lambda: len(list(tmp_path.glob("waits-*"))) == 3)
    ranks = ranks_of(tmp_path)
    process.kill()
    process.wait()
    until(lambda: are_gone(ranks))


def test_a_rank_that_starts_after_the_end_of_its_launcher_ends(tmp_path):
    """Its launcher ends while it loads Python. It neither waits nor trains."""
    (tmp_path / "late.py").write_text("""
import os, pathlib, runpy, time
launcher = os.getppid()
pathlib.Path(f"process-{os.getpid()}").write_text(str(os.getpid()))
while os.getppid() == launcher:
    time.sleep(0.01)
runpy.run_module("distdl.train", run_name="__main__")
""")
    launch = mpirun_command(3, [sys.executable, "-m", "late", *TRAINING, "--run-dir", "run"])
    environment = write_trap(tmp_path, "pass") | launch.environment
    process = subprocess.Popen(launch.argv, cwd=tmp_path, env=environment)
    until(lambda: len(ranks_of(tmp_path)) == 3)
    ranks = ranks_of(tmp_path)
    process.kill()
    process.wait()
    until(lambda: are_gone(ranks))
    assert not (tmp_path / "run").exists()


def test_an_ordinary_end_leaves_no_register(tmp_path):
    trap = WAIT_FOREVER.replace("time.sleep(600)", 'while not pathlib.Path("go").exists():\n    time.sleep(0.01)')
    process = start(tmp_path, trap, flags=["--run-dir", "run"])
    until(lambda: len(list(tmp_path.glob("waits-*"))) == 3)
    registers = registers_of(process.pid)
    assert len(registers) == 3
    leftovers.sweep(shared.folders())  # removes nothing of living ranks
    assert all(path.exists() for path in registers)
    assert all(Path(path).exists() for made in registers.values() for path in made)
    (tmp_path / "go").touch()
    code, printed, errors = ended(process)
    assert code == 0, errors
    assert receipt_of(printed) == undisturbed_receipt()
    assert not [path for path in registers if path.exists()]
