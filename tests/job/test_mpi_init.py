"""The watch during the start of MPI."""

import os
from pathlib import Path

from distdl.job.mpi_init import end_the_job_if_a_rank_dies


def children_and_descriptors():
    return {*Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}, {*Path("/proc/self/fd").iterdir()}


def test_the_watch_leaves_no_process_and_no_descriptor():
    before = children_and_descriptors()
    with end_the_job_if_a_rank_dies():
        assert children_and_descriptors() != before
    assert children_and_descriptors() == before
