"""The watch during the start of MPI."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distdl.job import mpi_init
from distdl.job.mpi_init import end_the_job_if_a_rank_dies
from distdl.job.processes import look_at

#: A launcher called like Open MPI's daemon, which may ignore SIGTERM, and its one rank, which waits in MPI_Init.
LAUNCHER = """
import ctypes, signal, subprocess, sys, time
ctypes.CDLL(None).prctl(15, b"prted", 0, 0, 0)
if sys.argv[3] == "spins":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]])
time.sleep(600)
"""
RANK = """
import os, sys, time
from distdl.job import mpi_init
from distdl.job.held_signals import hold_signals
mpi_init.SECONDS_TO_START, mpi_init.SECONDS_FOR_THE_LAUNCHER, mpi_init.SECONDS_TO_END = float(sys.argv[1]), 0.1, 0.1
mpi_init.SECONDS_SIGNALLED = 0.5
hold_signals()
with mpi_init.end_the_job_if_a_rank_dies():
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def can_unshare():
    return os.geteuid() == 0 and subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0


def children_and_descriptors():
    return {*Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}, {*Path("/proc/self/fd").iterdir()}


def test_the_watch_leaves_no_process_and_no_descriptor():
    before = children_and_descriptors()
    with end_the_job_if_a_rank_dies():
        assert children_and_descriptors() != before
    assert children_and_descriptors() == before


def test_a_rank_that_waits_long_says_so_again_after_each_half_minute(monkeypatch, capfd):
    monkeypatch.setattr(mpi_init, "SECONDS_UNTIL_REPORTED", 30.0)
    monkeypatch.setattr(mpi_init, "SECONDS_BETWEEN_LOOKS", 10.0)
    looks = iter([[]] * 15 + [[0]])
    monkeypatch.setattr(mpi_init.select, "select", lambda *_: [next(looks)])
    ended, end = os.pipe()
    os.write(end, mpi_init.STARTED)
    mpi_init._watch(ended, look_at(os.getppid()), look_at(os.getpid()))
    os.close(ended)
    os.close(end)
    said = capfd.readouterr().err.splitlines()
    assert [line.partition("waited for ")[2].split()[0] for line in said] == ["30", "60", "90", "120", "150"]


@pytest.mark.parametrize("launcher", ["ends", "spins"])
@pytest.mark.parametrize("fault", ["the rank is killed", "the start takes too long", "a signal"])
def test_a_start_that_cannot_succeed_ends_the_rank_and_its_launcher_with_one_line(launcher, fault):
    limit, why = {
        "the rank is killed": ("600", mpi_init.LOST),
        "the start takes too long": ("1", "MPI has not started within 1 s"),
        "a signal": ("600", "a signal asks the job to end, and MPI does not start"),
    }[fault]
    words = [sys.executable, "-c", LAUNCHER, RANK, limit, launcher]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            rank = int(job.stdout.readline())
            if fault == "the rank is killed":
                os.kill(rank, signal.SIGKILL)
            elif fault == "a signal":
                os.kill(rank, signal.SIGTERM)
            assert job.wait(20) == -(signal.SIGKILL if launcher == "spins" else signal.SIGTERM)
            assert job.stderr.read() == f"distdl: error: {why}; the job ends: start it again\n"
            assert look_at(rank) is None
        finally:
            job.kill()


@pytest.mark.skipif(not can_unshare(), reason="this system makes no mount namespaces")
def test_a_late_start_names_ranks_with_a_dev_shm_of_their_own(capfd):
    script = "mount -t tmpfs tmpfs /dev/shm; echo mounted; exec sleep 600"
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"mounted\n"
            us = dataclasses.replace(look_at(os.getpid()), name="mpirun")  # the parent of both ranks
            mpi_init.report(30.0, us, 2, 2)
        finally:
            other.kill()
    host = os.uname().nodename
    assert f"; the ranks of host {host} have different /dev/shm, and MPI needs one for all\n" in capfd.readouterr().err
