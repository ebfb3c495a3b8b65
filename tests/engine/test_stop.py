"""A signal stops the training after a step, with a checkpoint, on all ranks; a second one stops it at once."""

import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import remove, small_config, small_run, sub_world

from distdl.engine import prepare as engine_run
from distdl.engine import stop, train
from distdl.engine.coordinator import Coordinator
from distdl.engine.keeper import CheckpointKeeper
from distdl.engine.stop import SIGNALS, StopRequest
from distdl.engine.storage import checkpoints
from distdl.engine.trainer import Trainer
from distdl.errors import Stopped
from distdl.job.signals import HELD, hold_signals
from distdl.nn import Sequential
from distdl.parallel import OneProcess

pytestmark = pytest.mark.usefixtures("signals_at_their_defaults")

#: A backward pass that is neither the first nor the last of its step; the steps have 8, 8 and 6 micro-batches.
PASS_IN_STEP = {1: 2, 3: 18, 5: 32, 6: 40}


def tell(number):
    """Send this process a signal; its handler has run on return."""
    os.kill(os.getpid(), number)


def sent_by(request):
    """The counts that a rank sends with a micro-batch."""
    record = {}
    request.micro_batch(None, 0, record)
    return record["stop"]


def signal_at(monkeypatch, where, number, *, name="step", of=Trainer, when=lambda _: True):
    """Send this process a signal when `name` is called for the `where`-th time."""
    calls, original = iter(range(1, 1000)), getattr(of, name)

    def signalled(self, *arguments, **keywords):
        if next(calls) == where and when(self):
            tell(number)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(of, name, signalled)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_signal_stops_after_its_step_and_resume_gives_the_same_bits(tmp_path, monkeypatch, number, step):
    """Step 3 is the last of its epoch."""
    expected = small_run(OneProcess(), tmp_path / "straight")
    signal_at(monkeypatch, PASS_IN_STEP[step], number, name="backward", of=Sequential)
    with pytest.raises(Stopped, match=rf"stopped by {number.name} after step {step}, which is saved") as caught:
        small_run(OneProcess(), tmp_path / "run")
    assert caught.value.exit_code == 75
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints")[-1] == step
    monkeypatch.undo()
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected


@pytest.mark.parametrize(
    ("name", "of", "stopped_after"),
    [("evaluate", Trainer, 4), ("save", CheckpointKeeper, 4), ("started", Coordinator, 1)],
)
def test_a_signal_outside_a_step_waits_for_the_next_one(tmp_path, monkeypatch, name, of, stopped_after):
    """The first validation and the first checkpoint are after step 3."""
    signal_at(monkeypatch, 1, signal.SIGUSR1, name=name, of=of)
    with pytest.raises(Stopped, match=f"after step {stopped_after},"):
        small_run(OneProcess(), tmp_path / "run")


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, monkeypatch):
    expected = small_run(OneProcess(), tmp_path / "straight")
    signal_at(monkeypatch, PASS_IN_STEP[6], signal.SIGTERM, name="backward", of=Sequential)
    assert small_run(OneProcess(), tmp_path / "run") == expected


def test_ctrl_c_before_the_first_step_stops_at_once(tmp_path, monkeypatch):
    signal_at(monkeypatch, 1, signal.SIGINT, name="read_data", of=engine_run)
    with pytest.raises(KeyboardInterrupt):
        small_run(OneProcess(), tmp_path / "run")


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


def test_handlers_are_restored_and_those_of_a_script_left_alone(monkeypatch):
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
    """Any thread may take a signal to the process, and threads left by other tests block no signals."""
    signal.pthread_kill(threading.get_ident(), number)


@pytest.fixture
def blocked():
    """A function that returns the blocked signals; the signals blocked before the test are restored."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_signals_held_by_a_command_reach_the_training_and_are_held_again(blocked, monkeypatch):
    monkeypatch.setattr("distdl.job.signals._held", set())
    hold_signals()
    for number in HELD:
        tell_this_thread(number)
    request = StopRequest()
    with request.listening():
        assert not blocked() & HELD
        assert request.asked in {number.name for number in HELD}
    assert blocked() >= HELD


def test_signals_blocked_by_a_script_stay_blocked(blocked, monkeypatch):
    monkeypatch.setattr("distdl.job.signals._held", set())
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    hold_signals()
    request = StopRequest()
    with request.listening():
        tell_this_thread(signal.SIGUSR1)
        assert request.asked is None
        tell_this_thread(signal.SIGTERM)
        assert request.asked == "SIGTERM"
    signal.sigtimedwait({signal.SIGUSR1}, 0)


def test_training_in_a_thread_leaves_the_signals_alone(tmp_path, monkeypatch):
    expected = small_run(OneProcess(), tmp_path / "straight")
    handlers, seen, found = [signal.getsignal(number) for number in SIGNALS], [], []
    started = Coordinator.started

    def looks(self):
        seen.extend(signal.getsignal(number) for number in SIGNALS)
        started(self)

    monkeypatch.setattr(Coordinator, "started", looks)
    thread = threading.Thread(target=lambda: found.append(small_run(OneProcess(), tmp_path / "run")))
    thread.start()
    thread.join()
    assert found == [expected]
    assert seen == handlers


def test_a_start_that_fails_restores_the_handlers(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("before the first step")

    handlers = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.setattr(engine_run.Preparation, "trainer", fails)
    with pytest.raises(RuntimeError, match="before the first step"):
        train(small_config(tmp_path / "run"), OneProcess())
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_the_first_signal_of_any_rank_is_named():
    request = StopRequest()
    request.ended(SimpleNamespace(total={"stop": np.array([0, 3, 1, 0])}))
    assert request.agreed == "SIGTERM"
    request.ended(SimpleNamespace(total={"stop": np.zeros(len(SIGNALS), np.int64)}))
    assert request.agreed is None


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("reduction", ["tree", "allreduce"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(communicator, shared_tmp_path, monkeypatch, reduction):
    for size in range(2, min(communicator.size, 4) + 1):
        part = sub_world(communicator, size)
        for victim in range(size if part is not None else 0):
            folder = shared_tmp_path / f"{size}-{victim}"
            expected = small_run(part, folder / "straight", reduction=reduction)
            signal_at(
                monkeypatch,
                2,
                signal.SIGUSR1,
                name="_epoch_rows",
                when=lambda trainer, v=victim: trainer.communicator.rank == v,
            )
            with pytest.raises(Stopped, match="stopped by SIGUSR1 after step 2,"):
                small_run(part, folder / "run", reduction=reduction)
            monkeypatch.undo()
            assert small_run(part, folder / "run", resume="auto", reduction=reduction) == expected
    remove(communicator, shared_tmp_path)
