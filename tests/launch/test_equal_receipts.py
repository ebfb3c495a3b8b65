"""One receipt from every way to start the same training: a process, mpirun, containers, and two hosts by ssh.

`.ci/run` runs these tests with each MPI. Slurm has its own test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
from ssh_hosts import SshHosts, why_impossible

from distdl.job.mpirun_command import environment_for, mpirun_command

LAUNCH = Path(__file__).parents[2] / "launch"
TRAINING = ["--dataset", "digits", "--max-steps", "12", "--seed", "3", "--kernels", "numpy"]
LONGER = ["--model", "mlp", "--epochs", "40", "--kernels", "numpy", "--checkpoint-every", "20"]
TRAIN = [sys.executable, "-m", "distdl.train", *TRAINING]
#: Separate namespaces, as in a container: users, processes, network, mounts, host name, System V IPC.
CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--net", "--mount", "--uts", "--ipc"]
INSIDE = 'mount -t proc proc /proc && mount -t tmpfs -o size=1g tmpfs /dev/shm && ip link set lo up; exec "$@"'
CONTAINER += ["sh", "-c", INSIDE, "sh"]
#: Each rank in a user namespace of its own, as Apptainer starts them.
PER_RANK = ["unshare", "--user", "--map-root-user", "--mount"]


def receipt_of(done):
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    [line] = [line for line in done.stdout.splitlines() if line.startswith("weights sha256: ")]
    return line


@pytest.fixture(scope="module")
def receipt(run_program, tmp_path_factory):
    """Return the receipt of one process."""
    return receipt_of(run_program(TRAIN, cwd=tmp_path_factory.mktemp("one"), timeout=200))


@cache
def works(*command):
    return subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.usefixtures("needs_mpirun")
@pytest.mark.parametrize(("form", "ranks"), [("mpirun", 3), ("one container", 2), ("a container per rank", 3)])
def test_ranks_give_the_receipt_of_one_process(form, ranks, receipt, run_program, tmp_path):
    around = {"mpirun": [], "one container": CONTAINER, "a container per rank": []}[form]
    per_rank = PER_RANK if form == "a container per rank" else []
    for start in (around, per_rank):
        if start and not (shutil.which("unshare") and works(*start)):
            pytest.skip("no such namespaces here")
    command = mpirun_command(ranks, [*per_rank, *TRAIN])
    done = run_program([*around, *command.argv], env=environment_for(command), cwd=tmp_path, timeout=200)
    assert receipt_of(done) == receipt


@pytest.fixture
def two_hosts(tmp_path, needs_mpirun):
    """Return two hosts, and a function that starts `hosts.sh` on the first with two ranks on each."""
    reason = why_impossible()
    if reason is not None:
        pytest.skip(reason)
    with SshHosts(tmp_path / "ssh") as hosts:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{address}:2\n" for address in hosts.addresses))

        def run(*words):
            env = os.environ | {"PYTHON": sys.executable}
            return hosts.run([LAUNCH / "hosts.sh", hostfile, *words], cwd=tmp_path, env=env, timeout=280)

        yield hosts, run


def test_two_hosts_by_ssh_give_the_receipt_of_one_process(receipt, two_hosts):
    hosts, run = two_hosts
    done = run("--", *TRAINING)
    assert receipt_of(done) == receipt
    report = " ".join(done.stdout.split())
    assert f"2 hosts: {hosts.names[0]} has 2 ranks, {hosts.names[1]} has 2 ranks" in report
    assert "between hosts 2 hosts: allreduce" in report


@pytest.mark.skipif(os.environ.get("DISTDL_FAULTS") != "full", reason="takes a minute: DISTDL_FAULTS=full runs it")
def test_a_rank_killed_on_the_other_host_does_not_change_the_receipt(two_hosts, run_program, tmp_path):
    """With Open MPI the others continue; with MPICH `--restarts` starts both hosts again."""
    training = [*LONGER, "--run-dir", "run"]
    expected = receipt_of(run_program([*TRAIN[:3], *LONGER, "--run-dir", "one"], cwd=tmp_path, timeout=200))
    hosts, run = two_hosts
    killed = []

    def kill_when_it_trains():
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 4):
            if over.wait(0.05):
                return
        killed.append(hosts.kill_rank(hosts.names[1]))

    over = threading.Event()
    killer = threading.Thread(target=kill_when_it_trains)
    killer.start()
    done = run("--restarts", "3", "--", *training, "--resume", "auto")
    over.set()
    killer.join()
    assert receipt_of(done) == expected
    assert killed
    assert "was lost" in done.stdout or "restart 1 of 3" in done.stderr
