"""The exported ``model.py`` computes what distdl computes, from the same pixels, with torch and safetensors alone.

Each test runs the program twice: with PyTorch, if it is installed, and with `numpy_torch`, which follows its
documentation in plain NumPy.
"""

import ast
import copy
import runpy

import numpy as np
import pytest
import safetensors.numpy
from exported import STACKS, random_trained
from numpy_torch import instead_of_torch

from distdl.errors import UserError
from distdl.export import pytorch_files as pytorch_module
from distdl.export.onnx_verification import outputs_of, random_pixels
from distdl.export.pytorch_files import pytorch_files
from distdl.job.launched_by import read_launch
from distdl.nn import Affine, AvgPool2d, Conv2d, Flatten, Layer, LocalResponseNorm, Residual, Sequential

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def by_numpy(folder, pixels):
    """Return the outputs of ``model.py`` in a folder for pixels (N, C, H, W), computed by the stand-in."""
    with instead_of_torch():
        program = runpy.run_path(str(folder / "model.py"))
        return program["load"]()(program["torch"].Tensor(pixels)).array


def by_pytorch(folder, pixels):
    """Return the outputs of ``model.py`` in a folder for pixels (N, C, H, W), computed by PyTorch."""
    torch = pytest.importorskip("torch")
    program = runpy.run_path(str(folder / "model.py"))
    with torch.no_grad():
        return program["load"]()(torch.tensor(pixels)).numpy()


COMPUTED = pytest.mark.parametrize("computed", [by_numpy, by_pytorch])


def difference(trained, outputs, pixels):
    """Return the greatest difference between these outputs and those of distdl, in the order of axes of PyTorch."""
    ours = outputs_of(trained, pixels)
    ours = ours.transpose(0, 3, 1, 2) if ours.ndim == 4 else ours
    assert (outputs.shape, outputs.dtype) == (ours.shape, np.float32)
    assert ours.std() > 0
    return np.abs(outputs - ours).max()


def channels_first(pixels):
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


@COMPUTED
@pytest.mark.parametrize("pixels", ["uint8", "float32"])
@pytest.mark.parametrize("stack", STACKS)
def test_every_layer_in_every_place_computes_the_same_numbers(stack, pixels, computed, tmp_path):
    trained = random_trained(STACKS[stack](), pixels=pixels)
    write(tmp_path, pytorch_files(trained))
    images = random_pixels(trained.signature, 3)
    assert difference(trained, computed(tmp_path, channels_first(images)), images) < 1e-5


def test_no_layer_of_distdl_is_forgotten():
    from distdl import nn

    layers = {one for one in vars(nn).values() if isinstance(one, type) and issubclass(one, Layer)}
    assert layers == set(pytorch_module.FORMS)


@COMPUTED
def test_a_label_for_each_pixel_and_numbers_in_the_units_of_the_labels(computed, tmp_path):
    of_pixels = random_trained([Conv2d(4, 3, padding=1)], task="segmentation", outputs=4)
    targets = {"target_mean": (100.0, -3.0), "target_deviation": (50.0, 0.25)}
    of_numbers = random_trained([Flatten(), Affine(2)], task="regression", **targets)
    for trained, largest in ((of_pixels, 1e-5), (of_numbers, 1e-3)):
        write(tmp_path, pytorch_files(trained))
        images = random_pixels(trained.signature, 3)
        assert difference(trained, computed(tmp_path, channels_first(images)), images) < largest


@COMPUTED
def test_pixels_of_another_shape_are_refused_and_not_silently_wrong(computed, tmp_path):
    trained = random_trained(STACKS["residual"]())
    write(tmp_path, pytorch_files(trained))
    for shape in ((2, 7, 6, 3), (2, 3, 6, 7), (3, 7, 6)):
        with pytest.raises(ValueError, match=r"pixels are .*; expected \(N, \*\(3, 7, 6\)\)"):
            computed(tmp_path, np.zeros(shape, np.uint8))


def test_the_tensors_have_the_names_and_layouts_of_pytorch():
    layers = [Conv2d(4, (3, 2)), *STACKS["flatten, batch norm"]()[1:], Residual([Affine(5)])]
    trained = random_trained(layers)
    found = safetensors.numpy.load(pytorch_files(trained)["model.safetensors"])
    ours = dict([*trained.network.named_parameters(), *trained.network.named_buffers()])
    assert found["conv2d_1.weight"].shape == (4, 3, 3, 2)
    assert np.array_equal(found["conv2d_1.weight"][3, 1], ours["conv2d_1.weight"][:, :, 1, 3])
    assert np.array_equal(found["affine_1.weight"], ours["affine_1.weight"].T)
    for theirs, name in {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "variance"}.items():
        assert np.array_equal(found[f"batchnorm_1.{theirs}"], ours[f"batchnorm_1.{name}"])
    assert np.array_equal(found["residual_1.body.affine_1.bias"], ours["residual_1.body.affine_1.bias"])
    assert len(found) == len(ours)


def test_after_a_flatten_the_columns_have_the_order_of_pytorch():
    """So the weights also fit a plain `nn.Flatten` followed by an `nn.Linear`."""
    trained = random_trained([Flatten(), Affine(5)])
    found = safetensors.numpy.load(pytorch_files(trained)["model.safetensors"])["affine_1.weight"]
    ours = dict(trained.network.named_parameters())["affine_1.weight"]
    (H, W, C), K = trained.signature.image_shape, 5
    assert found.shape == (K, C * H * W)
    for h, w, c in ((0, 0, 1), (3, 5, 2), (6, 0, 0)):
        assert np.array_equal(found[:, c * H * W + h * W + w], ours[h * W * C + w * C + c])


# The program


def constants(program):
    """Return the constants of a program: the literals that are assigned to names in capitals."""
    assigned = [node for node in ast.parse(program).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}


def test_the_program_has_the_task_the_names_and_the_receipt_as_literals():
    trained = random_trained(STACKS["nested branches"](), names=("a", "b", "c", "d"), resize="32")
    found = constants(pytorch_files(trained)["model.py"])
    expected = {"TASK": "classification", "NAMES": ["a", "b", "c", "d"], "ACTIVATION": "softmax", "PIXELS": "uint8"}
    expected |= {"IMAGE_SHAPE": (3, 7, 6), "MODEL": "net.py:network", "STEP": 3, "WEIGHTS_SHA256": "0" * 64}
    expected |= {"RESIZE": "32", "MEAN": list(trained.signature.mean), "DEVIATION": list(trained.signature.deviation)}
    assert {name: found[name] for name in expected} == expected


NASTY = (
    '"""\nimport os',
    "'''",
    "\\",
    "\\'",
    "{braces} $dollar %s",
    "a\nb\r\0",
    "\N{PILE OF POO}",
    "\udc80",
    "import os",
)


def test_no_text_of_the_user_becomes_code():
    """A checkpoint may come from anyone, and its texts enter a program that somebody runs."""
    trained = random_trained([Flatten(), Affine(len(NASTY))], names=NASTY)
    plain = random_trained([Flatten(), Affine(len(NASTY))], names=tuple("abcdefghi"))
    object.__setattr__(trained.config, "model", 'x.py:"""\nimport os\n"""')
    program = pytorch_files(trained)["model.py"]
    assert constants(program)["NAMES"] == list(NASTY)

    def without_constants(text):
        tree = ast.parse(text)
        return ast.dump(ast.Module([node for node in tree.body if not isinstance(node, ast.Assign)], []))

    assert without_constants(program) == without_constants(pytorch_files(plain)["model.py"])


def test_the_program_imports_torch_and_safetensors_alone():
    for stack in STACKS.values():
        program = pytorch_files(random_trained(stack()))["model.py"]
        imported = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
            for node in ast.walk(ast.parse(program))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert imported == {"collections", "pathlib", "torch", "safetensors"}


def test_the_same_network_gives_the_same_bytes():
    assert pytorch_files(random_trained(STACKS["residual"]())) == pytorch_files(random_trained(STACKS["residual"]()))


# Refused networks


class Doubled(Affine):
    """A layer of the user's own: its forward may do anything."""


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([Flatten(), Residual([Doubled(126)]), Affine(2)], "residual_1.body.doubled_1 (Affine 126) has no form in PyT"),
        ([Flatten(), LocalResponseNorm(3), Affine(2)], "localresponsenorm_1 (LocalResponseNorm 3) normalizes rows"),
    ],
)
def test_a_layer_without_a_form_in_pytorch_is_named(layers, words):
    with pytest.raises(UserError) as caught:
        pytorch_files(random_trained(layers))
    assert words in str(caught.value)
    assert "--to npz" in str(caught.value)


@COMPUTED
@pytest.mark.parametrize("layer", [LocalResponseNorm(4, alpha=1.0), AvgPool2d(2, stride=1, padding=(2, 3))], ids=str)
def test_pytorch_also_has_the_layers_that_onnx_has_not(layer, computed, tmp_path):
    trained = random_trained([copy.deepcopy(layer), Flatten(), Affine(3)])
    write(tmp_path, pytorch_files(trained))
    images = random_pixels(trained.signature, 3)
    assert difference(trained, computed(tmp_path, channels_first(images)), images) < 1e-5


def test_the_numbers_of_own_layers_may_be_of_numpy():
    """Their `repr` is not a literal."""
    from distdl.nn import BatchNorm, Dropout, LeakyReLU

    layers = [BatchNorm(epsilon=np.float64(0.5)), LeakyReLU(np.float32(0.25)), Dropout(np.float64(0.5)), Flatten()]
    program = pytorch_files(random_trained([*layers, Affine(np.int64(3))]))["model.py"].decode()
    assert "nn.BatchNorm2d(3, eps=0.5)" in program
    assert "nn.LeakyReLU(0.25)" in program
    assert "np." not in program
    assert Sequential
