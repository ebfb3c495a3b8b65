"""The coordinator keeps the run folder whole: full disks, used folders, what is kept and what is resumed."""

import fcntl
import json
import sys
import tomllib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))
from small_runs import piece_of_digits, small_config, small_run

from distdl.engine import checkpoint as checkpoints
from distdl.engine import train
from distdl.errors import UserError
from distdl.parallel import OneProcess


def failing_writes(monkeypatch, fails):
    """Let the n-th write of a checkpoint fail where ``fails(n)``."""
    write, count = checkpoints.write, iter(range(1, 1000))

    def flaky(path, checkpoint):
        if fails(next(count)):
            raise OSError(28, "No space left on device")
        write(path, checkpoint)

    monkeypatch.setattr(checkpoints, "write", flaky)


def test_a_full_disk_is_warned_about_and_training_goes_on(tmp_path, monkeypatch, capsys):
    expected = small_run(OneProcess(), tmp_path / "plain")
    failing_writes(monkeypatch, lambda count: count in {2, 3})
    assert small_run(OneProcess(), tmp_path / "run", checkpoint_every=1) == expected
    warnings = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(warnings) == 2
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [4, 5, 6]


def test_a_disk_that_stays_full_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    expected = small_run(OneProcess(), tmp_path / "plain")
    failing_writes(monkeypatch, lambda count: count > 1)
    with pytest.raises(UserError, match=r"cannot write the checkpoint after step 4 .* No space left"):
        small_run(OneProcess(), tmp_path / "run", checkpoint_every=1)
    monkeypatch.undo()
    assert checkpoints.steps_in(tmp_path / "run" / "checkpoints") == [1]
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected


def test_the_last_checkpoint_must_not_be_missed(tmp_path, monkeypatch):
    failing_writes(monkeypatch, lambda count: count == 2)
    with pytest.raises(UserError, match="cannot write the checkpoint after step 6"):
        small_run(OneProcess(), tmp_path / "run")


def test_the_run_folder_holds_what_the_design_says(tmp_path):
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
        "validation_accuracy",
        "test_accuracy",
        "train_seconds",
        "samples_per_second",
        "weights_sha256",
        "state_sha256",
        "recoveries",
    }
    assert written["steps"] == 6
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in timing] == [1, 2]


def test_a_folder_used_before_is_refused_and_left_as_it_is(tmp_path):
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists and is not empty"):
        small_run(OneProcess(), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


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


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "straight")
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected


def test_a_training_that_diverges_stops_with_one_line(tmp_path):
    with pytest.raises(UserError, match="training has diverged; give a smaller --lr"):
        small_run(OneProcess(), tmp_path / "run", optimizer="sgd", lr=1e30)


def test_auto_refuses_a_folder_that_is_no_run_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        small_run(OneProcess(), tmp_path, resume="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
