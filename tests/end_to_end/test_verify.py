"""`distdl.verify` proves equal bits, and finds the first step and tensor that differ."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from bad_inputs import TRAIN_IMAGES, mnist_files, write_files

from distdl import verify
from distdl.config import MODELS
from distdl.errors import UserError
from distdl.job.launched_by import Launch
from distdl.verify import Outcome, first_difference

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def verified(run_program, tmp_path):
    """Run `distdl.verify` in an empty folder, which is also the folder of temporary files."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}

    def run(*arguments):
        return run_program(
            [sys.executable, "-m", "distdl.verify", *arguments], env=environment, cwd=tmp_path, timeout=120
        )

    return run


@pytest.mark.usefixtures("needs_mpirun")
def test_equal_bits_are_proved_and_no_file_remains(verified, tmp_path):
    done = verified("--ranks", "1,2,3", "--", "--max-steps", "12", "--model", "deep_convnet")
    assert done.returncode == 0, done.stderr
    same = "same bits on 1,2,3 ranks: weights, state and metrics.jsonl agree after 12 steps"
    assert done.stdout.count(same) == 2
    lines = [line for line in done.stdout.splitlines() if line.startswith("kernels: ")]
    assert lines == ["kernels: numpy", "kernels: compiled"]
    assert not list(tmp_path.glob("distdl-verify-*"))


@pytest.mark.usefixtures("needs_mpirun")
def test_bits_that_depend_on_the_ranks_are_found_at_the_first_step(verified, tmp_path):
    done = verified("--ranks", "1,3", "--", "--max-steps", "3", "--reduction", "allreduce")
    assert done.returncode == 1, done.stderr
    assert re.search(r"DIFFERENT: first at step 1, tensor \w+\.\w+: hash [0-9a-f]{16} with 1 ranks", done.stdout)


@pytest.mark.usefixtures("needs_mpirun")
def test_a_failed_training_is_reported_in_one_line(verified, tmp_path):
    done = verified("--ranks", "1,2", "--", "--model", "simple_convet")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"distdl: error: with 1 ranks: unknown model 'simple_convet': expected one of {', '.join(sorted(MODELS))}; "
        "did you mean 'simple_convnet'? (for your own, give file.py:function)"
    ]

    assert not list(tmp_path.glob("distdl-verify-*"))


@pytest.mark.usefixtures("needs_mpirun")
def test_a_damaged_file_keeps_its_exit_code_and_no_file_remains(verified, tmp_path):
    files = mnist_files()
    write_files(tmp_path / "data", {**files, TRAIN_IMAGES: files[TRAIN_IMAGES][:-1]})
    done = verified("--ranks", "1,2", "--", "--dataset", "mnist", "--data-dir", "data")
    assert done.returncode == 3
    assert TRAIN_IMAGES in done.stderr
    assert not list(tmp_path.glob("distdl-verify-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2"], "at least two different numbers"),
        (["--ranks", "0,1"], "at least two different numbers"),
        (["--ranks", "one,2"], "at least two different numbers"),
        (["--rank", "x"], r"unknown flag --rank: did you mean --ranks\? \(flags of distdl.train go after --\)"),
        (["--ranks", "1,2", "--", "--run-dir", "x"], "--run-dir is set by distdl.verify itself"),
        (["--ranks", "1,2", "--", "-h"], "-h after -- trains nothing: python -m distdl.train --help"),
    ],
)
def test_wrong_flags_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        verify.main(arguments)


def test_verify_under_mpirun_is_refused(monkeypatch):
    monkeypatch.setattr(verify, "read_launch", lambda: Launch("MPICH's mpirun", 0, 2))
    with pytest.raises(UserError, match="starts its ranks itself: call it without mpirun"):
        verify.main([])


def outcome(folder, ranks, hashes, *, metrics=b"", weights="w"):
    folder.mkdir()
    (folder / "hashes.jsonl").write_text(
        "".join(json.dumps({"step": step, "hashes": each}) + "\n" for step, each in enumerate(hashes, 1))
    )
    return Outcome(ranks, folder, 0.0, len(hashes), (weights, "s", metrics))


def test_the_first_different_tensor_is_named(tmp_path):
    one = outcome(tmp_path / "a", 1, [{"w": "1", "b": "1"}, {"w": "2", "b": "2"}, {"w": "3", "b": "3"}])
    two = outcome(tmp_path / "b", 2, [{"w": "1", "b": "1"}, {"w": "2", "b": "x"}, {"w": "y", "b": "3"}])
    assert first_difference(one, two) == "first at step 2, tensor b: hash 2 with 1 ranks, hash x with 2"


def test_a_difference_only_in_the_metrics_is_named(tmp_path):
    one, two = outcome(tmp_path / "a", 1, [{"w": "1"}]), outcome(tmp_path / "b", 2, [{"w": "1"}], metrics=b"x")
    assert first_difference(one, two) == "the weights agree, metrics.jsonl does not, with 1 and 2 ranks"
