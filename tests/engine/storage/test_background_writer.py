"""A checkpoint is written while training continues, with the state of its step, in order; the end waits for it."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from injected import write_checkpoints_at_once
from small_runs import piece_of_digits, small_config, small_run, warnings_in

from distdl.engine import train
from distdl.engine.fault_injection import fail_at, forget
from distdl.engine.storage import checkpoints, files
from distdl.engine.storage.background_writer import CheckpointWriter
from distdl.engine.storage.header import CheckpointHeader, RunProgress
from distdl.errors import UserError
from distdl.parallel import OneProcess

LONG_ENOUGH = 60  # seconds; prevents hanging


def refusing(number, text):
    """Return an action that fails like a full disk."""

    def refuse(_owner):
        raise OSError(number, text)

    return refuse


@pytest.fixture
def held_back():
    """Delay each write, except the last one, until the step after its own has been taken."""
    taken, written, overlapped = {step: threading.Event() for step in range(1, 7)}, iter(range(1, 7)), []

    def wait(_owner):
        step = next(written)
        if step < 6:
            assert taken[step + 1].wait(LONG_ENOUGH), "training waits for the checkpoint"
            overlapped.append(step)

    fail_at("checkpoint-write", rank=0, nth=None, action=wait)
    fail_at("checkpoint", rank=0, nth=None, action=lambda state: taken[state.step].set())
    return overlapped


def test_training_continues_while_a_checkpoint_is_written_and_its_content_is_that_of_its_step(tmp_path, held_back):
    held = small_run(OneProcess(), tmp_path / "held", checkpoint_every=1, keep_checkpoints=9)
    assert held_back == [1, 2, 3, 4, 5]
    forget()
    assert small_run(OneProcess(), tmp_path / "plain") == held
    for step in range(1, 7):
        path = checkpoints.path_of_step(tmp_path / "held" / "checkpoints", step)
        small_run(OneProcess(), tmp_path / f"until {step}", max_steps=step)
        found = checkpoints.read(path)
        other = checkpoints.read(checkpoints.path_of_step(tmp_path / f"until {step}" / "checkpoints", step))
        assert found.tensors.keys() == other.tensors.keys()
        assert all(found.tensors[name].tobytes() == other.tensors[name].tobytes() for name in other.tensors)
        assert found.header["log_bytes"]["metrics"] == other.header["log_bytes"]["metrics"]
        assert found.header["step"] == step
        assert found.header["progress"]["best_step"] == other.header["progress"]["best_step"]
        assert small_run(OneProcess(), tmp_path / f"from {step}", resume=str(path)) == held


def test_logs_are_on_the_disk_before_the_checkpoint_that_counts_their_bytes_is_visible(tmp_path, monkeypatch):
    """Each log is flushed with all the bytes that the checkpoint counts, after the checkpoint before it."""
    calls, fsync, rename = [], os.fsync, os.rename

    def flush(handle):
        fsync(handle)
        calls.append((Path(f"/proc/self/fd/{handle}").readlink().name, os.fstat(handle).st_size))

    def show(source, target, **folders):
        calls.append((target, 0))
        rename(source, target, **folders)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", show)
    small_run(OneProcess(), tmp_path / "run", record_hashes=True)
    since = 0
    for step in (3, 6):
        path = checkpoints.path_of_step(tmp_path / "run" / "checkpoints", step)
        shown = calls.index((path.name, 0))
        flushed = dict(calls[since:shown])
        log_bytes = checkpoints.read(path).header["log_bytes"]
        assert set(log_bytes) == {"metrics", "hashes", "timing"}
        for name, length in log_bytes.items():
            assert flushed.get(f"{name}.jsonl", -1) >= length > 0, name
        assert flushed[f"{path.name}{files.TEMPORARY_SUFFIX}"] == path.stat().st_size
        since = shown


def slow_writes(seconds):
    """Make each write of a checkpoint take longer than a step."""
    fail_at("checkpoint-write", rank=0, nth=None, action=lambda _: time.sleep(seconds))


def test_one_checkpoint_is_written_at_a_time_and_all_are_there_when_training_returns(tmp_path):
    running, most = [], []

    def begin(_owner):
        running.append(True)
        most.append(len(running))

    fail_at("checkpoint-write", rank=0, nth=None, action=begin)
    slow_writes(0.05)
    fail_at("checkpoint-write", when="after", rank=0, nth=None, action=lambda _: running.pop())
    train(small_config(tmp_path / "run", checkpoint_every=1, keep_checkpoints=9), dataset=piece_of_digits(94))
    assert most == [1] * 6
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_run_that_stops_early_has_its_last_checkpoint_on_disk(tmp_path, steps):
    slow_writes(0.1)
    small_run(OneProcess(), tmp_path / "run", max_steps=steps)
    assert checkpoints.newest_intact(tmp_path / "run" / "checkpoints")[1].header["step"] == steps


def test_the_checkpoint_under_way_is_completed_if_training_ends_by_an_error(tmp_path):
    def interrupt(_state):
        raise KeyboardInterrupt

    slow_writes(0.1)
    fail_at("step", rank=0, step=5, action=interrupt)
    with pytest.raises(KeyboardInterrupt):
        small_run(OneProcess(), tmp_path / "run")
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [3]
    assert not list((tmp_path / "run" / "checkpoints").glob(f"*{files.TEMPORARY_SUFFIX}"))


def test_a_missed_checkpoint_is_reported_at_the_next_step(tmp_path, monkeypatch, capsys):
    reported = {}

    def look(state):
        """Before each step, record the errors of the step before it."""
        reported[state.step] = "".join(f"{line}\n" for line in warnings_in(capsys.readouterr().err))

    write_checkpoints_at_once(monkeypatch)
    fail_at("checkpoint-write", rank=0, step=3, action=refusing(28, "No space left on device"))
    fail_at("step", rank=0, nth=None, action=look)
    small_run(OneProcess(), tmp_path / "run")
    assert reported[4].startswith("distdl: warning: cannot write the checkpoint after step 3")
    assert reported[4].endswith("No space left on device; the checkpoints before it are intact, training continues\n")
    assert [step for step in reported if reported[step]] == [4]


def test_the_third_miss_ends_the_run_at_the_next_checkpoint_even_if_it_was_reported_before(
    tmp_path, monkeypatch, capsys
):
    write_checkpoints_at_once(monkeypatch)
    fail_at("checkpoint-write", rank=0, nth=None, action=refusing(5, "Input/output error"))
    with pytest.raises(UserError, match=r"cannot write the checkpoint after step 3 .*make room and use --resume"):
        small_run(OneProcess(), tmp_path / "run", checkpoint_every=1)
    warnings = warnings_in(capsys.readouterr().err)
    ends = ["training continues", "training continues", "training ends at the next one"]
    assert [line.rpartition(", ")[2] for line in warnings] == ends


def test_a_defect_on_the_thread_is_raised_as_it_is(tmp_path):
    def defect(_owner):
        raise RuntimeError("a defect on the thread")

    fail_at("checkpoint-write", rank=0, nth=None, action=defect)
    for settings in ({}, {"checkpoint_every": 1}, {"max_steps": 1}):
        with pytest.raises(RuntimeError, match="a defect on the thread"):
            small_run(OneProcess(), tmp_path / f"{settings}", **settings)


def test_old_checkpoints_that_cannot_be_removed_give_a_warning_and_the_new_one_is_valid(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoints, "remove_old", refused)
    small_run(OneProcess(), tmp_path / "run", checkpoint_every=1)
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [1, 2, 3, 4, 5, 6]
    warnings = warnings_in(capsys.readouterr().err)
    assert len(warnings) == 6
    assert all("cannot remove old checkpoints" in line and "Operation not permitted" in line for line in warnings)


def test_a_run_keeps_the_last_and_the_best_checkpoints(tmp_path):
    small_run(OneProcess(), tmp_path / "run", checkpoint_every=1, keep_checkpoints=2, epochs=4)
    best = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert best["steps"] == 12
    folder = tmp_path / "run" / "checkpoints"
    best_step = checkpoints.newest_intact(folder)[1].header["progress"]["best_step"]
    assert checkpoints.steps_in(folder) == sorted({best_step, 11, 12})


def test_the_copy_of_the_state_is_made_into_the_same_memory_every_time(tmp_path):
    writer = CheckpointWriter(keep=1)
    array, places = np.arange(3.0), set()
    for step in (1, 2):
        array[0] = step
        header = CheckpointHeader(step, {}, RunProgress(), {}, "", {}, "")
        writer.start(tmp_path, [("w", array)], header, lambda: None)
        array[0] = -1
        assert writer.outcome(wait=True).step == step
        assert writer.outcome(wait=True) is None
        places.add(writer._copies["w"].ctypes.data)
        assert checkpoints.read(checkpoints.path_of_step(tmp_path, step)).tensors["w"].tolist() == [step, 1, 2]
    assert len(places) == 1
    assert checkpoints.steps_in(tmp_path) == [2]
    writer.close()
