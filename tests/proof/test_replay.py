"""`distdl.replay` takes any step again, with the bits of the run, and writes the same file on any number of ranks."""

import dataclasses
import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
from recorded_runs import EVERY_STEP, STEPS_PER_EPOCH, plant, recorded_run
from small_runs import remove, worlds

from distdl import audit, compare, replay
from distdl.config import TrainConfig
from distdl.engine import train
from distdl.engine.fault_injection import forget
from distdl.engine.storage import checkpoints
from distdl.errors import DivergedError, UserError
from distdl.job.mpirun_command import python_command
from distdl.nn.kernels.choice import obstacle
from distdl.proof import replay_files, replay_step
from distdl.proof.options import ReplayOptions

STEPS = 2 * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the hashes of all steps, and checkpoints after steps 3, 4, 6 and 8."""
    settings = {"checkpoint_every": 3, "keep_checkpoints": 20, "record_hashes": True}
    return recorded_run(tmp_path_factory.mktemp("runs") / "run", **settings)


@pytest.fixture
def replayed(capsys, tmp_path):
    """Return a function that replays a step; it returns the exit code, the output, and the arrays."""

    def call(folder, step, *flags):
        capsys.readouterr()
        out = tmp_path / f"{step}.npz"
        code = replay.main([str(folder), "--step", str(step), "--out", str(out), *flags])
        with np.load(out) as archive:
            return code, capsys.readouterr().out, dict(archive)

    return call


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_every_step_has_the_recorded_bits_again(run, replayed, step):
    code, output, arrays = replayed(run, step)
    assert code == 0, output
    start = max([0, *(one for one in (3, 4, 6, 8) if one < step)])
    origin = f"the checkpoint after step {start}" if start else "the initial weights"
    assert f"step {step}, taken again from {origin}\n" in output
    assert "the same bits as the run has recorded: loss and accuracy" in output
    assert "the hash of every tensor" in output
    assert ("every tensor of the checkpoint" in output) == (step in {3, 4, 6, 8})
    if step in {3, 4, 6, 8}:
        saved = checkpoints.read(checkpoints.path_of_step(run / "checkpoints", step)).tensors
        assert saved["affine_1.weight"].tobytes() == arrays["weights_after/affine_1.weight"].tobytes()


CASES = {
    "mlp": {"model": "mlp", "model_settings": "hidden=30-20, batch_norm, dropout=0.2", "augment": "flip,shift=1"},
    "convnet": {"model": "simple_convnet", "kernels": "numpy"},
    "compiled": {"model": "simple_convnet", "kernels": "compiled"},
    "dropout and clipping": {"model": "deep_convnet", "kernels": "numpy", "clip_norm": 0.5, "schedule": "plateau"},
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", CASES)
def test_a_step_has_the_same_bytes_on_one_two_and_three_ranks(communicator, shared_tmp_path, monkeypatch, case):
    if case == "compiled" and any(communicator.allgather_json(obstacle())):
        pytest.skip("needs numba")
    monkeypatch.setattr(replay_step.figures, "has_matplotlib", lambda: False)  # the other ranks would wait for rank 0
    folder = shared_tmp_path / "run"
    recorded_run(folder, communicator, **CASES[case], max_steps=6, checkpoint_every=2)
    for step, flags in ((1, {}), (4, {"micro_batch": 2}), (6, {"layer": "affine_1"})):
        written = {}
        for size, part in worlds(communicator, (1, 2, 3)):
            monkeypatch.setattr(replay_step, "world", lambda part=part: part)
            out = shared_tmp_path / f"{step}-{size}.npz"
            assert replay_step.replay(ReplayOptions(run=folder, step=step, out=out, **flags)) == 0
            if part.rank == 0:
                written[size] = out.read_bytes()
        assert len(set(written.values())) == min(1, len(written))
        communicator.barrier()
    remove(communicator, shared_tmp_path)


@pytest.mark.usefixtures("needs_mpirun")
def test_the_command_runs_under_mpirun_and_alone_and_writes_into_the_run_folder(run_on_ranks, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    program = [*python_command("distdl.replay"), str(folder), "--step=5"]
    contents = []
    for ranks in (1, 3):
        done = run_on_ranks(ranks, program, timeout=120)
        assert done.returncode == 0, done.stderr
        [file] = folder.glob("replay-*.npz")
        contents.append(file.read_bytes())
        assert f"written: {file}\npicture: {file.with_suffix('.png')}\n" in done.stdout
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        file.unlink()
    assert contents[0] == contents[1]


def test_the_arrays_fit_together(run, replayed):
    """Loss, gradients and update of the file are those of the textbook; 384 samples are 8 micro-batches of 48."""
    _, output, arrays = replayed(run, 2, "--micro-batch", "3")
    step, alone = (arrays[f"{name}/affine_2.weight"].astype(np.float64) for name in ("step_gradients", "gradients"))
    assert arrays["images"].shape == (48, 8, 8, 1)
    assert arrays["losses"].shape == (48,)
    hidden, logits = arrays["activations/relu_1"], arrays["activations/affine_2"].astype(np.float64)
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    targets = arrays["targets"]
    np.testing.assert_allclose(arrays["losses"], -np.log(softmax[np.arange(48), targets]), rtol=1e-6)
    np.testing.assert_allclose(alone, hidden.T @ (softmax - np.eye(10)[targets]), atol=1e-5)
    others = [replayed(run, 2, "--micro-batch", str(k))[2]["gradients/affine_2.weight"] for k in range(8)]
    np.testing.assert_allclose(step, np.sum(others, axis=0, dtype=np.float64), atol=1e-4)
    written = [float(text) for text in re.findall(r"losses of micro-batches 0 to 7: (.*)", output)[0].split()]
    assert written[3] == pytest.approx(arrays["losses"].mean(), abs=1e-4)
    about = json.loads(str(arrays["about"]))
    assert (about["step"], about["micro_batch"], about["layer"]) == (2, 3, None)


@pytest.mark.parametrize("kernels", ["numpy", "compiled"])
@pytest.mark.parametrize("model", ["mlp", "simple_convnet", "resnet20"])
def test_the_pass_of_the_file_has_the_bits_of_the_training(tmp_path, replayed, model, kernels):
    """Each batch is a single micro-batch, so its gradient is the sum over the batch."""
    if kernels == "compiled" and obstacle():
        pytest.skip("needs numba")
    settings = {"batch_size": 12, "micro_batch_size": 12, "augment": "shift=1", "kernels": kernels}
    settings |= {"model_settings": "batch_norm, dropout=0.3"} if model == "mlp" else {}
    _, _, arrays = replayed(recorded_run(tmp_path / "run", model=model, max_steps=2, **settings), 2)
    names = [name.removeprefix("gradients/") for name in arrays if name.startswith("gradients/")]
    assert len(names) > 3
    assert [
        name for name in names if arrays[f"gradients/{name}"].tobytes() != arrays[f"step_gradients/{name}"].tobytes()
    ] == []


def test_the_micro_batch_with_the_greatest_loss_is_the_default(run, replayed):
    _, output, arrays = replayed(run, 4)  # the last batch has 107 samples: two micro-batches of 48, one of 11
    losses = [float(text) for text in re.findall(r"losses of micro-batches 0 to 2: (.*)", output)[0].split()]
    about = json.loads(str(arrays["about"]))
    assert about["micro_batch"] == losses.index(max(losses))
    assert f"micro-batch {about['micro_batch']}, that with the greatest loss: " in output


def test_with_a_layer_only_its_arrays_are_written(run, replayed):
    _, _, arrays = replayed(run, 2, "--layer", "affine_1")
    assert {name.partition("/")[2] for name in arrays if "/" in name} == {
        *("affine_1", "affine_1.weight", "affine_1.bias")
    }


def test_layers_inside_of_a_chain_are_named(tmp_path, replayed):
    folder = recorded_run(tmp_path / "run", model="simple_convnet", kernels="numpy", max_steps=1)
    _, _, arrays = replayed(folder, 1)
    about = json.loads(str(arrays["about"]))
    assert about["as_written"] == ["conv2d_1", "relu_1"]
    pooled = arrays["activations/relu_1"].reshape(48, 2, 2, 2, 2, -1).max(axis=(2, 4))
    np.testing.assert_allclose(arrays["activations/maxpool2d_1"], pooled, rtol=1e-5, atol=1e-6)


def test_a_bit_that_flipped_in_training_does_not_come_again(tmp_path, replayed):
    planted = plant(3, steps=1)
    folder = recorded_run(tmp_path / "run", record_hashes=True, **EVERY_STEP, max_steps=3)
    forget()
    code, output, _ = replayed(folder, 1)
    assert code == 1
    tensor, element = planted["tensor"], ", ".join(map(str, planted["element"]))
    assert re.search(rf"DIFFERENT .* first at step 1, tensor {re.escape(tensor)}, element .{element}.: ", output)
    assert "the arithmetic is that of the run, by its fingerprint" in output
    assert replayed(folder, 3)[0] == 0, "the steps after it follow from the checkpoints"


def test_both_sides_of_a_difference_can_be_compared(tmp_path, capsys):
    """Two runs with other learning rates have the same forward pass in step 1, and other weights after it."""
    files = []
    for lr in (0.001, 0.002):
        folder = recorded_run(tmp_path / f"{lr}", lr=lr, max_steps=2)
        assert replay.main([str(folder), "--step", "1", "--micro-batch", "0"]) == 0
        files.append(replay_files.path_of(folder, 1, 0))
    capsys.readouterr()
    assert compare.main([*map(str, files)]) == 1
    assert "DIFFERENT, first in weights_after/affine_1.weight, element (0, 0): " in capsys.readouterr().out
    assert compare.main([str(files[0]), str(files[0])]) == 0
    assert replay.main([str(tmp_path / "0.001"), "--step", "1", "--micro-batch", "1"]) == 0
    with pytest.raises(UserError, match=r"has micro-batch 0, .* has 1: replay the same step"):
        compare.main([str(files[0]), str(replay_files.path_of(tmp_path / "0.001", 1, 1))])


def test_a_step_that_was_not_finite_can_be_seen(tmp_path, replayed):
    with pytest.raises(UserError, match="at step 2, first in micro-batch 0"):
        recorded_run(tmp_path / "run", optimizer="sgd", lr=1e30, **EVERY_STEP)
    code, output, arrays = replayed(tmp_path / "run", 2)
    assert code == 0
    assert "the run has no record of step 2 to check it against" in output
    assert not np.isfinite(arrays["losses"]).all()


def test_a_step_before_a_validation_that_was_not_finite_can_be_seen(tmp_path, replayed):
    with pytest.raises(DivergedError, match="the validation loss is nan after step 4"):
        recorded_run(tmp_path / "run", optimizer="sgd", lr=1e30, on_nonfinite="skip", **EVERY_STEP)
    code, output, arrays = replayed(tmp_path / "run", 4)
    assert code == 0
    assert "the same bits as the run has recorded: loss and accuracy" in output
    assert not np.isfinite(arrays["losses"]).all()
    code, output, _ = replayed(tmp_path / "run", 5)
    assert code == 0
    assert "no record of step 5 to check it against; the same bits in 1 step before it" in output


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, replayed, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = checkpoints.path_of_step(folder / "checkpoints", 4)
    path.write_bytes(path.read_bytes()[:-1])
    code, output, _ = replayed(folder, 5)
    assert code == 0
    assert "taken again from the checkpoint after step 3" in output
    assert "the same bits as the run has recorded: loss and accuracy, the hash of every tensor; the same" in output
    assert replay.main([str(folder), "--step", "4"]) == 0
    assert "is damaged" in (said := capsys.readouterr().err)
    assert "; step 4 is not compared with it" in said


def test_a_step_without_a_record_is_said_to_be_unchecked(tmp_path, replayed):
    folder = recorded_run(tmp_path / "run", log_every=3)
    code, output, _ = replayed(folder, 2)
    assert code == 0
    assert "the run has no record of step 2 to check it against" in output


def test_a_forged_checkpoint_at_the_start_shows_in_the_step(run, tmp_path, replayed):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = checkpoints.path_of_step(folder / "checkpoints", 3)
    checkpoint = checkpoints.read(path)
    weights = checkpoint.tensors["affine_2.weight"] + np.float32(0.001)
    checkpoints.write(path, dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, "affine_2.weight": weights}))
    code, output, _ = replayed(folder, 4)
    assert code == 1
    assert "DIFFERENT from the records of the run, first at step 4, tensor " in output


def test_what_cannot_be_replayed_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([run], r"required: --step N"),
        ([run, "--step", "0"], "--step 0: .* has taken 8 steps; give a step from 1 to 8"),
        ([run, "--step", "9"], "give a step from 1 to 8"),
        ([run, "--step", "4", "--micro-batch", "3"], "step 4 has 3 micro-batches; give a number from 0 to 2"),
        ([run, "--step", "4", "--layer", "afine_1"], "did you mean 'affine_1'"),
        ([run, "--step", "4", "--out", "x.png"], "expected a name that ends in .npz"),
        ([tmp_path / "empty", "--step", "4"], "expected a run folder"),
        ([run / "metrics.jsonl", "--step", "4"], "is not a folder: expected the run folder of a training"),
        ([run, "--step", "4", "--data-dir", "x"], "--data-dir has no effect with digits"),
    ):
        with pytest.raises(UserError, match=message):
            replay.main(list(map(str, arguments)))


def test_other_data_are_refused(tmp_path):
    images, labels = np.zeros((80, 4, 4, 1), np.uint8), np.arange(80) % 2
    images[labels == 1] = 200
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    run = recorded_run(tmp_path / "run", dataset=f"npz:{tmp_path / 'data.npz'}", batch_size=96)
    images[0] = 7
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    for step in (1, 2):
        with pytest.raises(UserError, match="other images or labels"):
            replay.main([str(run), "--step", str(step)])


def test_a_model_of_the_user_is_run_only_if_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from distdl import nn\n\ndef build(shape, classes, hidden=8):\n    return nn.Sequential([nn.Flatten(), "
        "nn.Affine(hidden), nn.ReLU(), nn.Affine(classes)], shape)\n"
    )
    run = recorded_run(tmp_path / "run", model="net.py:build", model_settings="hidden=5", max_steps=2)
    with pytest.raises(UserError, match="trained with a model from user code; if you trust that code, add --model"):
        replay.main([str(run), "--step", "2"])
    (tmp_path / "moved").mkdir()
    (tmp_path / "net.py").rename(tmp_path / "moved" / "net.py")
    assert replay.main([str(run), "--step", "2", "--model", "moved/net.py:build"]) == 0
    assert "the same bits as the run has recorded" in capsys.readouterr().out


def test_one_line_names_all_that_a_run_from_a_script_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(
        "import numpy as np\nimport distdl\nfrom distdl import nn\n\ndef network(shape, classes):\n"
        "    return nn.Sequential([nn.Flatten(), nn.Affine(classes)], shape)\n\ndef data(data_dir):\n"
        "    labels = np.arange(90) % 2\n    images = np.repeat(9 * labels, 16).reshape(90, 4, 4, 1)"
        ".astype(np.uint8)\n    return distdl.Dataset.from_labels('mine', images, labels)\n"
    )
    spec = importlib.util.spec_from_file_location("script", tmp_path / "script.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.network.__module__ = "__main__"
    train(TrainConfig(epochs=1, run_dir=tmp_path / "run"), dataset=script.data(None), build_network=script.network)
    for command in (replay.main, audit.main):
        arguments = [str(tmp_path / "run"), *(["--step", "1"] if command is replay.main else [])]
        with pytest.raises(UserError, match=r"add --model SCRIPT.py:network --dataset SCRIPT.py:FUNCTION \("):
            command(arguments)
        own = [*arguments, "--model", "script.py:network"]
        with pytest.raises(UserError, match=r"--dataset npz:FILE.npz, or by --dataset SCRIPT.py:FUNCTION") as caught:
            command(own)
        assert "distdl.load" not in str(caught.value), "that does not help here"
        capsys.readouterr()
        assert command([*own, "--dataset", "script.py:data"]) == 0
        assert "the same bits" in capsys.readouterr().out


def test_a_replay_writes_nothing_but_its_files(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert replay.main([str(folder), "--step", "5", "--micro-batch", "0"]) == 0
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {
        folder / f"replay-step-000000005-micro-batch-0.{end}" for end in ("npz", "png")
    }
    assert all(after[path] == content for path, content in before.items())


def test_without_matplotlib_the_npz_is_written_and_one_line_says_so(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(replay_step.figures, "has_matplotlib", lambda: False)
    assert replay.main([str(run), "--step", "2", "--out", str(tmp_path / "x.npz")]) == 0
    assert (
        "no picture is drawn: drawing it needs matplotlib (pip install 'distdl-mpi[plots]')" in capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz"]
