"""Checkpoints are written while training continues. Each has the content of its step, in order, and none is lost."""

import concurrent.futures
import json
import threading
import time

import numpy as np
import pytest
from small_runs import piece_of_digits, small_config, small_run

from distdl.engine import train
from distdl.engine.coordinator import Coordinator
from distdl.engine.storage import checkpoints, files
from distdl.engine.storage.checkpoint_writer import CheckpointWriter
from distdl.engine.storage.header import CheckpointHeader, RunProgress
from distdl.engine.storage.json_lines import JsonLines
from distdl.engine.trainer import Trainer
from distdl.errors import UserError
from distdl.parallel import OneProcess

LONG_ENOUGH = 60  # seconds; a timeout against hangs


def step_of(path):
    return int(path.stem.removeprefix("step-"))


@pytest.fixture
def held_back(monkeypatch):
    """Each write except the last waits until the next step is done."""
    write, stepped, taken = checkpoints.write, Coordinator.stepped, {step: threading.Event() for step in range(1, 7)}
    overlapped = []

    def late(path, checkpoint):
        step = step_of(path)
        if step < 6:
            assert taken[step + 1].wait(LONG_ENOUGH), "training waits for the checkpoint"
            overlapped.append(step)
        write(path, checkpoint)

    def telling(self, state, *others):
        stepped(self, state, *others)
        taken[state.step].set()

    monkeypatch.setattr(checkpoints, "write", late)
    monkeypatch.setattr(Coordinator, "stepped", telling)
    return overlapped


def test_training_continues_while_a_checkpoint_is_written_and_its_content_is_that_of_its_step(
    tmp_path, held_back, monkeypatch
):
    held = small_run(OneProcess(), tmp_path / "held", checkpoint_every=1, keep_checkpoints=9)
    assert held_back == [1, 2, 3, 4, 5]
    monkeypatch.undo()
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
    made = []

    def flush(self, flush=JsonLines.flush_to_disk):
        flush(self)
        made.append(self.path.name)

    class Renaming:
        def __getattr__(self, name):
            return getattr(files_os, name)

        def rename(self, source, target, **folders):
            files_os.rename(source, target, **folders)
            made.append(target)

    files_os = files.os
    monkeypatch.setattr(JsonLines, "flush_to_disk", flush)
    monkeypatch.setattr(files, "os", Renaming())
    small_run(OneProcess(), tmp_path / "run")
    assert sorted(made[2:4]) == sorted(made[5:7]) == ["metrics.jsonl", "timing.jsonl"]
    assert [made[4], made[7]] == ["step-000000003.safetensors", "step-000000006.safetensors"]
    assert made[:2] + made[8:] == ["config.toml", "env.json", "summary.json"]


def test_one_checkpoint_is_written_at_a_time_and_all_are_complete_when_training_returns(tmp_path, monkeypatch):
    write, running, most = checkpoints.write, [], []

    def slow(path, checkpoint):
        running.append(path)
        most.append(len(running))
        time.sleep(0.05)  # longer than a step, so a missing wait shows
        write(path, checkpoint)
        running.remove(path)

    monkeypatch.setattr(checkpoints, "write", slow)
    train(small_config(tmp_path / "run", checkpoint_every=1, keep_checkpoints=9), dataset=piece_of_digits(94))
    assert most == [1] * 6
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_run_that_stops_early_has_its_last_checkpoint_on_disk(tmp_path, monkeypatch, steps):
    write = checkpoints.write

    def slow(path, checkpoint):
        time.sleep(0.1)
        write(path, checkpoint)

    monkeypatch.setattr(checkpoints, "write", slow)
    small_run(OneProcess(), tmp_path / "run", max_steps=steps)
    assert checkpoints.newest_intact(tmp_path / "run" / "checkpoints")[1].header["step"] == steps


def test_the_pending_checkpoint_is_finished_if_training_ends_with_an_error(tmp_path, monkeypatch):
    write, step = checkpoints.write, Trainer.step

    def slow(path, checkpoint):
        time.sleep(0.1)
        write(path, checkpoint)

    def interrupted(self):
        if self.state.step == 4:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    monkeypatch.setattr(checkpoints, "write", slow)
    with pytest.raises(KeyboardInterrupt):
        small_run(OneProcess(), tmp_path / "run")
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [3]
    assert not list((tmp_path / "run" / "checkpoints").glob(f"*{files.TEMPORARY_SUFFIX}"))


def test_a_failed_checkpoint_is_reported_at_the_next_step_not_only_at_the_next_checkpoint(
    tmp_path, monkeypatch, capsys
):
    write, stepped, said = checkpoints.write, Coordinator.stepped, {}

    def refused(path, checkpoint):
        if step_of(path) == 3:
            raise OSError(28, "No space left on device")
        write(path, checkpoint)

    def patient(self, state, *others):
        if self.keeper._writer._pending is not None:
            concurrent.futures.wait([self.keeper._writer._pending], LONG_ENOUGH)
        stepped(self, state, *others)
        said[state.step] = capsys.readouterr().err

    monkeypatch.setattr(checkpoints, "write", refused)
    monkeypatch.setattr(Coordinator, "stepped", patient)
    small_run(OneProcess(), tmp_path / "run")
    assert said[4].startswith("distdl: warning: cannot write the checkpoint after step 3")
    assert said[4].endswith("No space left on device; the checkpoints before it are intact, training continues\n")
    assert [step for step in said if said[step]] == [4]


def test_the_third_failure_ends_the_run_at_the_next_checkpoint_even_if_it_was_reported_before(
    tmp_path, monkeypatch, capsys
):
    stepped = Coordinator.stepped

    def refused(path, checkpoint):
        raise OSError(5, "Input/output error")

    def patient(self, state, *others):
        if self.keeper._writer._pending is not None:
            concurrent.futures.wait([self.keeper._writer._pending], LONG_ENOUGH)
        stepped(self, state, *others)

    monkeypatch.setattr(checkpoints, "write", refused)
    monkeypatch.setattr(Coordinator, "stepped", patient)
    with pytest.raises(UserError, match=r"cannot write the checkpoint after step 3 .*make room and use --resume"):
        small_run(OneProcess(), tmp_path / "run", checkpoint_every=1)
    warnings = capsys.readouterr().err.splitlines()
    ends = ["training continues", "training continues", "training ends at the next one"]
    assert [line.rpartition(", ")[2] for line in warnings] == ends


def test_a_defect_on_the_thread_is_raised_unchanged(tmp_path, monkeypatch):
    def defective(path, checkpoint):
        raise RuntimeError("a defect on the thread")

    monkeypatch.setattr(checkpoints, "write", defective)
    for settings in ({}, {"checkpoint_every": 1}, {"max_steps": 1}):
        with pytest.raises(RuntimeError, match="a defect on the thread"):
            small_run(OneProcess(), tmp_path / f"{settings}", **settings)


def test_a_failed_removal_of_old_checkpoints_is_a_warning_and_the_new_one_counts(tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoints, "remove_old", refused)
    small_run(OneProcess(), tmp_path / "run", checkpoint_every=1)
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [1, 2, 3, 4, 5, 6]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 6
    assert all("cannot remove old checkpoints" in line and "Operation not permitted" in line for line in warnings)


def test_a_whole_run_keeps_the_last_and_the_best(tmp_path):
    small_run(OneProcess(), tmp_path / "run", checkpoint_every=1, keep_checkpoints=2, epochs=4)
    best = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert best["steps"] == 12
    folder = tmp_path / "run" / "checkpoints"
    best_step = checkpoints.newest_intact(folder)[1].header["progress"]["best_step"]
    assert checkpoints.steps_in(folder) == sorted({best_step, 11, 12})


def test_every_copy_of_the_state_uses_the_same_memory(tmp_path):
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
