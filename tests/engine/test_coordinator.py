"""The coordinator keeps the run folder intact: full disks, used folders, kept checkpoints, resumed runs."""

import dataclasses
import fcntl
import json
import shutil
import tomllib
from datetime import datetime

import numpy as np
import pytest
from small_runs import piece_of_digits, small_config, small_run, warnings_in

from distdl import nn
from distdl.engine import prepare as engine_run
from distdl.engine import train
from distdl.engine.environment import describe
from distdl.engine.fault_injection import fail_at, forget
from distdl.engine.storage import checkpoints, run_folder
from distdl.engine.storage.files import TEMPORARY_SUFFIX
from distdl.engine.storage.json_lines import JsonLines, line_of
from distdl.errors import PeerLost, UserError
from distdl.parallel import OneProcess
from distdl.parallel import shared as shared_module


def failing_writes(fails):
    """Let the n-th write of a checkpoint fail if ``fails(n)``."""
    count = iter(range(1, 1000))

    def refuse(_owner):
        if fails(next(count)):
            raise OSError(28, "No space left on device")

    fail_at("checkpoint-write", rank=0, nth=None, action=refuse)


def test_a_full_disk_gives_a_warning_and_training_continues(tmp_path, capsys):
    expected = small_run(OneProcess(), tmp_path / "plain")
    failing_writes(lambda count: count in {2, 3})
    assert small_run(OneProcess(), tmp_path / "run", checkpoint_every=1) == expected
    warnings = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(warnings) == 2
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [4, 5, 6]


def test_a_disk_that_stays_full_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "plain")
    failing_writes(lambda count: count > 1)
    with pytest.raises(UserError, match=r"cannot write the checkpoint after step 4 .* No space left"):
        small_run(OneProcess(), tmp_path / "run", checkpoint_every=1)
    forget()
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [1]
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected


def test_a_missed_last_checkpoint_is_an_error(tmp_path):
    failing_writes(lambda count: count == 2)
    with pytest.raises(UserError, match="cannot write the checkpoint after step 6"):
        small_run(OneProcess(), tmp_path / "run")


def test_the_run_folder_holds_the_documented_files(tmp_path):
    folder = tmp_path / "run"
    summary = train(small_config(folder), OneProcess(), dataset=piece_of_digits(94))
    assert {path.name for path in folder.iterdir()} >= {
        "checkpoints",
        "config.toml",
        "env.json",
        "metrics.jsonl",
        "summary.json",
        "timing.jsonl",
    }
    assert tomllib.loads((folder / "config.toml").read_text())["micro_batch_size"] == 4
    written = json.loads((folder / "summary.json").read_text())
    assert written["weights_sha256"] == summary.weights_sha256
    assert set(written) >= {
        "ranks",
        "steps",
        "epochs",
        "train_loss",
        "validation_loss",
        "validation_accuracy",
        "test_loss",
        "test_accuracy",
        "best_epoch",
        "test_epoch",
        "stopped_early",
        "train_seconds",
        "samples_per_second",
        "weights_sha256",
        "state_sha256",
        "recoveries",
    }
    assert written["steps"] == 6
    assert written["samples_per_second"] == pytest.approx(2 * 85 / written["train_seconds"])
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in timing] == [1, 2]


def test_a_used_folder_is_refused_and_not_changed(tmp_path):
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists and is not empty"):
        small_run(OneProcess(), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_network_with_other_outputs_than_the_labels_need_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"returns outputs \(\d+,\) for a sample, expected \(\d+,\)"):
        small_run(OneProcess(), tmp_path / "run", build_network=lambda shape, outputs: nn.mlp(shape, outputs + 1))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tmp_path):
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    with (tmp_path / "run" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run"):
            small_run(OneProcess(), tmp_path / "run", resume="auto")


def test_a_resume_with_another_setting_names_it(tmp_path):
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    with pytest.raises(UserError, match=r"--batch-size is 64 here and 32 in the checkpoint"):
        small_run(OneProcess(), tmp_path / "run", resume="auto", batch_size=64)


def test_auto_uses_the_checkpoint_before_a_damaged_one_and_ends_with_the_same_bits(tmp_path, capsys):
    expected = small_run(OneProcess(), tmp_path / "straight")
    small_run(OneProcess(), tmp_path / "run", max_steps=4, checkpoint_every=1)
    newest = checkpoints.path_of_step(tmp_path / "run" / "checkpoints", 4)
    newest.write_bytes(newest.read_bytes()[:-5])
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected
    assert f"{newest} is damaged" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "straight")
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (
            {},
            "the loss is nan at step 2, first in micro-batch 0 (computed by rank 0); the micro-batch is saved in FILE",
        ),
        ({"max_steps": 1}, "the weights are not finite after step 1"),
        ({"checkpoint_every": 1}, "the weights are not finite after step 1"),
    ],
)
def test_a_training_that_diverges_stops_with_one_line_and_saves_nothing(tmp_path, settings, what):
    with pytest.raises(UserError) as caught:
        small_run(OneProcess(), tmp_path / "run", optimizer="sgd", lr=1e39, **settings)
    what = what.replace("FILE", str(tmp_path / "run" / "not-finite-step-000000002.npz"))
    assert str(caught.value) == f"{what}: training has diverged; start a new run with a smaller --lr than 1e+39"
    assert not checkpoints.steps_in(tmp_path / "run" / "checkpoints")


def test_the_message_on_divergence_also_names_a_decay(tmp_path):
    settings = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e39, "max_steps": 1}
    with pytest.raises(UserError, match=r"with a smaller --lr than 0.1 or --weight-decay than 1e\+39$"):
        small_run(OneProcess(), tmp_path / "l2", **settings)
    settings |= {"weight_decay": 0.0, "l1_decay": 1e39}
    with pytest.raises(UserError, match=r"with a smaller --lr than 0.1 or --l1-decay than 1e\+39$"):
        small_run(OneProcess(), tmp_path / "l1", **settings)


#: Faults that the learning rate cannot cause.
WITHOUT_AN_UPDATE = [
    f"{what}: no update came before it; check the data, the initial weights and the model, not --lr"
    for what in ("the gradient is not finite at step 1, .*", "every step of epoch 1 was skipped")
]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    """The loss of the step is finite; the last element of the gradient is not."""

    def overflow(owner):
        _, record = owner
        record["gradient"][-1] = np.inf

    fail_at("backward", when="after", rank=0, nth=None, action=overflow)
    for more in ({}, {"on_nonfinite": "skip"}):
        with pytest.raises(UserError, match=WITHOUT_AN_UPDATE[len(more)]) as caught:
            small_run(OneProcess(), tmp_path / f"run {len(more)}", optimizer="momentum", **more)
        assert "diverged" not in str(caught.value)


def overflow(sums):
    sums.loss_sum[0] = np.inf


def test_a_validation_loss_that_is_not_finite_ends_the_run_before_the_checkpoint(tmp_path):
    fail_at("validation", when="after", rank=0, action=overflow)
    with pytest.raises(UserError, match="the validation loss is inf after step 3: training has diverged"):
        small_run(OneProcess(), tmp_path / "run")
    assert not checkpoints.steps_in(tmp_path / "run" / "checkpoints")
    assert "Infinity" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_test_loss_that_is_not_finite_ends_the_run_with_the_checkpoint_of_its_weights(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "plain")
    fail_at("test", when="after", rank=0, action=overflow)
    with pytest.raises(UserError, match="the test loss is inf after step 6: training has diverged"):
        small_run(OneProcess(), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not [record for record in records if "test_loss" in record]
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected


class FullDisk:
    """A log file on a disk with a given number of free bytes, shared by all logs."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room["bytes"]:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.room["bytes"]])
        self.room["bytes"] -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def room(monkeypatch):
    """Return the bytes that all logs together may still write."""
    room = {"bytes": 10**9}
    make = JsonLines.__init__

    def on_a_small_disk(self, *arguments):
        make(self, *arguments)
        self._file = FullDisk(self._file, room)

    monkeypatch.setattr(JsonLines, "__init__", on_a_small_disk)
    return room


def test_a_log_record_cut_by_a_full_disk_is_completed_when_there_is_room(tmp_path, room):
    log = JsonLines(tmp_path / "log")
    room["bytes"] = 5
    for number in range(3):
        with pytest.raises(OSError, match="No space left"):
            log.append(line_of({"number": number}))
    assert (tmp_path / "log").read_bytes() == b'{"num'
    with pytest.raises(OSError, match="No space left"):
        log.write_waiting()
    room["bytes"] = 1000
    log.write_waiting()
    log.close()
    assert (tmp_path / "log").read_text() == "".join(f'{{"number": {number}}}\n' for number in range(3))


@pytest.mark.parametrize("at", [0, 1, 50, 200])
def test_a_disk_that_is_full_for_a_while_loses_no_record_and_ends_no_run(tmp_path, room, capsys, at):
    expected = small_run(OneProcess(), tmp_path / "plain")
    capsys.readouterr()
    room["bytes"] = at
    fail_at("step", rank=0, step=5, action=lambda _: room.update(bytes=10**9))
    assert small_run(OneProcess(), tmp_path / "run") == expected
    warnings = warnings_in(capsys.readouterr().err)
    assert [("metrics.jsonl" in line, "checkpoint after step 3" in line) for line in warnings] == [
        (True, False),
        (False, True),
    ]
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [6]


def test_a_run_that_can_never_write_its_logs_ends_in_one_line_and_releases_the_folder(tmp_path, room):
    room["bytes"] = 0
    with pytest.raises(UserError, match=r"cannot write the checkpoint after step 3 .* No space left"):
        small_run(OneProcess(), tmp_path / "run", checkpoint_every=1)
    room["bytes"] = 10**9
    small_run(OneProcess(), tmp_path / "run", resume="auto")


def test_two_default_runs_of_the_same_second_get_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "datetime", type("Noon", (), {"now": lambda: datetime(2026, 1, 1, 12)}))
    one, two = (run_folder.find_start(small_config(None).checked()) for _ in range(2))
    with (
        run_folder.locked_run_folder(one) as (first, lock),
        run_folder.locked_run_folder(two) as (second, other_lock),
        lock,
        other_lock,
    ):
        assert first != second
        assert (first / "checkpoints").is_dir()
        assert (second / "checkpoints").is_dir()


def while_data_are_loaded(do):
    """Call `do` once between the choice of the run folder and its use."""
    fail_at("data", rank=0, action=lambda _: do())


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("settings", "before"), [({}, 0), ({"resume": "auto"}, 0), ({"resume": "auto"}, 2)])
def test_a_folder_that_another_run_has_used_meanwhile_is_not_changed(tmp_path, settings, before):
    """The other run is a job that was started at the same time, or one that was just ending."""
    folder, left = tmp_path / "run", {}
    if before:
        small_run(OneProcess(), folder, max_steps=before)

    def other_run():
        small_run(OneProcess(), folder, **settings)
        left.update(content_of(folder))

    while_data_are_loaded(other_run)
    with pytest.raises(UserError, match=r"another run has used the run folder .*run in the meantime: start again"):
        small_run(OneProcess(), folder, max_steps=3, **settings)
    assert content_of(folder) == left != {}
    lock = run_folder.lock_folder(folder)
    lock.close()


def lose_a_rank(*_):
    raise PeerLost("a rank was lost")


def interrupt(_state):
    raise KeyboardInterrupt


class Alone(OneProcess):
    """The only survivor of each failure."""

    def shrink(self):
        return self


def test_a_job_that_loses_a_rank_before_it_has_a_folder_takes_no_folder_of_another_job(tmp_path, monkeypatch):
    """Another job of the same second creates its folder before the failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder, "datetime", type("Noon", (), {"now": lambda: datetime(2026, 1, 1, 12)}))
    left = {}

    def other_job():
        train(small_config(None, max_steps=1), OneProcess(), dataset=piece_of_digits(94))
        left.update(content_of(tmp_path))
        lose_a_rank()

    while_data_are_loaded(other_job)
    train(small_config(None, max_steps=2), Alone(), dataset=piece_of_digits(94))
    theirs, ours = sorted((tmp_path / "runs").iterdir())
    assert content_of(theirs) == left != {}
    assert ours.name == f"{theirs.name}-2"
    assert json.loads((ours / "summary.json").read_text())["steps"] == 2


def test_a_job_that_loses_a_rank_continues_in_its_folder(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "plain")
    seen = []

    def lose_one(_owner):
        seen.append((tmp_path / "run" / "config.toml").is_file())
        lose_a_rank()

    fail_at("run-folder", when="after", rank=0, action=lose_one)
    assert small_run(Alone(), tmp_path / "run") == expected
    assert seen == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "run"]
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["recoveries"]) == 1


def test_a_run_removes_nothing_from_a_folder_that_another_run_locks_first(tmp_path, monkeypatch):
    """The other run locks the folder just before us, when its checkpoints/ is still empty."""
    folder = tmp_path / "run"

    def lost(*_):
        (folder / "checkpoints").mkdir(exist_ok=True)
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", lost)
    with pytest.raises(UserError, match="in use by another run"):
        small_run(OneProcess(), folder)
    assert (folder / "checkpoints").is_dir()


def test_the_lock_file_is_locked_again_if_its_owner_has_removed_it(tmp_path, monkeypatch):
    flock, taken = fcntl.flock, []

    def after_its_removal(lock, how):
        if not taken:
            (tmp_path / "lock").unlink()
            taken.append(lock)
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", after_its_removal)
    with (
        run_folder.locked_run_folder(run_folder.StartingPoint(tmp_path)) as (_, lock),
        lock,
        (tmp_path / "lock").open("rb") as other,
    ):
        assert len(taken) == 1
        with pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_checkpoint_is_resumed_from_inside_its_folder(tmp_path, monkeypatch):
    expected = small_run(OneProcess(), tmp_path / "straight")
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    train(small_config(None, resume="step-000000002.safetensors"), OneProcess(), dataset=piece_of_digits(94))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == expected[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "straight"]


def test_a_resume_into_the_folder_of_another_run_is_refused_and_changes_nothing(tmp_path):
    for name in ("run", "other"):
        small_run(OneProcess(), tmp_path / name, max_steps=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    checkpoint = checkpoints.path_of_step(tmp_path / "run" / "checkpoints", 2)
    with pytest.raises(UserError, match="other exists and is not empty"):
        small_run(OneProcess(), tmp_path / "other", resume=str(checkpoint))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_resumed_run_has_no_summary_before_it_ends(tmp_path):
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    assert (tmp_path / "run" / "summary.json").is_file()
    seen = []
    fail_at("step", rank=0, nth=None, action=lambda _: seen.append((tmp_path / "run" / "summary.json").exists()))
    small_run(OneProcess(), tmp_path / "run", resume="auto", max_steps=3)
    assert seen == [False]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_a_resume_removes_checkpoints_later_than_its_own(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "straight")
    folder = tmp_path / "run"
    small_run(OneProcess(), folder, checkpoint_every=1, keep_checkpoints=9)
    start = str(checkpoints.path_of_step(folder / "checkpoints", 2))
    small_run(OneProcess(), folder, resume=start, max_steps=3)
    assert checkpoints.steps_in(folder / "checkpoints") == [1, 2, 3]
    assert small_run(OneProcess(), folder, resume="auto") == expected


def test_a_run_resumed_into_another_folder_and_killed_at_once_can_be_resumed_there(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "straight")
    first, second = tmp_path / "first", tmp_path / "second"
    small_run(OneProcess(), first, max_steps=4, checkpoint_every=1, keep_checkpoints=9)
    best = checkpoints.newest_intact(first / "checkpoints")[1].header["progress"]["best_step"]

    fail_at("step", rank=0, action=interrupt)
    with pytest.raises(KeyboardInterrupt):
        small_run(OneProcess(), second, resume=str(first))
    assert checkpoints.steps_in(second / "checkpoints") == [best, 4] == [3, 4]
    shutil.rmtree(first)
    assert small_run(OneProcess(), second, resume="auto") == expected


def test_other_data_of_the_same_shape_is_refused_on_resume(tmp_path):
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    other = piece_of_digits(94)
    labels = other.labels.copy()
    labels[0] = (labels[0] + 1) % 10
    with pytest.raises(UserError, match="trained on other images or labels, or with another split"):
        train(
            small_config(tmp_path / "run", resume="auto"),
            OneProcess(),
            dataset=dataclasses.replace(other, labels=labels),
        )


def test_fewer_epochs_than_already_trained_are_refused(tmp_path):
    small_run(OneProcess(), tmp_path / "run", max_steps=4)
    with pytest.raises(UserError, match=r"taken 4 steps, and --epochs 1 are 3; give --epochs 2 or more"):
        small_run(OneProcess(), tmp_path / "run", resume="auto", epochs=1)


def test_another_numpy_gives_a_warning(tmp_path, monkeypatch, capsys):
    described = describe(OneProcess())
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    assert warnings_in(capsys.readouterr().err) == []
    described["versions"]["numpy"] = "9.9"
    described["kernel_families"] = ["Haswell", "Zen"]
    monkeypatch.setattr(engine_run, "describe", lambda *_, **__: described)
    small_run(OneProcess(), tmp_path / "run", resume="auto", max_steps=3)
    warnings = "\n".join(warnings_in(capsys.readouterr().err))
    assert f"made with NumPy {np.__version__}, this run has 9.9: bits may differ" in warnings
    assert len(warnings.splitlines()) == 1
    found = checkpoints.newest_intact(tmp_path / "run" / "checkpoints")[1].header
    assert found["kernel_family"] == "Haswell and Zen"


def test_the_speed_after_a_resume_counts_only_the_samples_after_it(tmp_path):
    """Two batches of 32 before the stop; 21 samples of the first epoch after it."""
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    small_run(OneProcess(), tmp_path / "run", resume="auto")
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert [record["samples"] for record in timing] == [21, 85]


@pytest.mark.mpi(min_size=2)
def test_no_room_for_partial_sums_is_an_error_before_anything_is_written(communicator, shared_tmp_path, monkeypatch):
    reserve = shared_module._reserve

    def full(nbytes, purpose):
        if "partial sums of gradients" in purpose:
            raise UserError(f"no room for {purpose}")
        return reserve(nbytes, purpose)

    monkeypatch.setattr(shared_module, "_reserve", full)
    with pytest.raises(UserError, match="no room for partial sums"):
        small_run(communicator, shared_tmp_path / "new" / "run")
    assert not (shared_tmp_path / "new").exists()
    communicator.barrier()


@pytest.mark.mpi(min_size=2)
def test_all_ranks_end_alike_if_only_the_coordinator_misses_a_checkpoint(communicator, shared_tmp_path):
    failing_writes(lambda count: True)
    with pytest.raises(UserError, match="cannot write the checkpoint after step 3") as caught:
        small_run(communicator, shared_tmp_path / "run", checkpoint_every=1)
    assert caught.value.agreed
    communicator.barrier()


def test_auto_refuses_a_folder_that_is_no_run_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        small_run(OneProcess(), tmp_path, resume="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("settings", [{"resume": "auto"}, {}])
def test_a_folder_counts_as_unused_if_its_run_was_killed_before_it_wrote_anything(tmp_path, settings):
    expected = small_run(OneProcess(), tmp_path / "plain")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / f"config.toml{TEMPORARY_SUFFIX}").write_text("epo")
    assert small_run(OneProcess(), tmp_path / "run", **settings) == expected
    assert not list((tmp_path / "run").glob(f"*{TEMPORARY_SUFFIX}"))


@pytest.mark.parametrize("stray", ["notes.txt", "checkpoints/notes.txt", "checkpoints"])
def test_a_folder_with_any_other_file_is_a_used_one(tmp_path, stray):
    path = tmp_path / "run" / stray
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    (tmp_path / "run" / "lock").touch()
    for settings in ({"resume": "auto"}, {}):
        with pytest.raises(UserError, match=r"exists and is not empty|is not a folder"):
            small_run(OneProcess(), tmp_path / "run", **settings)
    assert path.read_text() == "mine"
