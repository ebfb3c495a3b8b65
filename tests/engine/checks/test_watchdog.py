"""The watchdog names the late rank and shows where it is; no other rank prints, and it ends with the training."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from small_runs import small_run
from trapped_training import ended, needs_mpirun, receipt_of, start, undisturbed_receipt

from distdl.engine.checks import watchdog
from distdl.engine.checks.watchdog import HERE, SECONDS_TO_RESPOND, SLOT, Watchdog, stall_message
from distdl.job.processes import look_at
from distdl.parallel import OneProcess

NOW = 1000.0


def slot(rank, *, waits, steps=7, process=None, looked=NOW):
    """Return the record of a rank, by default of this process."""
    pid, started = process or (os.getpid(), look_at(os.getpid()).started)
    one = np.zeros(1, SLOT)[0]
    for name, value in {
        "rank": rank, "pid": pid, "started": started, "steps": steps, "waits": waits, "looked": looked
    }.items():  # fmt: skip
        one[name] = value
    return one


def lines_of(own, *others, whole_world=True, with_stack=True):
    return stall_message(own, others, 300.0, NOW, whole_world=whole_world, with_stack=with_stack)


def test_a_rank_that_does_not_wait_always_prints_where_it_is():
    for others in ([], [slot(0, waits=True)], [slot(0, waits=False)]):
        assert lines_of(slot(1, waits=False), *others) == [f"has done nothing for 300 s, after 7 steps; {HERE}"]
    assert "after 1 step;" in lines_of(slot(1, waits=False, steps=1))[0]


def test_the_lowest_waiting_rank_names_all_that_do_not_wait_and_the_others_are_silent():
    ranks = [slot(0, waits=False), slot(1, waits=True), slot(2, waits=True), slot(3, waits=False, steps=6)]
    late = f"rank 0 (process {os.getpid()}, busy after 7) and rank 3 (process {os.getpid()}, busy after 6)"
    assert lines_of(ranks[1], ranks[0], *ranks[2:]) == [f"has waited for 300 s, after 7 steps, for {late}"]
    assert lines_of(ranks[2], *ranks[:2], ranks[3]) == []


def test_ranks_that_wait_for_another_host_print_that_once():
    one, other = slot(2, waits=True), slot(3, waits=True)
    (line,) = lines_of(one, other, whole_world=False)
    assert line == "has waited for 300 s, after 7 steps, for a rank of another host; none of this host is late"
    assert lines_of(other, one, whole_world=False) == []


def test_if_all_ranks_wait_for_each_other_all_print_where_they_are():
    one, other = slot(0, waits=True), slot(1, waits=True)
    for own, rest in ((one, other), (other, one)):
        assert lines_of(own, rest) == [
            f"has waited for 300 s, after 7 steps, as all ranks do, each for another; {HERE}"
        ]


def test_without_stacks_only_the_lowest_waiting_rank_speaks():
    waiting, late = [slot(0, waits=True), slot(1, waits=True)], slot(2, waits=False)
    (line,) = lines_of(waiting[0], waiting[1], late, with_stack=False)
    assert line == f"has waited for 300 s, after 7 steps, for rank 2 (process {os.getpid()}, busy after 7)"
    assert lines_of(waiting[1], waiting[0], late, with_stack=False) == []
    assert lines_of(late, *waiting, with_stack=False) == []
    (line,) = lines_of(*waiting, with_stack=False)
    assert line == "has waited for 300 s, after 7 steps, as all ranks do, each for another"
    assert lines_of(*reversed(waiting), with_stack=False) == []


def test_a_rank_that_does_not_respond_is_late_even_if_it_waited_at_its_last_look():
    silent = slot(1, waits=True, looked=NOW - SECONDS_TO_RESPOND - 1)
    (line,) = lines_of(slot(0, waits=True), silent)
    assert line.endswith(f"for rank 1 (process {os.getpid()}, which does not respond)")


def test_a_stopped_rank_is_reported_as_stopped_and_a_dead_one_as_ended():
    child = subprocess.Popen(["sleep", "600"])
    try:
        process = (child.pid, look_at(child.pid).started)
        child.send_signal(signal.SIGSTOP)
        while look_at(child.pid).state != "T":
            time.sleep(0.01)
        (line,) = lines_of(slot(0, waits=True), slot(1, waits=True, process=process))
        assert line.endswith(f"for rank 1 (process {child.pid}, stopped by a signal)")
    finally:
        child.kill()
        child.wait()
    gone = slot(1, waits=True, process=process)
    (line,) = lines_of(slot(0, waits=True), gone)
    assert line.endswith(f"for rank 1 (process {child.pid}, which has ended)")
    (line,) = lines_of(slot(2, waits=True), gone, slot(3, waits=False))  # survivors continue without it
    assert "ended" not in line
    assert "for rank 3" in line


@pytest.fixture
def errors(capsys):
    """Return a function that returns the text of the error stream so far."""
    printed = []

    def so_far():
        printed.append(capsys.readouterr().err)
        return "".join(printed)

    return so_far


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_process_prints_repeatedly_where_it_hangs_and_then_that_it_continues(errors):
    with Watchdog(OneProcess(), 0.2) as dog:
        until(lambda: len(re.findall(r"^\[rank 0\] has done nothing", errors(), re.MULTILINE)) >= 3)
        dog.progress = lambda: (0, 1)
    lines = errors().splitlines()
    assert all(line.startswith("[rank 0] ") for line in lines)
    assert "[rank 0] has done nothing for 0 s, after 0 steps; it is here:" in lines
    assert any("test_one_process_prints_repeatedly_where_it_hangs" in line for line in lines)
    assert lines[-1].startswith("[rank 0] continues after ")


def test_a_rank_that_makes_progress_is_not_late(errors):
    counter = iter(range(10**9))
    with Watchdog(OneProcess(), 0.2) as dog:
        dog.progress = lambda: (0, next(counter))
        time.sleep(1)
    assert errors() == ""


def test_a_process_that_was_suspended_is_not_late_when_it_continues(errors, monkeypatch):
    """The clock has advanced by hours, but the rank was not idle."""
    real, hours = time.monotonic, [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: real() + hours[0])
    with Watchdog(OneProcess(), 3600) as dog:
        hours[0] = 7200.0
        until(lambda: dog._own["looked"][0] > 7200.0)
    assert errors() == ""


def test_no_thread_remains_after_the_end_and_nothing_is_printed(errors):
    before = threading.active_count()
    with pytest.raises(RuntimeError), Watchdog(OneProcess(), 0.1):
        raise RuntimeError
    assert threading.active_count() == before
    printed = errors()
    time.sleep(0.5)
    assert errors() == printed


def test_zero_seconds_turn_the_watchdog_off():
    before = threading.active_count()
    with Watchdog(OneProcess(), 0):
        assert threading.active_count() == before


def test_a_watchdog_that_hangs_does_not_keep_the_process_alive():
    program = """
import sys, time
from distdl.engine.checks.watchdog import Watchdog
from distdl.parallel import OneProcess
Watchdog(OneProcess(), 3600).__enter__()
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


@pytest.mark.mpi(min_size=2)
def test_a_rank_in_a_collective_waits_and_one_outside_does_not(communicator):
    main, seen = threading.get_ident(), []
    assert not watchdog.waits(main)
    communicator.barrier()
    if communicator.rank == 0:
        time.sleep(1)
    else:
        looks = threading.Timer(0.3, lambda: seen.append(watchdog.waits(main)))
        looks.start()
    communicator.barrier()
    if communicator.rank > 0:
        looks.join()
        assert seen == [True]


@pytest.mark.mpi(min_size=2)
def test_long_before_the_stall_warning_a_waiting_rank_names_the_late_one(communicator, monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "SECONDS_UNTIL_REPORTED", 0.5)
    monkeypatch.setattr(watchdog, "SECONDS_BETWEEN_LOOKS", 0.1)
    late = communicator.allgather_json(os.getpid())[0]
    with Watchdog(communicator, 3600):
        communicator.barrier()
        if communicator.rank == 0:
            time.sleep(2)
        communicator.barrier()
    said = capfd.readouterr().err.splitlines()
    assert bool(said) == (communicator.rank == 1)
    assert all(line.startswith("[rank 1] has waited for ") for line in said)
    assert all(f"for rank 0 (process {late}, " in line for line in said)


@pytest.mark.mpi
def test_the_bits_do_not_depend_on_the_watchdog(communicator, shared_tmp_path):
    watched = small_run(communicator, shared_tmp_path / "watched", stall_warning=0.01)
    assert watched == small_run(communicator, shared_tmp_path / "unwatched", stall_warning=0.0)


@needs_mpirun
def test_a_rank_that_hangs_in_a_step_is_named_and_shows_its_stack_and_the_run_continues(tmp_path):
    trap = "if rank == 1:\n    time.sleep(8)"
    expected = undisturbed_receipt()  # it also compiles the kernels, which takes longer than this limit
    code, printed, errors = ended(start(tmp_path, trap, flags=["--run-dir", "run", "--stall-warning", "2"]))
    assert code == 0, errors
    assert receipt_of(printed) == expected
    named = [line for line in errors.splitlines() if line.startswith("[rank 0] has waited for ")]
    assert named
    process = (tmp_path / "process-1").read_text()
    assert all(f"after 7 steps, for rank 1 (process {process}, busy after 7)" in line for line in named)
    assert "[rank 2] has" not in errors
    stack = [line for line in errors.splitlines() if line.startswith("[rank 1] ")]
    assert stack[0].endswith(f"after 7 steps; {HERE}")
    assert "[rank 1]     time.sleep(8)" in stack
