"""Plain `pytest` runs the MPI tests too: it starts itself under mpirun, at several numbers of ranks."""

import re
import sys

import pytest

from distdl.mpirun import mpirun_command

SECONDS = 400
UP_TO_EIGHT_RANKS = [f"tests/end_to_end/test_{name}.py" for name in ("same_bits", "balance_bits", "evaluate")]


@pytest.mark.parametrize(
    ("ranks", "where"),
    [
        (2, ["tests/parallel"]),
        (3, ["tests/parallel"]),
        (3, ["tests/engine", "tests/benchmark", "tests/hyperparameters"]),
        (4, ["tests/parallel", "tests/end_to_end", *(f"--ignore={path}" for path in UP_TO_EIGHT_RANKS)]),
        (8, UP_TO_EIGHT_RANKS[:1]),
        (8, UP_TO_EIGHT_RANKS[1:]),
    ],
)
def test_all_mpi_tests_pass_with(ranks, where, pytestconfig, run_job):
    launch = mpirun_command(
        ranks, [sys.executable, "-m", "mpi4py", "-m", "pytest", "--only-mpi", "-p", "no:cacheprovider", *where]
    )
    done = run_job(launch, cwd=pytestconfig.rootpath, timeout=SECONDS)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert len(re.findall(r"\d+ passed", done.stdout)) == ranks, done.stdout[-3000:]
