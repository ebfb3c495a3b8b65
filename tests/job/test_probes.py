"""The probes of a host, in real settings that `unshare` and a filter of system calls make, and in pretended ones."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from distdl.job import probes
from distdl.job.processes import Process

PROGRAM = """
import json, sys
from distdl.job import probes
print(json.dumps([probes.why_memory_is_private(), probes.variables_for_mpi()]))
"""


def probed(below, *prefix):
    """Return what a process below a launcher finds, and the variables it sets; the prefix comes between the two."""
    done = subprocess.run(
        below("hydra_pmi_proxy", [*prefix, sys.executable, "-c", PROGRAM]), capture_output=True, text=True, check=False
    )
    if prefix and done.returncode and "unshare" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ranks_below_one_launcher_can_read_each_other(below):
    assert probed(below) == [None, {}]


def test_a_refused_system_call_is_found(below, refusing):
    why, variables = probed(below, *refusing)
    assert "refuses process_vm_readv" in why
    assert variables == probes.WITHOUT_READING


@pytest.mark.parametrize(
    ("unshare", "name", "variables"),
    [
        (["unshare", "-U", "-r"], "user namespace", probes.WITHOUT_READING),
        (
            ["unshare", "-U", "-r", "-p", "-f", "--mount-proc"],
            "namespace",
            {**probes.WITHOUT_READING, **probes.WITHOUT_PROCESS_NUMBERS},
        ),
    ],
    ids=["user", "user and process"],
)
def test_a_container_for_each_rank_is_found(below, unshare, name, variables):
    why, found = probed(below, *unshare)
    assert name in why
    assert found == variables


def test_one_container_around_all_ranks_changes_nothing(below):
    argv = ["unshare", "-U", "-r", "-p", "-f", "--mount-proc"]
    done = subprocess.run(
        [*argv, *below("hydra_pmi_proxy", [sys.executable, "-c", PROGRAM])], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(done.stderr.strip())
    assert json.loads(done.stdout) == [None, {}]


@pytest.mark.parametrize(
    ("launcher", "readable", "own", "private"),
    [
        ("slurmstepd", False, (), False),  # it belongs to root
        ("slurmstepd", False, ("user",), True),
        ("hydra_pmi_proxy", False, (), True),  # Yama, or SELinux
        ("hydra_pmi_proxy", True, ("user", "pid"), False),
        (None, False, (), False),
        (None, False, ("pid",), True),
    ],
)
def test_without_a_readable_launcher_only_ranks_outside_of_containers_are_sure(
    launcher, readable, own, private, monkeypatch
):
    above = [] if launcher is None else [Process(7, launcher, "S", 1, 0)]
    monkeypatch.setattr(probes, "ancestors", lambda: iter(above))
    monkeypatch.setattr(probes, "error_of_reading", lambda pid: 0 if pid == os.getpid() or readable else 1)
    monkeypatch.setattr(probes, "_has_own_namespace", lambda kind: kind in own)
    assert (probes.why_memory_is_private() is not None) is private
    assert probes.hides_its_process_number() is (launcher is None and "pid" in own)


def test_variables_of_the_user_are_kept(monkeypatch):
    monkeypatch.setattr(probes, "why_memory_is_private", lambda: "as in a test")
    assert probes.variables_for_mpi({"MPIR_CVAR_CH4_CMA_ENABLE": "1"}) == {"UCX_POSIX_USE_PROC_LINK": "n"}


@pytest.mark.parametrize(
    ("megabytes_free", "ranks", "size", "without_ucx"),
    [(64, 4, None, False), (64, 16, None, True), (64, 49, None, True), (64, 64, 84, True), (0.5, 1, 66, True)],
)
def test_the_shared_memory_of_the_ranks_is_compared_with_the_free_one(
    megabytes_free, ranks, size, without_ucx, monkeypatch
):
    megabyte = 1_000_000
    found = SimpleNamespace(f_bavail=megabytes_free * megabyte, f_frsize=1, f_blocks=68 * megabyte)
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    monkeypatch.setattr(probes, "why_memory_is_private", lambda: None)
    monkeypatch.setattr(probes, "hides_its_process_number", lambda: False)
    why = probes.why_shared_memory_is_too_small(ranks)
    assert (why is None) is (size is None)
    if why is not None:
        for word in (f"{ranks} ranks", f"{megabytes_free:.0f} MB", os.uname().nodename, f"--shm-size={size}m "):
            assert word in why
    assert probes.variables_for_mpi({"MPI_LOCALNRANKS": str(ranks)}) == (
        probes.WITHOUT_MEMORY_OF_UCX if without_ucx else {}
    )
    assert probes.variables_for_mpi({}) == {}


def test_without_shared_memory_nothing_is_said(tmp_path):
    assert probes.why_shared_memory_is_too_small(4, tmp_path / "nowhere") is None
