"""An ONNX file computes what distdl computes, from the same pixels; onnxruntime is the other implementation."""

import json

import numpy as np
import pytest
from exported import STACKS, random_trained

from distdl.errors import UserError
from distdl.export import onnx_file as onnx_module
from distdl.export.onnx_file import onnx_file
from distdl.export.onnx_verification import computed_by_onnxruntime, outputs_of, random_pixels
from distdl.job.launched_by import read_launch
from distdl.nn import Affine, AvgPool2d, Conv2d, Flatten, Layer, LocalResponseNorm, Residual, Sequential

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def metadata(content):
    return {one.key: one.value for one in onnx.load_from_string(content).metadata_props}


def difference(trained, content, count=5):
    """Return the greatest difference between the outputs of onnxruntime and distdl."""
    pixels = random_pixels(trained.signature, count)
    ours, theirs = outputs_of(trained, pixels), computed_by_onnxruntime(content, pixels)
    assert (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
    assert ours.std() > 0
    return np.abs(ours - theirs).max()


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
@pytest.mark.parametrize("stack", STACKS)
def test_every_layer_in_every_place_computes_the_same_numbers(stack, pixels):
    trained = random_trained(STACKS[stack](), pixels=pixels)
    content = onnx_file(trained)
    for count in (1, 2, 5):
        assert difference(trained, content, count) < 1e-4


def test_no_layer_of_distdl_is_forgotten():
    """Each layer of the package is either exported, or the base of others."""
    from distdl import nn

    layers = {one for one in vars(nn).values() if isinstance(one, type) and issubclass(one, Layer)}
    assert layers == set(onnx_module.FORMS)
    used = {type(layer) for make in STACKS.values() for layer in Sequential(make(), (7, 6, 3)).every_layer()}
    assert used == layers


@pytest.mark.parametrize("loss", ["auto", "binary_cross_entropy"])
def test_the_metadata_has_the_task_the_names_and_the_receipt(loss):
    names = ("a cat", 'two\nlines, "quoted"', "жук")[: 2 if loss == "binary_cross_entropy" else 3]
    outputs = 1 if loss == "binary_cross_entropy" else 3
    trained = random_trained([Flatten(), Affine(outputs)], names=names, loss=loss, resize="32")
    content = onnx_file(trained)
    found = metadata(content)
    assert found["task"] == "classification"
    assert json.loads(found["names"]) == list(names)
    assert found["activation"] == ("softmax" if loss == "auto" else "sigmoid")
    assert found["weights_sha256"] == trained.weights_sha256
    assert (found["model"], found["step"], found["resize"]) == ("net.py:network", "3", "32")
    assert (json.loads(found["image_shape"]), found["pixels"]) == ([7, 6, 3], "uint8")
    assert json.loads(found["mean"]) == list(trained.signature.mean)
    assert "target_mean" not in found
    graph = onnx.load_from_string(content).graph
    assert [one.name for one in graph.input] == ["pixels"]
    assert [one.name for one in graph.output] == ["logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_outputs_without_names_have_their_numbers():
    assert json.loads(metadata(onnx_file(random_trained([Flatten(), Affine(3)])))["names"]) == ["0", "1", "2"]


def test_a_label_for_each_pixel_has_its_class_last():
    trained = random_trained([Conv2d(4, 3, padding=1)], task="segmentation", outputs=4)
    content = onnx_file(trained)
    assert difference(trained, content) < 1e-4
    assert computed_by_onnxruntime(content, random_pixels(trained.signature, 2)).shape == (2, 7, 6, 4)


def test_numbers_are_in_the_units_of_the_labels():
    targets = {"target_mean": (100.0, -3.0), "target_deviation": (50.0, 0.25)}
    for settings in ({}, targets):
        trained = random_trained([Flatten(), Affine(2)], task="regression", names=("x", "y"), **settings)
        content = onnx_file(trained)
        assert difference(trained, content) < 1e-3  # numbers of some hundreds
        assert [one.name for one in onnx.load_from_string(content).graph.output] == ["numbers"]
        assert ("target_mean" in metadata(content)) == bool(settings)
        assert "activation" not in metadata(content)


def test_names_that_are_no_valid_unicode_do_not_stop_the_export():
    """A path of a model may have such bytes."""
    trained = random_trained([Flatten(), Affine(2)], names=("\udc80", "b"))
    object.__setattr__(trained.config, "model", "folder/\udc80.py:network")
    found = metadata(onnx_file(trained))
    assert found["model"] == "\\udc80.py:network"
    assert json.loads(found["names"]) == ["\udc80", "b"]


def test_the_same_network_gives_the_same_bytes():
    assert onnx_file(random_trained(STACKS["residual"]())) == onnx_file(random_trained(STACKS["residual"]()))


# Refused networks


class Doubled(Affine):
    """A layer of the user's own: its forward may do anything."""

    def forward(self, x, *, training, key):
        return 2 * super().forward(x, training=training, key=key)


class Backwards(Sequential):
    def forward(self, x, *, training=False, key=None):
        return super().forward(-x, training=training, key=key)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (
            [Flatten(), Residual([Doubled(126)]), Affine(2)],
            "residual_1.body.doubled_1 (Affine 126) has no form in ONNX",
        ),
        ([Flatten(), LocalResponseNorm(3), Affine(2)], "localresponsenorm_1 (LocalResponseNorm 3) normalizes rows"),
        (
            [AvgPool2d(2, padding=2), Flatten(), Affine(2)],
            "avgpool2d_1 (AvgPool2d 2x2 stride 2 padding 2) has a padding",
        ),
        ([LocalResponseNorm(4), Flatten(), Affine(2)], "localresponsenorm_1 (LocalResponseNorm 4) has an even window"),
    ],
)
def test_a_layer_without_a_form_in_onnx_is_named(layers, words):
    with pytest.raises(UserError) as caught:
        onnx_file(random_trained(layers))
    assert words in str(caught.value)
    assert "--to npz" in str(caught.value)


def test_a_network_with_a_forward_of_its_own_is_refused():
    trained = random_trained([Flatten(), Affine(2)])
    object.__setattr__(trained, "network", Backwards([Flatten(), Affine(2)], (7, 6, 3)))
    with pytest.raises(UserError, match="a Backwards with a forward of its own"):
        onnx_file(trained)


def test_weights_that_do_not_fit_into_a_file_are_refused(monkeypatch):
    monkeypatch.setattr(onnx_module, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"the weights have 1,016 bytes.*give --to pytorch"):
        onnx_file(random_trained([Flatten(), Affine(2)]))
