"""No rank waits forever: an exception or the death of one rank ends the whole job at once, with a message.

Here the MPI does not survive failures. `test_survival.py` tests an MPI that does.
"""

import sys
from dataclasses import replace

import pytest

from distdl.job.mpirun_command import mpirun_command

#: Trains on digits. Rank 1 runs the trap in its third step, in the middle of the first epoch.
PROGRAM = """
import os, signal, sys
from distdl import cli

def main(arguments):
    from distdl import nn
    from distdl.config import TrainConfig
    from distdl.engine import train
    from distdl.parallel import world
    communicator = world()

    class Trap(nn.Flatten):
        calls = 0
        def forward(self, x, *, training, key):
            Trap.calls += training
            if communicator.rank == 1 and Trap.calls == 3 * (8 // communicator.size):
                {trap}
            return super().forward(x, training=training, key=key)

    def build(shape, classes):
        return nn.Sequential([Trap(), nn.Affine(classes)], shape)

    train(TrainConfig(run_dir=arguments[0], kernels="numpy"), communicator, build_network=build)
    print("the end was reached")
    return 0

sys.exit(cli.run(main))
"""


#: Some ranks fail before or after the world is made. The others start a collective operation.
FAILING = """
import sys, time
from distdl import cli
from distdl.errors import DamagedFileError
from distdl.job.launched_by import read_launch

def fail():
    if read_launch().rank in {ranks}:
        time.sleep(2.0 if read_launch().rank == 0 else 0.0)
        raise DamagedFileError(f"a file of rank {{read_launch().rank}} is torn")

def main(arguments):
    {first}
    from distdl.parallel import world
    communicator = world()
    {then}
    print(communicator.allgather_json("the end was reached"))
    return 0

sys.exit(cli.run(main))
"""


def run_failing(run_job, tmp_path, first, then, ranks, fault_tolerance):
    program = tmp_path / "program.py"
    program.write_text(FAILING.format(first=first, then=then, ranks=ranks))
    launch = launch_of(3, [str(program)], fault_tolerance=fault_tolerance)
    done = run_job(launch, timeout=60)
    assert "the end was reached" not in done.stdout
    return done


EVERYONE = {0, 1, 2}


@pytest.mark.parametrize(
    ("ranks", "fault_tolerance"), [({0}, True), ({1, 2}, True), (EVERYONE, True), (EVERYONE, False)], ids=str
)
def test_an_error_before_the_world_is_made_is_reported_once(run_job, tmp_path, ranks, fault_tolerance):
    """For example, a config file is missing on one host. Rank 0 is late, but prints its error before it is ended."""
    done = run_failing(run_job, tmp_path, "fail()", "pass", ranks, fault_tolerance)
    assert done.returncode == 3
    said = [line for line in done.stderr.splitlines() if "distdl" in line or "torn" in line]
    assert said == [f"distdl: error: a file of rank {min(ranks)} is torn"], done.stderr


@pytest.mark.parametrize(("ranks", "fault_tolerance"), [({2}, True), ({2}, False), (EVERYONE, True)], ids=str)
def test_an_error_of_some_ranks_in_the_world_ends_the_job(run_job, tmp_path, ranks, fault_tolerance):
    done = run_failing(run_job, tmp_path, "pass", "fail()", ranks, fault_tolerance)
    assert done.returncode != 0
    said = {line for line in done.stderr.splitlines() if "torn" in line}
    possible = {f"[rank {rank}] DamagedFileError: a file of rank {rank} is torn" for rank in ranks}
    assert said, done.stderr
    assert said <= possible | {"distdl: error: a file of rank 0 is torn"}


def launch_of(ranks, arguments, *, fault_tolerance):
    """Return the command that starts Python with these arguments, with or without fault tolerance."""
    launch = mpirun_command(ranks, [sys.executable, *arguments])
    if not fault_tolerance:
        if "--with-ft" not in launch.argv:
            pytest.skip("this mpirun has no fault tolerance")
        launch = replace(launch, argv=[word for word in launch.argv if word not in {"--with-ft", "ulfm"}])
    return launch


def run_with_trap(run_job, tmp_path, trap, *, ranks=2, fault_tolerance=True):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(trap=trap))
    launch = launch_of(ranks, [str(program), str(tmp_path / "run")], fault_tolerance=fault_tolerance)
    done = run_job(launch, timeout=60)
    assert "the end was reached" not in done.stdout
    assert done.returncode != 0
    return done


@pytest.mark.parametrize(("ranks", "fault_tolerance"), [(2, True), (4, True), (2, False)])
def test_a_rank_that_raises_in_an_epoch_ends_the_job_with_its_traceback(run_job, tmp_path, ranks, fault_tolerance):
    trap = "raise RuntimeError('a defect in rank 1')"
    done = run_with_trap(run_job, tmp_path, trap, ranks=ranks, fault_tolerance=fault_tolerance)
    lines = done.stderr.splitlines()
    assert any(line.startswith("[rank 1] Traceback") for line in lines), done.stderr
    assert "[rank 1] RuntimeError: a defect in rank 1" in lines


def test_a_rank_that_raises_below_a_shell_ends_the_job(run_job, tmp_path):
    """If the shell ended by a signal, the launcher would report a lost rank instead."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(trap="raise RuntimeError('a defect in rank 1')"))
    launch = mpirun_command(2, ["sh", "-c", f"{sys.executable} {program} {tmp_path / 'run'}; exit $?"])
    done = run_job(launch, timeout=60)
    assert done.returncode != 0
    assert "the end was reached" not in done.stdout
    assert "[rank 1] RuntimeError: a defect in rank 1" in done.stderr.splitlines()


@pytest.mark.parametrize(
    ("trap", "message"),
    [
        ("sys.exit(7)", "[rank 1] SystemExit: 7"),
        ("raise KeyboardInterrupt", "[rank 1] KeyboardInterrupt"),
    ],
)
def test_a_rank_that_exits_in_an_epoch_ends_the_job(run_job, tmp_path, trap, message):
    assert message in run_with_trap(run_job, tmp_path, trap).stderr.splitlines()


def test_a_rank_without_memory_ends_the_job_without_fault_tolerance(run_job, tmp_path, survives):
    trap = "raise MemoryError('no memory')"
    done = run_with_trap(run_job, tmp_path, trap, fault_tolerance=not survives)
    assert "[rank 1] MemoryError: no memory" in done.stderr.splitlines()


@pytest.mark.parametrize("trap", ["os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
def test_a_rank_that_dies_in_an_epoch_ends_the_job_without_fault_tolerance(run_job, tmp_path, trap, survives):
    run_with_trap(run_job, tmp_path, trap, fault_tolerance=not survives)


def run_script(run_job, tmp_path, text):
    program = tmp_path / "program.py"
    program.write_text(text)
    return run_job(mpirun_command(2, [sys.executable, str(program)]), cwd=tmp_path, timeout=60)


def test_an_exception_outside_of_the_training_ends_the_job(run_job, tmp_path):
    done = run_script(
        run_job,
        tmp_path,
        "from distdl.parallel import world\n"
        "everyone = world()\n"
        "if everyone.rank == 1:\n"
        "    raise RuntimeError('outside')\n"
        "everyone.barrier()\n"
        "print('the end was reached')\n",
    )
    assert done.returncode != 0
    assert "the end was reached" not in done.stdout
    assert "[rank 1] RuntimeError: outside" in done.stderr.splitlines()


def test_a_plain_script_reports_an_error_of_all_ranks_once_and_exits_with_its_code(run_job, tmp_path):
    done = run_script(
        run_job,
        tmp_path,
        "from distdl.config import TrainConfig\n"
        "from distdl.engine import train\n"
        "train(TrainConfig(batch_size=16, micro_batch_size=16))\n"
        "print('the end was reached')\n",
    )
    assert done.returncode == 2, done.stderr
    assert "the end was reached" not in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "micro-batches" in line]
    assert line.startswith("distdl: error: 2 ranks cannot share a batch of 1 micro-batches")
    assert "Traceback" not in done.stderr
    assert "[rank" not in done.stderr
