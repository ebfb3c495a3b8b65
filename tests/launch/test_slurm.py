"""`launch/slurm.sbatch` and both MPIs on a real Slurm of two nodes: each job ends with the receipt of one process.

A few jobs always run, if this machine permits a Slurm. DISTDL_FAULTS=full also runs those that take minutes.
"""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from slurm_cluster import NODES, Cluster, why_not
from trapped_training import LOCAL_SH, REPOSITORY, TRAINING, receipt_of, undisturbed_receipt

from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import mpirun_command
from distdl.job.processes import look_at

SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
SECONDS = 150
#: A training that waits up to five seconds in each step from the eighth on, until the file `go` exists.
PACED = """
import os, pathlib, sys, time
from distdl import cli
from distdl.job.launched_by import read_launch

def main(arguments):
    from distdl.train_command import parse
    config = parse(arguments)
    cli.set_blas_threads(1)
    from distdl.engine import train
    from distdl.engine.fault_injection import fail_at
    folder, rank, eaten = pathlib.Path(__file__).parent, read_launch().rank, []

    def wait(state):
        if (folder / "go").exists() or state.step < 7:
            return
        if (folder / "eat").exists() and rank == 1:
            eaten.append(b"x" * 2**31)
        (folder / f"process-{rank}").write_text(str(os.getpid()))
        ends = time.monotonic() + 5
        while time.monotonic() < ends and not (folder / "go").exists():
            time.sleep(0.05)

    fail_at("step", rank=None, nth=None, action=wait)
    train(config)
    return 0

sys.exit(cli.run(main))
"""
#: A rank that dies before it calls MPI_Init, after the others have.
DIES_EARLY = """
import os, signal, sys, time
from distdl import cli
from distdl.job.launched_by import read_launch

def main(arguments):
    if read_launch().rank == 1:
        time.sleep(5)
        os.kill(os.getpid(), signal.SIGKILL)
    from distdl.parallel import world
    world()
    return 0

sys.exit(cli.run(main))
"""

full = pytest.mark.skipif(os.environ.get("DISTDL_FAULTS") != "full", reason="takes minutes: DISTDL_FAULTS=full runs it")


def is_open_mpi():
    return mpirun_command(2, ["true"]).argv[1] == "--with-ft"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if read_launch().by is not None:
        pytest.skip("already under a launcher")
    try:
        is_open_mpi()
    except UserError as error:
        pytest.skip(str(error))
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        running.environment |= {"PYTHON": sys.executable}
        yield running
        processes = [pid for node in NODES for pid in running.processes_of(node)]
    assert processes
    assert all(look_at(pid) is None for pid in processes)


@pytest.fixture
def form(request, cluster):
    """Return the value of LAUNCH for mpirun, or for the form of srun that fits the MPI of this environment."""
    if request.param == "mpirun":
        return "mpirun"
    found = "pmix" if is_open_mpi() else "pmi2"
    if found not in cluster.call("srun", "--mpi=list", check=False, stderr=True):
        pytest.skip(f"this Slurm has no plugin for --mpi={found} (package libpmix2)")
    return found


both = pytest.mark.parametrize("form", ["mpirun", "srun"], indirect=True)
with_srun = pytest.mark.parametrize("form", ["srun"], indirect=True)


class Job:
    """A job of `launch/slurm.sbatch`, with its two lines changed."""

    def __init__(self, cluster, folder, form, *options, module="distdl.train", nodes="--nodes=2 --ntasks-per-node=2"):
        self.cluster, self.log = cluster, folder / "log"
        script = SCRIPT.read_text()
        for line, replacement in (
            ("flags=(--dataset digits --epochs 20)", f"flags=({shlex.join(TRAINING)})"),
            ("module=distdl.train", f"module={module}"),
            ("#SBATCH --nodes=2 --ntasks-per-node=4", f"#SBATCH {nodes}"),
        ):
            assert f"\n{line}\n" in script
            script = script.replace(f"\n{line}\n", f"\n{replacement}\n")
        (folder / "job.sbatch").write_text(script)
        (folder / "paced.py").write_text(PACED)
        variables = {"LAUNCH": form, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}"}
        words = ["sbatch", "--parsable", f"--output={self.log}", *options, "job.sbatch"]
        self.number = cluster.call(*words, cwd=folder, variables=variables).strip()

    def ends(self, *, states=("COMPLETED",)):
        """Wait for the end in one of the states; return the output of all its starts."""
        ends = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY"}
        self.cluster.until(lambda: self.state() in ends, SECONDS, self.log)
        assert self.state() in states, self.log.read_text()
        return self.log.read_text()

    def state(self):
        return self.cluster.field(self.number, "JobState")

    def restarts(self):
        return int(self.cluster.field(self.number, "Restarts"))


def assert_same_receipt(output):
    assert receipt_of(output)[-1:] == undisturbed_receipt(), output


def paced_job(cluster, folder, form, *options, **changes):
    """Return a job whose ranks wait in their eighth step."""
    job = Job(cluster, folder, form, *options, module="paced", **changes)
    cluster.until(lambda: len(list(folder.glob("process-*"))) == 4, SECONDS, job.log)
    return job


def test_a_dry_run_prints_the_command_of_each_form(tmp_path):
    def printed(code=0, words=("--dry-run",), **variables):
        done = subprocess.run(
            ["bash", SCRIPT, *words],
            env={"PATH": os.environ["PATH"], "PYTHON": "python", **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return (done.stdout + done.stderr).strip()

    flags = "--run-dir my-run --resume auto --dataset digits --epochs 20"
    mpirun = "python -P -m distdl.mpirun -n 8 --doctor --restarts 3 --module distdl.train --"
    assert printed(SLURM_NTASKS="8") == f"{mpirun} {flags}"
    assert printed(LAUNCH="pmix") == f"srun -K -n 1 --mpi=pmix python -P -m distdl.train {flags}"
    flags = "--run-dir r-5 --resume auto --seed 5 --dataset digits --epochs 20"
    variables = {"SLURM_CPUS_ON_NODE": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_ARRAY_TASK_ID": "5"}
    assert printed(LAUNCH="pmi2", RUN="r", **variables) == f"srun -K -n 8 --mpi=pmi2 python -P -m distdl.train {flags}"
    assert "expected mpirun, pmix or pmi2" in printed(2, LAUNCH="mpi")
    assert "unexpected argument --epochs: expected --dry-run or none" in printed(2, ("--epochs", "3"))
    assert "submit it with sbatch, or give --dry-run" in printed(2, ())


@both
def test_a_job_on_two_nodes_has_the_receipt_of_one_process(cluster, form, tmp_path):
    output = Job(cluster, tmp_path, form).ends()
    assert_same_receipt(output)
    assert "hosts n1 (2), n2 (2)" in output
    assert "2 of 2 nodes in use, 4 ranks on 4 cores" in output
    assert "has no rank" not in output
    assert "CANCELLED" not in output  # the doctor's other ranks, because rank 0 ends with code 1
    assert "Terminat" not in output


def test_a_job_without_its_environment_ends_at_once_with_one_line(cluster, tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "job.sbatch").write_text(SCRIPT.read_text())
    words = ["sbatch", "--parsable", "-N1", "--ntasks-per-node=1", f"--output={tmp_path}/log", "--wait", "job.sbatch"]
    cluster.call(*words, cwd=tmp_path, variables={"PYTHON": f"{tmp_path}/python"}, check=False)
    output = (tmp_path / "log").read_text()
    assert "returns to the queue" not in output
    assert re.search(rf"{tmp_path}/python cannot import distdl on n[12]: activate the environment before", output)


def test_a_node_without_a_rank_is_named(cluster, tmp_path):
    words = ["srun", "-N1", "-n1", LOCAL_SH, "-n", "1", "--", "--model", "mlp", "--max-steps", "1"]
    output = cluster.call("salloc", "-N2", "--ntasks-per-node=2", *words, cwd=tmp_path, stderr=True)
    used = re.findall(r"host (n[12]) \(1\)", output)
    (idle,) = {*NODES} - {*used}
    assert f"has 2 nodes, but {idle} has no rank: start 4 ranks, or ask for fewer nodes" in output


def test_mpirun_starts_in_a_shell_of_srun(cluster, tmp_path):
    words = [LOCAL_SH, "-n", "4", "--", *TRAINING]
    assert_same_receipt(cluster.call("srun", "-N1", "-n1", "--exclusive", *words, cwd=tmp_path))


@with_srun
@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=full)])
def test_a_killed_rank_ends_the_step_on_all_nodes_without_a_flag_of_srun(cluster, form, tasks, tmp_path):
    (tmp_path / "paced.py").write_text(PACED)
    words = ["srun", "-N2", f"--ntasks-per-node={tasks}", f"--mpi={form}", sys.executable, "-m", "paced", *TRAINING]
    environment = {**cluster.environment, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=-1, stderr=-2, text=True) as step:
        try:
            victim = tmp_path / "process-1"
            cluster.until(lambda: victim.exists() and victim.read_text(), SECONDS)
            os.kill(int(victim.read_text()), signal.SIGKILL)
            output, _ = step.communicate(timeout=60)
        finally:
            step.kill()
    assert step.returncode not in {0, None}
    if form == "pmi2":  # with pmix, Slurm ends the step first
        assert len(re.findall(r"error: rank 1 \(process \d+, host n[12]\) was lost", output)) == 1, output


@full
@with_srun
def test_a_rank_that_dies_while_mpi_starts_ends_the_step(cluster, form, tmp_path):
    (tmp_path / "early.py").write_text(DIES_EARLY)
    words = ["srun", "-N2", "--ntasks-per-node=2", f"--mpi={form}", sys.executable, "-m", "early"]
    environment = {**cluster.environment, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert form != "pmi2" or "a rank was lost while MPI was started" in done.stderr


@full
@both
def test_a_preempted_job_continues_to_the_same_receipt(cluster, form, tmp_path):
    job = paced_job(cluster, tmp_path, form)
    urgent = cluster.call("sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "-o/dev/null", "--wrap=sleep 2")
    cluster.until(lambda: job.restarts() == 1, SECONDS, job.log)
    (tmp_path / "go").touch()
    assert_same_receipt(job.ends())
    assert cluster.field(urgent.strip(), "JobState") == "COMPLETED"


@full
@both
def test_before_the_time_limit_a_job_stops_and_continues_to_the_same_receipt(cluster, form, tmp_path):
    job = paced_job(cluster, tmp_path, form, "--time=1", "--signal=B:USR1@45")
    cluster.until(lambda: job.restarts() == 1, SECONDS, job.log)
    (tmp_path / "go").touch()
    output = job.ends()
    assert_same_receipt(output)
    assert "slurm.sbatch: exit code 75, the job returns to the queue" in output
    assert re.search(r"stopped (by SIGUSR1 )?after step", output)


@full
@both
def test_a_rank_without_memory_does_not_keep_the_job_waiting(cluster, form, tmp_path):
    (tmp_path / "eat").touch()
    job = Job(cluster, tmp_path, form, "--mem=1500", module="paced")
    cluster.until((tmp_path / "process-0").exists, SECONDS, job.log)
    (tmp_path / "eat").unlink()
    (tmp_path / "go").touch()
    # If the others survive, Slurm still names the state after the killed process.
    assert_same_receipt(job.ends(states=("COMPLETED", "OUT_OF_MEMORY")))


@full
@both
@pytest.mark.parametrize(("node", "how"), [("n1", "killed"), ("n2", "killed"), ("n2", "cut off")])
def test_a_job_that_loses_a_node_continues_on_the_other_to_the_same_receipt(cluster, form, node, how, tmp_path):
    job = paced_job(cluster, tmp_path, form, nodes="--nodes=1-2 --exclusive")
    try:
        if how == "cut off":
            cluster.cut(node)
        else:
            cluster.kill(node)
        (tmp_path / "go").touch()
        assert_same_receipt(job.ends())
    finally:
        cluster.replace(node)
        cluster.wait_until_idle()


@full
@both
def test_a_cut_cable_ends_the_job_within_a_minute_with_a_message(cluster, form, tmp_path):
    if form == "mpirun" and is_open_mpi():
        pytest.skip("Slurm ends Open MPI's daemons, and mpirun says nothing; slurm.sbatch then starts the job again")
    (tmp_path / "paced.py").write_text(PACED)
    if form == "mpirun":
        start = [sys.executable, "-m", "distdl.mpirun", "-n", "4", "--module", "paced", "--", *TRAINING]
    else:
        start = ["srun", "-N2", "--ntasks-per-node=2", f"--mpi={form}", sys.executable, "-m", "paced", *TRAINING]
    words = ["sbatch", "--parsable", "--no-requeue", "--no-kill", "-N2", "--ntasks-per-node=2", f"-o{tmp_path}/log"]
    variables = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    cluster.call(*words, f"--wrap={shlex.join(start)}", cwd=tmp_path, variables=variables)
    cluster.until(lambda: len(list(tmp_path.glob("process-*"))) == 4, SECONDS, tmp_path / "log")
    cluster.cut("n2")
    try:
        said = r"has not answered for 45 s|Remote (daemon|host):|Node failure on n2|BAD TERMINATION"
        cluster.until(lambda: re.search(said, (tmp_path / "log").read_text()), 60, tmp_path / "log")
        ranks = [int((tmp_path / f"process-{rank}").read_text()) for rank in range(4)]
        cluster.until(lambda: all(look_at(rank) is None for rank in ranks), 90, tmp_path / "log")
    finally:
        cluster.call("scancel", "--user=root")
        cluster.replace("n2")
        cluster.wait_until_idle()


@full
def test_an_array_searches_with_a_seed_and_a_folder_for_each_job(cluster, tmp_path):
    script = SCRIPT.read_text().replace("module=distdl.train", "module=distdl.search")
    flags = "--range lr=0.001:0.1:log --rounds 1 --trials 2 -- --model mlp --epochs 1"
    (tmp_path / "job.sbatch").write_text(script.replace("--dataset digits --epochs 20", flags))
    variables = {"PYTHONPATH": str(REPOSITORY)}
    words = ["sbatch", "--parsable", "--wait", "-N1", "--ntasks-per-node=2", "--array=1-2", f"-o{tmp_path}/log-%a"]
    cluster.call(*words, "job.sbatch", cwd=tmp_path, variables=variables, timeout=SECONDS)
    results = [(tmp_path / f"my-run-{task}" / "results.jsonl").read_text() for task in (1, 2)]
    assert results[0] != results[1]
