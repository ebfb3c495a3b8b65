"""The warden kills a rank that gives no sign of life, and nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distdl.errors import UserError
from distdl.job import warden as warden_module
from distdl.job.processes import look_at
from distdl.job.warden import Warden

SECONDS = 1.0
PROGRAM = f"""
import ctypes, os, signal, sys, time
from contextlib import suppress
from distdl.job.processes import look_at
from distdl.job.warden import Warden

with Warden("rank 3", {SECONDS}) as warden:
    print(warden._process.pid, flush=True)
    {{work}}
{{after}}
print("the end", flush=True)
"""


@pytest.fixture
def start():
    """Start a process that does some work while it has a warden; return it and the warden's process number."""
    started = []

    def start(work, after=""):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(work=work, after=after)],
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


def test_a_script_that_continues_after_a_training_is_left_alone(start):
    """The warden is gone when the block ends, not only when the script ends."""
    gone = "assert look_at(warden._process.pid) is None\n"
    no_zombie = "with suppress(ChildProcessError):\n    raise SystemExit(f'a zombie process: {os.waitpid(-1, 1)}')\n"
    assert_left_alone(*start("pass", after=f"{gone}{no_zombie}time.sleep({3 * SECONDS})"))


def test_a_stopped_warden_does_not_hold_up_the_end_of_a_training(start):
    """A stopped process does not read the end of its input. It must be killed."""
    assert_left_alone(*start("os.kill(warden._process.pid, signal.SIGSTOP)"))


def test_no_sign_is_given_after_the_end_of_a_training(monkeypatch):
    """The number of the closed pipe may then belong to a new file, which the sign would damage."""
    begun, under_way, write = threading.Event(), [], os.write

    def slow(handle, data):
        under_way.append(handle)
        begun.set()
        time.sleep(0.1)
        try:
            return write(handle, data)
        finally:
            under_way.pop()

    monkeypatch.setattr(warden_module, "SIGNS", 10**6)  # in this process; the warden still waits for a minute
    monkeypatch.setattr(os, "write", slow)
    with Warden("rank 0", 60.0):
        assert begun.wait(60)
    assert under_way == []


#: Stops the warden for longer than the seconds without a sign, and fills its pipe.
FILL_THE_PIPE = f"""
    os.kill(warden._process.pid, signal.SIGSTOP)
    with suppress(BlockingIOError):
        while True:
            os.write(warden._process.stdin.fileno(), b"." * 1024)
    time.sleep({1.5 * SECONDS})
    os.kill(warden._process.pid, signal.SIGCONT)
"""


def test_a_process_whose_warden_was_stopped_for_long_is_left_alone(start):
    """Its signs find a full pipe. They must neither wait for the warden nor end."""
    assert_left_alone(*start(f"{FILL_THE_PIPE}\n    time.sleep({3 * SECONDS})"))


def test_a_warden_that_was_stopped_for_long_still_kills_a_stopped_process(start):
    process, warden = start(f"{FILL_THE_PIPE}\n    print(flush=True); time.sleep(60)")
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    assert_killed(process, warden)


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
