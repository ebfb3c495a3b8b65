"""The watch during the start of MPI."""

import os
from pathlib import Path

from distdl.job import mpi_init
from distdl.job.mpi_init import end_the_job_if_a_rank_dies


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
    mpi_init._watch(0, os.getppid(), os.getpid())
    said = capfd.readouterr().err.splitlines()
    assert [line.partition("waited for ")[2].split()[0] for line in said] == ["30", "60", "90", "120", "150"]
