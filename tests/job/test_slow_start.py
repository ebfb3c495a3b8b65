"""A start that takes long says what it waits for."""

import os
import subprocess
import sys
import time

import pytest

from distdl.job import mpi_init, slow_start
from distdl.job.slow_start import SlowStart, runs_here

REPORTING = """
import os, sys
from distdl.job import slow_start
slow_start.SECONDS_UNTIL_REPORTED, slow_start.SECONDS_BETWEEN_LOOKS = 0.3, 0.05
launcher = ["/bin/sh", "-c", sys.argv[1], "launcher", "sleep", "4.25"]
slow_start.report_a_slow_start(launcher)
os.execv(launcher[0], launcher)
"""


def launched(script):
    return subprocess.run(
        [sys.executable, "-c", REPORTING, script], capture_output=True, text=True, check=True, timeout=30
    )


def test_a_launcher_that_starts_no_rank_is_reported_once_with_the_processes_it_waits_for():
    done = launched("sleep 1; true")
    assert done.stderr.count("\n") == 1
    assert "started no rank on host" in done.stderr
    assert "waits for sleep 1 (process " in done.stderr


def test_a_launcher_whose_program_runs_is_not_reported():
    assert launched('"$@" & sleep 0.8; kill $!').stderr == ""


def test_the_report_ends_with_the_launcher():
    """Its reader gets the end of the stream at once."""
    assert launched("exit 0").stdout == ""


def test_a_program_is_recognized_by_the_last_words_of_the_launcher():
    with subprocess.Popen(["sleep", "4.75"]) as program:
        deadline = time.monotonic() + 4
        while not (found := runs_here(["mpirun", "-n", "2", "sleep", "4.75"])) and time.monotonic() < deadline:
            pass  # the kernel shows the words of a new process a moment later
        assert found
        assert not runs_here(["mpirun", "-n", "2", "sleep", "4.7"])
        assert not runs_here(["sleep", "4.75"])  # the launcher itself
        program.kill()


def test_a_restarted_launcher_is_reported_too(monkeypatch, capsys):
    monkeypatch.setattr(slow_start, "SECONDS_UNTIL_REPORTED", 0.0)
    watched = SlowStart(os.getpid(), ["mpirun", "no such program", "at all"])
    for _ in range(2):
        watched.look()
    assert capsys.readouterr().err.count("started no rank on host") == 1


@pytest.mark.parametrize(
    ("local_rank", "living", "said"),
    [
        (0, 1, "1 of 2 ranks of host {host} live, the others are late or lost"),
        (0, 2, "2 of 2 ranks of host {host} live, one is late, or another host"),
        (0, None, "for the start of MPI (MPI_Init) on all ranks\n"),
        (2, 1, None),
    ],
)
def test_the_first_two_ranks_of_a_host_say_what_mpi_waits_for(local_rank, living, said, monkeypatch, capsys):
    for name, value in {"PMI_RANK": 2, "PMI_SIZE": 4, "MPI_LOCALRANKID": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    mpi_init.report(30.0, None, living, 2)
    printed = capsys.readouterr().err
    if said is None:
        assert printed == ""
    else:
        assert printed.startswith("distdl: rank 2 has waited for 30 s")
        assert said.format(host=os.uname().nodename) in printed
