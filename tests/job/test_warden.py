"""The warden kills a rank that gives no sign of life, and nothing else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distdl.errors import UserError
from distdl.job.processes import look_at
from distdl.job.warden import Warden

SECONDS = 1.0
PROGRAM = f"""
import ctypes, os, signal, sys, time
from distdl.job.warden import Warden

with Warden("rank 3", {SECONDS}) as warden:
    print(warden._process.pid, flush=True)
    {{work}}
print("the end", flush=True)
"""


@pytest.fixture
def start():
    """Start a process that does some work while it has a warden; return it and the warden's process number."""
    started = []

    def start(work):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(work=work)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            cwd=Path(__file__).parents[2],
        )
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def is_gone(pid):
    ends = time.monotonic() + 10  # against hanging
    while look_at(pid) is not None and time.monotonic() < ends:
        time.sleep(0.01)
    return look_at(pid) is None


def assert_killed(process, warden):
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (line,) = error.splitlines()
    assert line == (
        f"distdl: rank 3 (process {process.pid}, host {os.uname().nodename}) has given no sign of life for "
        f"{SECONDS:g} s and is killed"
    )
    assert is_gone(warden)


def assert_left_alone(process, warden):
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (0, "the end\n", "")
    assert is_gone(warden)


def test_a_stopped_process_is_killed(start):
    process, warden = start("time.sleep(60)")
    os.kill(process.pid, signal.SIGSTOP)
    assert_killed(process, warden)


def test_a_process_stuck_in_a_library_is_killed(start):
    assert_killed(*start("ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock"))


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(f"time.sleep({3 * SECONDS})", id="waits"),
        pytest.param(f"while time.process_time() < {3 * SECONDS}: pass", id="computes"),
        pytest.param("pass", id="ends at once"),
    ],
)
def test_a_slow_process_is_left_alone(start, work):
    assert_left_alone(*start(work))


def test_a_job_that_is_suspended_as_a_whole_is_left_alone(start):
    """As by Ctrl-Z, or by a scheduler that needs the cores for another job."""
    process, warden = start(f"time.sleep({3 * SECONDS})")
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(2 * SECONDS)
    os.killpg(process.pid, signal.SIGCONT)
    assert_left_alone(process, warden)


def test_the_warden_stays_when_its_rank_is_signalled(start):
    process, warden = start("[signal.signal(one, print) for one in (2, 10, 15)]; print(flush=True); time.sleep(60)")
    process.stdout.readline()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.killpg(process.pid, number)
    os.kill(process.pid, signal.SIGSTOP)
    assert_killed(process, warden)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_warden_of_a_process_that_dies_ends_too(start, number):
    process, warden = start("time.sleep(60)")
    os.kill(process.pid, number)
    assert is_gone(warden)


def test_a_process_whose_warden_is_killed_prints_that_and_continues(start):
    process, warden = start(f"time.sleep({SECONDS})")
    os.kill(warden, signal.SIGKILL)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "the end\n")
    assert error == "distdl: rank 3 has lost its warden: if it hangs, it will not be killed (--detect-hangs)\n"


def test_without_seconds_there_is_no_warden():
    with Warden("rank 0", 0.0) as warden:
        assert warden._process is None


def test_a_warden_that_cannot_be_started_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    message = r"--detect-hangs cannot start .*No such file.*; leave the flag out"
    with pytest.raises(UserError, match=message), Warden("rank 0", 1.0):
        pass
