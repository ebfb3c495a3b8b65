"""Plain `pytest` also runs the MPI tests: it starts itself under mpirun with several numbers of ranks."""

import re
import sys

import pytest

from distdl.job.mpirun_command import mpirun_command

SECONDS = 400
UP_TO_EIGHT_RANKS = [f"tests/end_to_end/test_{name}.py" for name in ("same_bits", "balance_bits", "evaluate")]


@pytest.fixture(scope="module")
def done(side_by_side, pytestconfig, run_job):
    def run(ranks, where):
        program = ["-m", "mpi4py", "-m", "pytest", "--only-mpi", "-p", "no:cacheprovider", *where]
        return run_job(mpirun_command(ranks, [sys.executable, *program]), cwd=pytestconfig.rootpath, timeout=SECONDS)

    return side_by_side(test_all_mpi_tests_pass_on, run)


@pytest.mark.parametrize(
    ("ranks", "where"),
    [
        (2, ["tests/parallel"]),
        (3, ["tests/parallel", "tests/engine", "tests/bench", "tests/search", "tests/doctor", "tests/proof"]),
        (4, ["tests/parallel", "tests/end_to_end", *(f"--ignore={path}" for path in UP_TO_EIGHT_RANKS)]),
        (8, UP_TO_EIGHT_RANKS),
    ],
)
def test_all_mpi_tests_pass_on(ranks, where, done):
    job = done(ranks=ranks, where=where)
    assert job.returncode == 0, f"{job.stdout[-6000:]}\n{job.stderr[-6000:]}"
    assert len(re.findall(r"\d+ passed", job.stdout)) == ranks, job.stdout[-3000:]
