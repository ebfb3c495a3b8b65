"""Jobs of this environment's `mpirun` in settings of containers: the same receipt, or one line before the start."""

import shutil
import sys

import pytest

from distdl.job.mpirun_command import environment_for, mpirun_command

TRAIN = [sys.executable, "-m", "distdl.train", "--max-steps=1", "--kernels=numpy", "--run-dir=run"]


@pytest.fixture(scope="module")
def trained(needs_mpirun, run_program, tmp_path_factory):
    """Return a function that trains a step on two ranks below a prefix each, and returns the receipt."""

    def receipt(*prefix):
        launch = mpirun_command(2, [*prefix, *TRAIN])
        folder = tmp_path_factory.mktemp("job")
        done = run_program(launch.argv, env=environment_for(launch), cwd=folder, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        return done.stdout.splitlines()[-1]

    return receipt


@pytest.fixture(scope="module")
def plain(trained):
    return trained()


def test_where_no_process_may_read_another_the_receipt_is_the_same(trained, plain, refusing):
    assert trained(*refusing) == plain


def test_with_namespaces_for_each_rank_the_receipt_is_the_same(trained, plain, run_program):
    """No rank can read another, and all have the same process number; `test_receipts.py` has user namespaces alone."""
    unshare = ["unshare", "-U", "-r", "-p", "-f", "--mount-proc"]
    if shutil.which("unshare") is None or run_program([*unshare, "true"], timeout=60).returncode:
        pytest.skip("no namespaces for this user")
    assert trained(*unshare) == plain


@pytest.mark.parametrize(("megabytes", "works"), [(3, False), (8, True)])
def test_little_shared_memory_is_enough_or_refused_before_mpi_starts(
    megabytes, works, run_program, needs_mpirun, survives, tmp_path
):
    """Four ranks of MPICH take 21 MB if there is room, and need 5 MB."""
    if survives:
        pytest.skip("Open MPI reports it, and continues without shared memory")
    launch = mpirun_command(4, TRAIN)
    script = f'mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm && exec "$@"'
    unshare = ["unshare", "-U", "-r", "-m", "sh", "-c"]
    if shutil.which("unshare") is None or run_program([*unshare, script, "sh", "true"], timeout=60).returncode:
        pytest.skip("no namespaces for this user")
    done = run_program([*unshare, script, "sh", *launch.argv], env=environment_for(launch), cwd=tmp_path, timeout=100)
    if works:
        assert (done.returncode, done.stderr) == (0, "")
        assert "weights sha256: " in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr.startswith("distdl: error: MPICH needs about 5 MB of shared memory for 4 ranks")
        assert "--shm-size=5m" in done.stderr
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
