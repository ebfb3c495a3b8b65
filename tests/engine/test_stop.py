"""A signal stops the training after a step, with a checkpoint, on all ranks; a second one stops it at once."""

import os
import signal
import threading
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import RAGGED, piece_of_digits, remove, small_config, small_run, sub_world

from distdl.engine import dry_run, stop, train
from distdl.engine.fault_injection import fail_at
from distdl.engine.stop import SIGNALS, StopRequest
from distdl.engine.storage import checkpoints
from distdl.errors import Stopped
from distdl.job.held_signals import HELD, hold_signals
from distdl.parallel import OneProcess

pytestmark = pytest.mark.usefixtures("signals_at_their_defaults")


def tell(number):
    """Send this process a signal, and return after its handler has run."""
    os.kill(os.getpid(), number)


def sent_by(request):
    """Return the counts that a rank sends with a micro-batch."""
    record = {}
    request.micro_batch_done(None, 0, record)
    return record["stop"]


def signal_at(number, phase, *, rank=0, **point):
    """Send the process of a rank a signal when it reaches a point."""
    fail_at(phase, rank=rank, action=lambda _: tell(number), **point)


def signal_within(step, number):
    """Send a signal after the second micro-batch of a step, which is not the last one."""
    signal_at(number, "backward", when="after", step=step, nth=2)


def defect(_owner):
    raise RuntimeError("a defect")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_signal_stops_after_its_step_and_resume_gives_the_same_bits(tmp_path, number, step):
    """Step 3 is the last of its epoch."""
    expected = small_run(OneProcess(), tmp_path / "straight")
    signal_within(step, number)
    with pytest.raises(Stopped, match=rf"stopped by {number.name} after step {step}, which is saved") as caught:
        small_run(OneProcess(), tmp_path / "run")
    assert caught.value.exit_code == 75
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints")[-1] == step
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected


@pytest.mark.parametrize(("phase", "stopped_after"), [("validation", 4), ("checkpoint", 4), ("training", 1)])
def test_a_signal_outside_a_step_waits_for_the_next_one(tmp_path, phase, stopped_after):
    """The first validation and the first checkpoint are after step 3."""
    signal_at(signal.SIGUSR1, phase)
    with pytest.raises(Stopped, match=f"after step {stopped_after},"):
        small_run(OneProcess(), tmp_path / "run")


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "straight")
    signal_within(6, signal.SIGTERM)
    assert small_run(OneProcess(), tmp_path / "run") == expected


def test_ctrl_c_before_the_first_step_stops_at_once(tmp_path):
    signal_at(signal.SIGINT, "data")
    with pytest.raises(KeyboardInterrupt, match="before the first step"):
        small_run(OneProcess(), tmp_path / "run")


def read_while_signalled(number, monkeypatch, place):
    """Send a signal while rank 0 reads the data, within code that handles any exception."""

    def read(*_):
        with suppress(Exception):
            tell(number)
        pytest.fail("the signal has not interrupted the work")

    monkeypatch.setattr(place, read)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_data_is_read_interrupts_it_and_saves_nothing(tmp_path, monkeypatch, number):
    read_while_signalled(number, monkeypatch, "distdl.engine.prepare.read_data")
    with pytest.raises(Stopped, match=f"stopped by {number.name} before the first step; nothing was saved") as caught:
        small_run(OneProcess(), tmp_path / "run")
    assert caught.value.exit_code == 75
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["distdl.engine.prepare.read_data", "distdl.engine.plan.data_lines"])
def test_a_signal_interrupts_a_dry_run(tmp_path, monkeypatch, place):
    read_while_signalled(signal.SIGTERM, monkeypatch, place)
    with pytest.raises(Stopped, match="stopped by SIGTERM before the first step"):
        dry_run(small_config(tmp_path / "run"), OneProcess(), dataset=piece_of_digits(RAGGED))


@pytest.mark.parametrize("phase", ["forward", "validation"])
def test_a_signal_in_a_measured_step_stops_the_dry_run_after_it(tmp_path, phase, monkeypatch):
    steps = []
    monkeypatch.setattr("distdl.engine.trainer.Trainer.evaluate", lambda *_: (steps.append(1), tell(signal.SIGTERM)))
    if phase == "forward":
        signal_at(signal.SIGTERM, "forward", step=1)
    with pytest.raises(Stopped, match="stopped by SIGTERM before the first step"):
        dry_run(small_config(tmp_path / "run"), OneProcess(), dataset=piece_of_digits(RAGGED))
    assert len(steps) == (0 if phase == "forward" else 1)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_stops_at_once_but_not_an_echo_of_the_first(monkeypatch, first, second):
    now = 100.0
    monkeypatch.setattr(stop.time, "monotonic", lambda: now)
    request = StopRequest()
    with request.listening():
        sent_by(request)
        tell(first)
        now += stop.SAME_REQUEST_SECONDS / 2
        tell(second)
        now += stop.SAME_REQUEST_SECONDS
        with pytest.raises(KeyboardInterrupt, match=second.name):
            tell(second)


def test_handlers_are_restored_and_those_of_a_script_are_not_replaced(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        handlers = [signal.getsignal(number) for number in SIGNALS]
        request = StopRequest()
        with request.listening():
            tell(signal.SIGTERM)
            tell(signal.SIGUSR1)
            assert signal.getsignal(signal.SIGINT) == request._hear
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
        assert heard == [True]
        assert not sent_by(request).any()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, ignored)


def tell_this_thread(number):
    """Any thread may receive a signal to the process. Threads of earlier tests do not block signals."""
    signal.pthread_kill(threading.get_ident(), number)


@pytest.fixture
def blocked():
    """Return a function that returns the blocked signals; restore those blocked before the test."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_signals_held_by_a_command_reach_the_training_and_are_held_again(blocked, monkeypatch):
    monkeypatch.setattr("distdl.job.held_signals._held", set())
    hold_signals()
    for number in HELD:
        tell_this_thread(number)
    request = StopRequest()
    with request.listening():
        assert not blocked() & HELD
        assert request.asked in {number.name for number in HELD}
    assert blocked() >= HELD


def test_signals_blocked_by_a_script_stay_blocked(blocked, monkeypatch):
    monkeypatch.setattr("distdl.job.held_signals._held", set())
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    hold_signals()
    request = StopRequest()
    with request.listening():
        tell_this_thread(signal.SIGUSR1)
        assert request.asked is None
        tell_this_thread(signal.SIGTERM)
        assert request.asked == "SIGTERM"
    signal.sigtimedwait({signal.SIGUSR1}, 0)


def test_training_in_a_thread_changes_no_signal_handlers(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "straight")
    handlers, seen, found = [signal.getsignal(number) for number in SIGNALS], [], []
    fail_at("training", rank=0, action=lambda _: seen.extend(signal.getsignal(number) for number in SIGNALS))
    thread = threading.Thread(target=lambda: found.append(small_run(OneProcess(), tmp_path / "run")))
    thread.start()
    thread.join()
    assert found == [expected]
    assert seen == handlers


@pytest.mark.parametrize("phase", ["data", "step", "checkpoint", "finish"])
def test_a_training_that_ends_by_an_exception_leaves_the_signals_as_it_found_them(
    tmp_path, monkeypatch, blocked, phase
):
    """The handlers are restored. The signals that a command holds are held again: they wait, and nothing handles them.

    In a script they would end the process in the middle of its next lines.
    """
    monkeypatch.setattr("distdl.job.held_signals._held", set())
    hold_signals()
    handlers = [signal.getsignal(number) for number in SIGNALS]
    fail_at(phase, rank=0, action=defect)
    with pytest.raises(RuntimeError, match="a defect"):
        train(small_config(tmp_path / "run"), OneProcess())
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert blocked() >= HELD
    for number in HELD:
        tell_this_thread(number)
        assert signal.sigtimedwait({number}, 0).si_signo == number


def test_the_first_signal_of_any_rank_is_named():
    request = StopRequest()
    request.end(SimpleNamespace(total={"stop": np.array([0, 3, 1, 0])}))
    assert request.agreed == "SIGTERM"
    request.end(SimpleNamespace(total={"stop": np.zeros(len(SIGNALS), np.int64)}))
    assert request.agreed is None


@pytest.mark.mpi(min_size=2)
def test_a_signal_to_one_rank_before_the_data_is_read_stops_all(communicator, shared_tmp_path):
    for victim in range(communicator.size):
        request = StopRequest()
        with request.listening():
            if communicator.rank == victim:
                tell(signal.SIGUSR1)
            with pytest.raises(Stopped, match="stopped by SIGUSR1 before the first step"):
                train(
                    small_config(shared_tmp_path / "run"), communicator, dataset=piece_of_digits(RAGGED), stop=request
                )
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("reduction", ["tree", "allreduce"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(communicator, shared_tmp_path, reduction):
    for size in range(2, min(communicator.size, 4) + 1):
        part = sub_world(communicator, size)
        for victim in range(size if part is not None else 0):
            folder = shared_tmp_path / f"{size}-{victim}"
            expected = small_run(part, folder / "straight", reduction=reduction)
            signal_at(signal.SIGUSR1, "step", step=2, rank=victim)
            with pytest.raises(Stopped, match="stopped by SIGUSR1 after step 2,"):
                small_run(part, folder / "run", reduction=reduction)
            assert small_run(part, folder / "run", resume="auto", reduction=reduction) == expected
    remove(communicator, shared_tmp_path)
