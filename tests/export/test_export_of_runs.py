"""`distdl.export` turns a run folder, without its data, into files that compute what distdl computes."""

import errno
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import changes, picture
from exported import command, loaded
from test_onnx import metadata
from test_pytorch import by_numpy, by_pytorch, channels_first

from distdl.config import TrainConfig
from distdl.engine import train
from distdl.export import onnx_verification
from distdl.export.onnx_verification import computed_by_onnxruntime, outputs_of
from distdl.inference.load import Trained, load
from distdl.inference.score import evaluate
from distdl.job.launched_by import read_launch
from distdl.nn import MODELS
from distdl.parallel import OneProcess

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

USER, DAMAGED = 2, 3
NAMES = ("cat", "dog", "owl", "жук")


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Return a file of color images of 28x28 pixels with four classes, whose colors differ."""
    rng = np.random.Generator(np.random.Philox(7))
    labels = np.arange(40) % 4
    images = (rng.integers(0, 128, (40, 28, 28, 3)) + 32 * labels.reshape(-1, 1, 1, 1)).astype(np.uint8)
    path = tmp_path_factory.mktemp("colors") / "colors.npz"
    np.savez(path, images=images, labels=labels, class_names=np.array(NAMES))
    return path


def run_of(folder, dataset, **settings):
    """Train in the folder, and return the folder."""
    train(TrainConfig(dataset=dataset, run_dir=folder, **settings), OneProcess())
    return folder


@dataclass
class Exported:
    """A run folder without its data, exported to all formats."""

    run: Path
    images: np.ndarray
    trained: Trained
    outputs: np.ndarray
    """Those of distdl."""
    printed: dict[str, list[str]]

    @property
    def largest(self):
        """The largest logit, or 1: after one step the moments are not those of the data, and logits reach thousands."""
        return max(1, np.abs(self.outputs).max())


@pytest.fixture(scope="module", params=MODELS)
def exported(request, colors, tmp_path_factory):
    """Return one run of each model. It takes one step, so that the moments of batch normalization have moved too."""
    folder = tmp_path_factory.mktemp(request.param)
    data = shutil.copy(colors, folder / "data.npz")
    settings = {"optimizer": "sgd", "batch_size": 8, "micro_batch_size": 8, "max_steps": 1}
    run, printed = run_of(folder / "run", f"npz:{data}", model=request.param, **settings), {}
    data.unlink()
    for kind in ("onnx", "pytorch", "npz"):
        code, printed[kind], errors = command(run, "--to", kind)
        assert (code, errors) == (0, [])
    with np.load(colors) as arrays:
        images = arrays["images"]
    trained = loaded(run)
    yield Exported(run, images, trained, outputs_of(trained, images), printed)
    shutil.rmtree(folder)


def test_each_model_gives_the_same_labels_and_logits_in_onnx(exported):
    content = (exported.run / "model.onnx").read_bytes()
    theirs = computed_by_onnxruntime(content, exported.images)
    assert np.abs(theirs - exported.outputs).max() < 1e-4 * exported.largest
    assert np.array_equal(theirs.argmax(1), exported.outputs.argmax(1))
    assert json.loads(metadata(content)["names"]) == list(NAMES)


@pytest.mark.parametrize("computed", [by_numpy, by_pytorch])
def test_each_model_gives_the_same_logits_in_pytorch(exported, computed):
    count = 2 if computed is by_numpy else len(exported.images)
    theirs = computed(exported.run / "pytorch", channels_first(exported.images[:count]))
    assert np.abs(theirs - exported.outputs[:count]).max() < 1e-5 * exported.largest


def test_each_model_leaves_its_arrays_for_numpy(exported):
    network = exported.trained.network
    with np.load(exported.run / "model.npz") as arrays:
        for name, view in [*network.named_parameters(), *network.named_buffers()]:
            assert (arrays[name].dtype, arrays[name].tobytes()) == (view.dtype, view.tobytes())
        assert arrays["names"].tolist() == list(NAMES)
        assert arrays["image_shape"].tolist() == [28, 28, 3]
        assert arrays["weights_sha256"] == exported.trained.weights_sha256
        assert "resize" not in arrays


def test_the_output_has_the_place_the_check_and_the_receipt(exported):
    count = f"{exported.trained.network.parameter_count:,} parameters"
    for kind, place in (("onnx", "model.onnx"), ("pytorch", "pytorch"), ("npz", "model.npz")):
        first, *checks, last = exported.printed[kind]
        assert first == f"wrote {exported.run / place}: {exported.trained.config.model} after step 1, {count}"
        assert last == f"weights sha256: {exported.trained.weights_sha256}"
        assert len(checks) == (kind == "onnx")
    assert re.match(r"verified by onnxruntime \S+ on 5 images of random pixels: ", exported.printed["onnx"][1])


@pytest.fixture(scope="module", params=["mlp", "simple_convnet", "deep_convnet", "resnet20"])
def of_digits(request, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("digits") / "run", "digits", model=request.param, epochs=10)


def test_a_trained_network_gives_the_same_labels_on_the_whole_test_part(of_digits, tmp_path):
    (trained,) = load([of_digits], OneProcess())
    rows = trained.data.parts.test
    images, labels = trained.data.images[rows], trained.data.labels[rows]
    found = evaluate([trained], "test", OneProcess())
    ours = outputs_of(trained, images)
    assert np.array_equal(found.predictions, ours.argmax(1))
    assert (ours.argmax(1) == labels).mean() > 0.8
    assert command(of_digits, "--to", "onnx", "--out", tmp_path / "a.onnx")[0] == 0
    assert command(of_digits, "--to", "pytorch", "--out", tmp_path / "folder")[0] == 0
    of_onnx = computed_by_onnxruntime((tmp_path / "a.onnx").read_bytes(), images)
    of_numpy = by_numpy(tmp_path / "folder", channels_first(images))
    for theirs in (of_onnx, of_numpy):
        assert np.abs(theirs - ours).max() < 1e-4
        assert np.array_equal(theirs.argmax(1), found.predictions)


def test_a_training_starts_from_exported_weights(of_digits, tmp_path, capsys):
    assert command(of_digits, "--to", "pytorch", "--out", tmp_path / "folder")[0] == 0
    expected = loaded(of_digits)
    weights = tmp_path / "folder" / "model.safetensors"
    settings = {"model": expected.config.model, "init_from": str(weights), "max_steps": 1, "lr": 1e-30}
    capsys.readouterr()
    run = run_of(tmp_path / "run", "digits", optimizer="sgd", **settings)
    assert f"tensors from {weights}; initialized: none\n" in capsys.readouterr().out
    assert np.array_equal(loaded(run).network.parameters, expected.network.parameters)


# Flags, and the check of the file


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a run folder of a small network, whose best checkpoint is not the last one."""
    folder = tmp_path_factory.mktemp("small") / "run"
    settings = {"model": "mlp", "epochs": 4, "lr": 1.0, "keep_checkpoints": 4}
    return run_of(folder, "digits", **settings)


def test_best_exports_the_checkpoint_of_the_best_validation(small, tmp_path):
    best, last = loaded(small, best=True), loaded(small)
    assert best.step != last.step
    for flags, expected in ((["--best"], best), ([], last)):
        code, said, _ = command(small, "--to", "npz", "--out", tmp_path / "a.npz", *flags)
        assert (code, said[-1]) == (0, f"weights sha256: {expected.weights_sha256}")
        with np.load(tmp_path / "a.npz") as arrays:
            assert arrays["step"] == expected.step


def test_a_checkpoint_may_be_given_alone(small, tmp_path):
    checkpoint = sorted((small / "checkpoints").iterdir())[0]
    alone = shutil.copy(checkpoint, tmp_path / "alone.safetensors")
    assert command(alone, "--to", "onnx")[0] == 0
    assert (tmp_path / "model.onnx").is_file()
    assert command(checkpoint, "--to", "npz")[0] == 0
    assert (small / "model.npz").is_file()


def test_without_onnxruntime_the_output_says_that_nobody_checked_the_file(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, said, errors = command(small, "--to", "onnx", "--out", tmp_path / "a.onnx")
    assert (code, errors) == (0, [])
    assert said[1] == "not verified: onnxruntime is not installed (pip install onnxruntime)"
    assert (tmp_path / "a.onnx").is_file()


@pytest.mark.parametrize("error", [1.01, np.nan])
def test_a_file_that_computes_other_outputs_is_not_written(small, tmp_path, monkeypatch, error):
    monkeypatch.setattr(
        onnx_verification, "computed_by_onnxruntime", lambda *given: computed_by_onnxruntime(*given) * np.float32(error)
    )
    code, said, errors = command(small, "--to", "onnx", "--out", tmp_path / "a.onnx")
    assert (code, said, len(errors)) == (1, [], 1)
    assert errors[0].startswith("distdl: error: the ONNX file computes other outputs than distdl")
    assert list(tmp_path.iterdir()) == []


# Refusals

OWN = """\
from distdl import nn


class Doubled(nn.Affine):
    pass


def network(input_shape, classes):
    return nn.Sequential([nn.Flatten(), Doubled(4), nn.Affine(classes)], input_shape)
"""


@pytest.fixture(scope="module")
def workshop(small, tmp_path_factory):
    """Return a folder with a run in ``run``, one with a layer of the user's own in ``own``, and a damaged one."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(small, folder / "run")
    shutil.copytree(small, folder / "torn")
    for path in (folder / "torn" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    (folder / "net.py").write_text(OWN)
    (folder / "file").write_text("x")
    (folder / "closed").mkdir()
    run_of(folder / "own", "digits", model=f"{folder}/net.py:network", max_steps=1)
    return folder


MODEL = ["--model", "net.py:network"]
REFUSED = {
    "no format": (["run"], USER, ["--to onnx|pytorch|npz"]),
    "an unknown format": (["run", "--to", "onx"], USER, ["onx", "onnx", "pytorch", "npz"]),
    "no run": (["missing", "--to", "onnx"], USER, ["missing: there is no such checkpoint or run folder"]),
    "a file": (["file", "--to", "npz"], DAMAGED, ["file is damaged"]),
    "a damaged run": (["torn", "--to", "onnx"], DAMAGED, ["torn", "no checkpoint", "intact"]),
    "a name of another format": (["run", "--to", "onnx", "--out", "a.npz"], USER, ["--out a.npz", ".onnx"]),
    "a name without an ending": (["run", "--to", "npz", "--out", "a"], USER, ["--out a", ".npz"]),
    "a file for a folder": (["run", "--to", "pytorch", "--out", "file"], USER, ["--out file is a file"]),
    "a folder for a file": (["run", "--to", "onnx", "--out", "dir.onnx"], USER, ["dir.onnx is a folder"]),
    "a place below a file": (["run", "--to", "pytorch", "--out", "file/new"], USER, ["--out file/new cannot be"]),
    "code without permission": (["own", "--to", "onnx"], USER, ["add --model", "net.py:network"]),
    "a layer of one's own, ONNX": (["own", "--to", "onnx", *MODEL], USER, ["doubled_1 (Affine 4)", "ONNX", "npz"]),
    "a layer of one's own, PyTorch": (["own", "--to", "pytorch", *MODEL], USER, ["doubled_1 (Affine 4)", "PyTorch"]),
    "a model that is not the run's": (["run", "--to", "npz", *MODEL], USER, ["--model net.py:network", "mlp"]),
    "the best of a file": (["run/checkpoints/{first}", "--to", "npz", "--best"], USER, ["--best", "is a file"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_in_one_line_and_nothing_is_written(what, workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    (workshop / "dir.onnx").mkdir(exist_ok=True)
    arguments, code, words = REFUSED[what]
    first = sorted((workshop / "run" / "checkpoints").iterdir())[0].name
    before = picture(".")
    found, said, errors = command(*(one.format(first=first) for one in arguments))
    assert (found, said) == (code, []), errors
    assert len(errors) == 1
    assert [word for word in words if word not in errors[0]] == []
    assert changes(before, picture(".")) == []


def test_a_network_of_ones_own_layers_leaves_for_numpy(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(workshop)
    assert command("own", "--to", "npz", "--out", tmp_path / "a.npz", *MODEL)[0] == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["doubled_1.weight"].shape == (64, 4)
        assert arrays["model"] == "net.py:network"


def test_without_onnx_one_line_gives_the_command_that_installs_it(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, said, errors = command("run", "--to", "onnx")
    assert (code, said) == (USER, [])
    assert errors == ["distdl: error: --to onnx needs onnx, which is not installed: pip install 'distdl-mpi[onnx]'"]


def test_a_full_disk_is_one_line(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    before = picture(".")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for kind in ("onnx", "pytorch", "npz"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "writev", refuse)
            code, said, errors = command("run", "--to", kind, "--out", f"new.{kind}")
        assert (code, said) == (USER, [])
        assert "No space left on device" in errors[0]
    assert changes(before, picture(".")) == [], "the folder is removed too"


@pytest.mark.parametrize("is_new", [True, False])
def test_a_disk_that_is_full_after_the_weights_leaves_the_folder_as_it_was(workshop, monkeypatch, is_new):
    monkeypatch.chdir(workshop)
    if not is_new:
        Path("part").mkdir()
        Path("part", "model.safetensors").write_text("earlier weights")
    before, write, calls = picture("."), os.writev, []

    def only_the_first(handle, views):
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, views)

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", only_the_first)
        code, said, errors = command("run", "--to", "pytorch", "--out", "part")
    assert (code, said, len(calls)) == (USER, [], 2)
    assert "--out part/model.py cannot be written: No space left on device" in errors[0]
    assert changes(before, picture(".")) == []
