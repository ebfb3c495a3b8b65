"""Plain `pytest` runs the MPI tests too: it starts itself under mpirun, at several numbers of ranks."""

import re
import sys

import pytest

from distdl.mpirun import mpirun_command

SECONDS = 400


@pytest.mark.parametrize(
    ("ranks", "where"),
    [
        (2, ["tests/parallel"]),
        (3, ["tests/parallel"]),
        (4, ["tests/parallel"]),
        (3, ["tests/engine", "tests/benchmark", "tests/hyperparameters"]),
        (8, ["tests/end_to_end/test_same_bits.py"]),
        (8, ["tests/end_to_end", "--ignore=tests/end_to_end/test_same_bits.py"]),
    ],
)
def test_all_mpi_tests_pass_with(ranks, where, pytestconfig, run_job):
    launch = mpirun_command(
        ranks, [sys.executable, "-m", "mpi4py", "-m", "pytest", "--only-mpi", "-p", "no:cacheprovider", *where]
    )
    done = run_job(launch, cwd=pytestconfig.rootpath, timeout=SECONDS)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert len(re.findall(r"\d+ passed", done.stdout)) == ranks, done.stdout[-3000:]
