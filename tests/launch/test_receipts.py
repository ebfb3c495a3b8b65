"""One receipt from every way to start the same training: a process, mpirun, containers, and two hosts by ssh.

`.ci/run` runs these tests with each MPI. Slurm has its own test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from ssh_hosts import SshHosts, why_impossible

from distdl.job.mpirun_command import environment_for, mpirun_command

LAUNCH = Path(__file__).parents[2] / "launch"
TRAINING = ["--dataset", "digits", "--max-steps", "12", "--seed", "3", "--kernels", "numpy"]
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
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("form", ["mpirun", "one container", "a container per rank"])
def test_ranks_give_the_receipt_of_one_process(form, ranks, receipt, run_program, tmp_path):
    around = {"mpirun": [], "one container": CONTAINER, "a container per rank": []}[form]
    per_rank = PER_RANK if form == "a container per rank" else []
    for start in (around, per_rank):
        if start and not (shutil.which("unshare") and works(*start)):
            pytest.skip("no such namespaces here")
    command = mpirun_command(ranks, [*per_rank, *TRAIN])
    done = run_program([*around, *command.argv], env=environment_for(command), cwd=tmp_path, timeout=200)
    assert receipt_of(done) == receipt


@pytest.mark.usefixtures("needs_mpirun")
def test_two_hosts_by_ssh_give_the_receipt_of_one_process(receipt, tmp_path):
    reason = why_impossible()
    if reason is not None:
        pytest.skip(reason)
    with SshHosts(tmp_path / "ssh") as hosts:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{address}:2\n" for address in hosts.addresses))
        words = [LAUNCH / "hosts.sh", hostfile, "--", *TRAINING]
        env = os.environ | {"PYTHON": sys.executable}
        done = hosts.run(words, cwd=tmp_path, env=env, timeout=200)
    assert receipt_of(done) == receipt
    report = " ".join(done.stdout.split())
    assert f"2 hosts: {hosts.names[0]} has 2 ranks, {hosts.names[1]} has 2 ranks" in report
    assert "between hosts 2 hosts: allreduce" in report
