"""``--resume … --prove`` continues only if recorded steps come out again, bit for bit; it changes no bit itself."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from cpu_families import FAMILIES, can_pretend
from injected import faults, flip, spoil_records
from recorded_runs import SETTINGS, STEPS_PER_EPOCH, recorded_run
from small_runs import proof, remove, worlds

from distdl.config import TrainConfig
from distdl.engine import dry_run, prepare, train
from distdl.engine.checks.watchdog import Watchdog
from distdl.engine.fault_injection import fail_at
from distdl.engine.storage import checkpoints
from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import mpirun_command, python_command
from distdl.parallel import OneProcess

STEPS = 2 * STEPS_PER_EPOCH
#: The mlp has dropout, and its learning rate depends on the progress.
PLATEAU = {"model_settings": "dropout=0.2, batch_norm", "schedule": "plateau", "plateau_patience": 1, "epochs": 3}


def resumed(folder, communicator=None, **settings):
    """Resume a run with a proof; return both hashes and the metrics."""
    config = TrainConfig(**{**SETTINGS, "run_dir": folder, "resume": "auto", "prove": True, **settings})
    return proof(folder, train(config, OneProcess() if communicator is None else communicator))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("stop", [STEPS_PER_EPOCH + 2, 2 * STEPS_PER_EPOCH])
@pytest.mark.parametrize("record_hashes", [False, True])
def test_a_proved_resume_on_other_ranks_gives_the_same_bits(communicator, shared_tmp_path, capsys, stop, record_hashes):
    settings = {**PLATEAU, "record_hashes": record_hashes}
    whole = train(TrainConfig(**{**SETTINGS, **settings, "run_dir": shared_tmp_path / "whole"}), communicator)
    communicator.barrier()
    expected = proof(shared_tmp_path / "whole", whole)
    for size, part in worlds(communicator, (1, 2, 3)):
        folder = shared_tmp_path / f"{size}"
        recorded_run(folder, part, **settings, max_steps=stop)
        capsys.readouterr()
        assert resumed(folder, part, **settings) == expected
        part.barrier()
        if part.rank == 0:
            before = max(step for step in (4, 8) if step < stop)
            last = before + 1 if record_hashes else stop
            steps = f"step {last}" if last == before + 1 else f"steps {before + 1} to {last}"
            told = f"proved: {steps}, taken again from the checkpoint after step {before}, gave the same bits in"
            assert told in capsys.readouterr().out
            assert json.loads((folder / "env.json").read_text())["proof"].startswith(told)
    remove(communicator, shared_tmp_path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after step 6, with a checkpoint after step 4."""
    return recorded_run(tmp_path_factory.mktemp("stopped") / "run", max_steps=6, record_hashes=True)


@pytest.fixture
def folder(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("record", ["gradient", "loss_sum"])
def test_other_bits_are_refused_before_anything_is_written(folder, record):
    before = files_of(folder)
    with faults():
        spoil_records(lambda values: flip(values[record], byte=2), step=5, rank=0, once=True)
        with pytest.raises(
            UserError, match=r"--prove: cannot resume from .*: this start computes other bits"
        ) as caught:
            resumed(folder, record_hashes=True)
    place = r"tensor \w+\.\w+: hash" if record == "gradient" else r"(loss|tensor epoch.loss_sum)"
    assert re.search(rf"first at step 5, {place}", str(caught.value))
    assert caught.value.exit_code == 2
    assert files_of(folder) == before
    assert resumed(folder, record_hashes=True)


def test_without_hashes_the_checkpoint_to_resume_must_come_out(folder):
    (folder / "hashes.jsonl").unlink()
    path = checkpoints.path_of_step(folder / "checkpoints", 6)
    checkpoint = checkpoints.read(path)
    weights = checkpoint.tensors["affine_1.weight"].copy()
    flip(weights)
    checkpoints.write(path, dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, "affine_1.weight": weights}))
    with pytest.raises(
        UserError, match=r"first at step 6, tensor affine_1.weight, element \(0, 1\): .* bit 19 differs"
    ):
        resumed(folder)


def test_with_hashes_the_checkpoint_to_resume_must_fit_them(folder):
    path = checkpoints.path_of_step(folder / "checkpoints", 6)
    checkpoint = checkpoints.read(path)
    weights = checkpoint.tensors["affine_1.weight"] + np.float32(1)
    checkpoints.write(path, dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, "affine_1.weight": weights}))
    with pytest.raises(UserError, match=r"--prove: cannot resume: .* has another affine_1.weight than hashes.jsonl"):
        resumed(folder, record_hashes=True)


def test_a_run_with_a_single_checkpoint_cannot_be_proved(tmp_path):
    folder = recorded_run(tmp_path / "run", max_steps=3)
    with pytest.raises(
        UserError, match=r"has no intact checkpoint before step 3 .*: write more of them \(--checkpoint"
    ):
        resumed(folder)


def test_a_damaged_earlier_checkpoint_is_passed_over(tmp_path, capsys):
    folder = recorded_run(tmp_path / "run", max_steps=6, checkpoint_every=2)
    path = checkpoints.path_of_step(folder / "checkpoints", 4)
    path.write_bytes(path.read_bytes()[:-1])
    resumed(folder, checkpoint_every=2)
    assert "proved: steps 3 to 6, taken again from the checkpoint after step 2" in capsys.readouterr().out


def test_the_flag_needs_a_run_to_resume(tmp_path, capsys):
    with pytest.raises(UserError, match="--prove takes steps of the run to resume again: give --resume too"):
        TrainConfig(prove=True).checked()
    assert resumed(tmp_path / "new", max_steps=2), "there is nothing to prove yet"
    assert "proved" not in capsys.readouterr().out


def test_a_dry_run_proves_too_and_writes_nothing(folder, capsys):
    before = files_of(folder)
    dry_run(TrainConfig(**SETTINGS, run_dir=folder, resume="auto", prove=True, record_hashes=True))
    assert "proved: step 5, taken again from the checkpoint after step 4" in capsys.readouterr().out
    assert files_of(folder) == before


def test_a_proof_replaces_the_warnings_about_versions(folder, monkeypatch, capsys):
    path = checkpoints.path_of_step(folder / "checkpoints", 6)
    checkpoint = checkpoints.read(path)
    header = {**checkpoint.header, "versions": {**checkpoint.header["versions"], "numpy": "1.0"}}
    checkpoints.write(path, dataclasses.replace(checkpoint, header=header))
    copied = folder.with_name("copy")
    shutil.copytree(folder, copied)
    resumed(folder, record_hashes=True, prove=False)
    assert "the checkpoint was made with NumPy 1.0" in capsys.readouterr().err
    resumed(copied, record_hashes=True)
    assert "the checkpoint was made with NumPy 1.0" not in capsys.readouterr().err


def test_each_micro_batch_of_a_proof_is_progress_for_the_watchdog(folder, monkeypatch):
    dogs, seen = [], []
    monkeypatch.setattr(prepare, "Watchdog", lambda *args, **kwargs: dogs.append(Watchdog(*args, **kwargs)) or dogs[0])
    with faults():
        fail_at("forward", rank=None, step=5, nth=None, action=lambda _: seen.append(dogs[0].progress()))
        resumed(folder, record_hashes=True)
    assert seen == [(4, seen[0][1] + number) for number in range(8)], "the micro-batches count"


def test_a_proof_that_hangs_is_reported_with_its_step(folder, capsys):
    printed = []

    def hang(_state):
        deadline = time.monotonic() + 60
        while "[rank 0] has done nothing" not in "".join(printed):
            assert time.monotonic() < deadline
            printed.append(capsys.readouterr().err)
            time.sleep(0.01)

    with faults():
        fail_at("forward", rank=None, step=5, action=hang)
        resumed(folder, record_hashes=True, stall_warning=0.2)
    errors = "".join(printed)
    assert re.search(r"has done nothing for \d+ s, after 4 steps; it is here:", errors), errors


@pytest.mark.skipif(not can_pretend(), reason="this CPU cannot compute as another kind")
@pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")
@pytest.mark.parametrize("kernels", ["numpy", "compiled"])
def test_another_cpu_is_refused_with_numpy_kernels_and_proved_with_compiled_ones(tmp_path, kernels):
    if kernels == "compiled":
        pytest.importorskip("numba")
    run = tmp_path / "run"
    flags = ["--model", "mlp", "--run-dir", str(run), "--kernels", kernels, "--record-hashes"]

    def trained(family, *more):
        return subprocess.run(
            [sys.executable, "-m", "distdl.train", *flags, *more],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **FAMILIES[family]},
            capture_output=True,
            text=True,
            check=False,
        )

    assert trained("Haswell", "--max-steps", "25").returncode == 0
    other = "without AVX2 and FMA" if kernels == "numpy" else "Zen"
    done = trained(other, "--max-steps", "30", "--resume", "auto", "--prove")
    if kernels == "numpy":
        assert done.returncode == 2, done.stdout
        [line] = [line for line in done.stderr.splitlines() if line.startswith("distdl: error: ")]
        assert "this start computes other bits than the run, first at step 21, tensor " in line
        assert "the run that wrote the checkpoint (Haswell; " in line
    else:
        assert done.returncode == 0, done.stderr
        assert "proved: step 21, taken again from the checkpoint after step 20, gave the same bits" in done.stdout


@pytest.mark.usefixtures("needs_mpirun")
def test_the_command_proves_under_mpirun(run_job, folder):
    program = [*python_command("distdl.train"), "--run-dir", str(folder), "--resume", "auto", "--prove"]
    done = run_job(mpirun_command(3, program), timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("proved: step 5, taken again from the checkpoint after step 4") == 1
