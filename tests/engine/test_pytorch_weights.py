"""`--init-from` takes the weights of PyTorch, by torchvision's names or those of `distdl.export`, in our layouts.

``torchvision_tensors.txt`` has the names, shapes and dtypes of torchvision 0.29, as its models' `state_dict` has them.
"""

from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from exported import STACKS, random_trained
from numpy_torch import Tensor, make_torch

from distdl.engine.pytorch_weights import TORCHVISION, torchvision_sources
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import Checkpoint
from distdl.engine.transfer import copy_weights
from distdl.errors import DamagedFileError, UserError
from distdl.export.pytorch_files import pytorch_files
from distdl.nn import Sequential, build_model
from distdl.nn.pytorch_layouts import all_laid_out
from distdl.rng import Key


@cache
def tensors_of(model):
    """Return the shape of each tensor of torchvision's model."""
    lines = (Path(__file__).parent / "torchvision_tensors.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines]
    assert {dtype for *_, dtype in rows} == {"float32", "int64"}
    return {
        name: () if shape == "scalar" else tuple(map(int, shape.split("x")))
        for of, name, shape, _ in rows
        if of == model
    }


def random_state_dict(shapes, seed=0):
    """Return random tensors of these shapes, as a model of torchvision may have them."""
    key = Key(seed).of("state dict")
    found = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        numbers = key.of(name).uniform(size).astype(np.float32) + (0.5 if name.endswith("running_var") else -0.5)
        found[name] = np.array(3) if name.endswith("num_batches_tracked") else numbers.reshape(shape)
    return found


def written(folder, arrays, **metadata):
    path = folder / "weights.safetensors"
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(one) for name, one in arrays.items()}, path, metadata or None
    )
    return path


def initialized(model, shape=(32, 32, 3), classes=10):
    network = build_model(model, shape, classes)
    network.initialize(Key(0))
    return network


def arrays_of(network):
    return {name: view.copy() for name, view in [*network.named_parameters(), *network.named_buffers()]}


def in_our_layout(array):
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])


# torchvision's names

#: Tensors of torchvision without a place here: counters, and the two auxiliary classifiers.
WITHOUT_PLACE = ("num_batches_tracked", "aux1.", "aux2.")


@pytest.mark.parametrize("model", TORCHVISION)
def test_every_tensor_of_torchvision_has_its_place_in_the_original_variant(model):
    network, theirs = build_model(model, (224, 224, 3), 1000), tensors_of(model)
    layouts = dict(all_laid_out(network.stack))
    sources = torchvision_sources(model, network, layouts)
    assert sources.keys() == arrays_of_names(network)
    used = {name for source in sources.values() for name in source.names}
    assert used == {name for name in theirs if not any(part in name for part in WITHOUT_PLACE)}
    other = {name for name, one in sources.items() if theirs[one.names[0]] != layouts[name].shape}
    fives = {f"branches_{number}.branch_3.conv2d_2.weight" for number in range(1, 10)}
    assert other == (fives if model == "googlenet" else set()), "torchvision has 3x3 instead of 5x5 there"


def arrays_of_names(network):
    return {name for name, _ in [*network.named_parameters(), *network.named_buffers()]}


@pytest.mark.parametrize(
    ("model", "places"),
    [
        (
            "resnet18",
            {
                "residual_1.body.conv2d_2.weight": "layer1.0.conv2.weight",
                "residual_3.shortcut.conv2d_1.weight": "layer2.0.downsample.0.weight",
                "residual_3.shortcut.batchnorm_1.gamma": "layer2.0.downsample.1.weight",
                "residual_8.body.batchnorm_2.variance": "layer4.1.bn2.running_var",
                "batchnorm_1.mean": "bn1.running_mean",
                "batchnorm_1.beta": "bn1.bias",
            },
        ),
        ("vgg11", {"conv2d_1.weight": "features.0.weight", "conv2d_8.bias": "features.18.bias"}),
        ("alexnet", {"conv2d_2.weight": "features.3.weight", "conv2d_5.bias": "features.10.bias"}),
    ],
)
def test_the_tensors_of_equal_shape_are_copied_and_the_others_keep_their_initial_bits(model, places, tmp_path):
    """The small variant begins with another convolution, and has another classifier."""
    theirs = {name: shape for name, shape in tensors_of(model).items() if np.prod(shape) < 10**7}
    state_dict = random_state_dict(theirs)
    network = initialized(model)
    before = arrays_of(network)
    transfer = copy_weights(str(written(tmp_path, state_dict)), network, model)
    after = arrays_of(network)
    assert {*transfer.copied, *transfer.initialized} == set(after)
    for name in transfer.initialized:
        assert np.array_equal(after[name], before[name])
    for name, their_name in places.items():
        assert np.array_equal(after[name], in_our_layout(state_dict[their_name])), name
    first = {"resnet18": {"conv2d_1.weight"}, "vgg11": set(), "alexnet": {"conv2d_1.weight"}}[model]
    assert set(transfer.initialized) == first | {name for name in after if name.startswith("affine_")}
    assert str(transfer).startswith(
        f"begins with {len(transfer.copied)} of {len(after)} tensors from {tmp_path}/weights"
    )


def vgg11_of_torchvision(shapes):
    """Return torchvision's VGG11 with the widths of a small variant, as modules of the stand-in of PyTorch."""
    nn = make_torch()["torch.nn"]
    features, channels = [], 3
    for width, depth in zip((64, 128, 256, 512, 512), (1, 1, 2, 2, 2), strict=True):
        for _ in range(depth):
            features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        features.append(nn.MaxPool2d(2, stride=2))
    linear = [nn.Linear(*reversed(shapes[f"classifier.{number}.weight"])) for number in (0, 3, 6)]
    rest = [linear[0], nn.ReLU(), nn.Dropout(0.5), linear[1], nn.ReLU(), nn.Dropout(0.5), linear[2]]
    parts = {"features": nn.Sequential(*features), "flatten": nn.Flatten(), "classifier": nn.Sequential(*rest)}
    return nn.Sequential(OrderedDict(parts))


def test_the_classifier_after_a_flatten_computes_what_torchvision_computes(tmp_path):
    """Images of 64x64 leave 2x2 pixels of 512 channels, whose order differs."""
    network = initialized("vgg11", (64, 64, 3))
    shapes = {**tensors_of("vgg11"), "classifier.0.weight": (512, 2048), "classifier.0.bias": (512,)}
    shapes |= {"classifier.3.weight": (512, 512), "classifier.3.bias": (512,)}
    shapes |= {"classifier.6.weight": (10, 512), "classifier.6.bias": (10,)}
    state_dict = {name: 0.1 * one for name, one in random_state_dict(shapes).items()}
    transfer = copy_weights(str(written(tmp_path, state_dict)), network, "vgg11")
    assert transfer.initialized == []
    theirs = vgg11_of_torchvision(shapes)
    theirs.load_state_dict(state_dict)
    x = Key(1).of("images").normal(2 * 64 * 64 * 3).astype(np.float32).reshape(2, 64, 64, 3)
    expected = theirs(Tensor(x.transpose(0, 3, 1, 2))).array
    found = network.forward(x)
    assert expected.std() > 0
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_googlenet_folds_the_batch_norm_of_torchvision_into_its_convolutions(tmp_path):
    network = initialized("googlenet", classes=1000)
    theirs, nn = tensors_of("googlenet"), make_torch()["torch.nn"]
    state_dict = random_state_dict(theirs)
    transfer = copy_weights(str(written(tmp_path, state_dict)), network, "googlenet")
    arrays = arrays_of(network)
    without = {"conv2d_1"} | {f"branches_{number}.branch_3.conv2d_2" for number in range(1, 10)}
    expected = {f"{layer}.{name}" for layer in without for name in ("weight", "bias")}
    assert set(transfer.initialized) == expected, "a folded bias belongs to its weight"
    place = ("branches_4.branch_2.conv2d_2", "inception4b.branch2.1")
    for ours, module in (("conv2d_2", "conv2"), place):
        K, C, size, _ = state_dict[f"{module}.conv.weight"].shape
        convolution = nn.Conv2d(C, K, size, padding=size // 2, bias=False)
        both = nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(K, eps=0.001)))
        prefix = f"{module}."
        both.load_state_dict(
            {
                name.removeprefix(prefix): one
                for name, one in state_dict.items()
                if name.startswith(prefix) and "num_batches" not in name
            }
        )
        x = Tensor(Key(2).of(module).normal(2 * C * 36).astype(np.float32).reshape(2, C, 6, 6))
        folded = nn.Conv2d(C, K, size, padding=size // 2)
        weight = arrays[f"{ours}.weight"].transpose(3, 2, 0, 1)
        folded.load_state_dict({"weight": weight, "bias": arrays[f"{ours}.bias"]})
        expected = both(x).array
        assert np.abs(folded(x).array - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.array_equal(arrays["affine_1.weight"], state_dict["fc.weight"].T)


def test_a_batch_norm_that_does_not_fit_its_convolution_leaves_it_initialized(tmp_path):
    module = {name: shape for name, shape in tensors_of("googlenet").items() if name.startswith("conv2.")}
    whole = random_state_dict({**module, "conv3.conv.weight": (192, 64, 3, 3)})
    changes = {
        "conv2.bn.weight": [(63,), (64, 1), ()],
        "conv2.bn.running_var": [(1,), (8, 8)],
        "conv2.bn.bias": [(65,)],
        "conv2.conv.weight": [(64, 64), (64,), ()],
    }
    for name, shapes in changes.items():
        for shape in shapes:
            network = initialized("googlenet")
            path = written(tmp_path, {**whole, name: np.ones(shape, np.float32), "fc.bias": np.ones(10, np.float32)})
            transfer = copy_weights(str(path), network, "googlenet")
            assert set(transfer.copied) == (
                {"affine_1.bias", "conv2d_2.weight"} if name.endswith("bn.bias") else {"affine_1.bias"}
            )


def test_numbers_that_overflow_when_folded_are_refused(tmp_path):
    module = {name: shape for name, shape in tensors_of("googlenet").items() if name.startswith("conv2.")}
    large = {"conv2.bn.weight": np.full(64, 3e38, np.float32), "conv2.bn.running_var": np.zeros(64, np.float32)}
    path = written(tmp_path, random_state_dict(module) | large)
    with pytest.raises(UserError, match=r"infinite numbers in conv2\.conv\.weight"):
        copy_weights(str(path), initialized("googlenet"), "googlenet")


# The names of distdl.export


@pytest.mark.parametrize("stack", STACKS)
def test_exported_weights_come_back_with_the_same_bits(stack, tmp_path):
    trained = random_trained(STACKS[stack]())
    expected = arrays_of(trained.network)
    (tmp_path / "model.safetensors").write_bytes(pytorch_files(trained)["model.safetensors"])
    network = Sequential(STACKS[stack](), trained.network.input_shape)
    if not expected:
        return
    transfer = copy_weights(str(tmp_path / "model.safetensors"), network, "net.py:network")
    assert transfer.initialized == []
    for name, array in arrays_of(network).items():
        assert array.tobytes() == expected[name].tobytes(), name


# Wrong files


def small_state_dict(**others):
    shapes = {"conv1.weight": (64, 3, 3, 3), "bn1.weight": (64,), "bn1.running_var": (64,), "fc.weight": (10, 512)}
    return {**random_state_dict(shapes), **others}


REFUSED = {
    "names of no known model": (
        {"encoder.weight": np.ones((3, 3), np.float32), "head": np.ones(3, np.float32)},
        ["encoder.weight", "--model resnet18", "conv1.weight (torchvision)", "conv2d_1.weight (distdl.export)"],
    ),
    "no tensor at all": ({}, ["none at all"]),
    "no matching shape": (
        {"conv1.weight": np.ones((64, 3, 5, 5), np.float32), "fc.bias": np.ones(3, np.float32)},
        ["(5, 5, 3, 64) there", "(3, 3, 3, 64) here", "--model resnet18"],
    ),
    "another number of axes": (
        {"conv1.weight": np.ones(64 * 27, np.float32), "fc.bias": np.ones((10, 1), np.float32)},
        ["--model resnet18"],
    ),
    "float16": (small_state_dict(**{"bn1.weight": np.ones(64, np.float16)}), ["bn1.weight in F16", "F32", ".float()"]),
    "float64": (small_state_dict(**{"bn1.weight": np.ones(64)}), ["bn1.weight in F64", "F32", ".float()"]),
    "NaN": (small_state_dict(**{"bn1.weight": np.full(64, np.nan, np.float32)}), ["NaN", "bn1.weight"]),
    "infinity": (small_state_dict(**{"fc.weight": np.full((10, 512), np.inf, np.float32)}), ["infinite", "fc.weight"]),
    "a negative variance": (
        small_state_dict(**{"bn1.running_var": np.full(64, -1, np.float32)}),
        ["below 0", "bn1.running_var"],
    ),
    "another model": (
        small_state_dict(**{"layer1.0.conv3.weight": np.ones((256, 64, 1, 1), np.float32)}),
        ["not of torchvision's resnet18", "layer1.0.conv3.weight", "another --model"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_file_is_one_line_and_changes_no_weight(what, tmp_path):
    arrays, words = REFUSED[what]
    path, network = written(tmp_path, arrays), initialized("resnet18")
    before = arrays_of(network)
    with pytest.raises(UserError) as caught:
        copy_weights(str(path), network, "resnet18")
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
    assert all(np.array_equal(array, before[name]) for name, array in arrays_of(network).items())


def test_bfloat16_is_refused_too(tmp_path):
    """NumPy does not have it."""
    path = written(tmp_path, small_state_dict(**{"bn1.weight": np.ones(64, np.float16)}))
    path.write_bytes(path.read_bytes().replace(b'"F16"', b'"BF16"', 1).replace(b'  "', b' "', 1))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length + 1].rstrip()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length + 1 :])
    with pytest.raises(UserError, match=r"bn1\.weight in BF16, expected F32"):
        copy_weights(str(path), initialized("resnet18"), "resnet18")


def test_weights_of_a_vgg_with_batch_norm_are_not_taken_for_one_without(tmp_path):
    """Some of its convolutions have the names and the shapes of others."""
    shapes = {"features.0.weight": (64, 3, 3, 3), "features.1.weight": (64,), "features.4.weight": (128, 64, 3, 3)}
    with pytest.raises(UserError, match=r"not of torchvision's vgg11: it has features\.4\.weight"):
        copy_weights(str(written(tmp_path, random_state_dict(shapes))), initialized("vgg11"), "vgg11")


@pytest.mark.parametrize("start", [b"PK\x03\x04 a zip archive of torch.save", b"\x80\x02 an old one"])
def test_a_pickled_file_is_refused_with_the_line_that_converts_it(start, tmp_path):
    (tmp_path / "model.pth").write_bytes(start + bytes(1000))
    with pytest.raises(UserError, match=r"model\.pth is a pickled file.*safetensors\.torch\.save_file"):
        copy_weights(str(tmp_path / "model.pth"), initialized("resnet18"), "resnet18")


@pytest.mark.parametrize("what", ["truncated", "longer", "offsets", "header", "length"])
def test_a_damaged_file_is_named_and_never_loaded(what, tmp_path):
    path = written(tmp_path, small_state_dict())
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length], whole[8 + length :]
    path.write_bytes(
        {
            "truncated": whole[:-1],
            "longer": whole + b"x",
            "offsets": whole[:8] + header.replace(b"[0,", b"[9,", 1) + data,
            "header": whole[:8] + header.replace(b'"F32"', b'"F99"', 1) + data,
            "length": (2**60).to_bytes(8, "little") + whole[8:],
        }[what]
    )
    with pytest.raises(DamagedFileError, match=r"weights\.safetensors is damaged"):
        copy_weights(str(path), initialized("resnet18"), "resnet18")


def test_a_damaged_checkpoint_of_distdl_is_never_taken_for_a_state_dict(tmp_path):
    """Its names are those of an export, so only the text of the header tells them apart."""
    network = Sequential(STACKS["flatten, affine"](), (7, 6, 3))
    path = tmp_path / "checkpoint"
    checkpoints.write(path, Checkpoint(dict(network.named_parameters()), {"step": 0}))
    whole = path.read_bytes()
    key, length = whole.index(b'"distdl"'), int.from_bytes(whole[:8], "little")
    bits = {8 * place + bit for place in range(key, key + 60) for bit in range(8)}
    bits |= {int(word) % (8 * (8 + length)) for word in Key(3).words(300)}
    for place, bit in (divmod(one, 8) for one in sorted(bits)):
        changed = bytearray(whole)
        changed[place] ^= 1 << bit
        path.write_bytes(bytes(changed))
        with pytest.raises(DamagedFileError, match="damaged"):
            copy_weights(str(path), network, "net.py:network")


def test_a_file_that_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("distdl.engine.pytorch_weights.available_bytes", lambda: 1000.0)
    with pytest.raises(DamagedFileError, match="too large"):
        copy_weights(str(written(tmp_path, small_state_dict())), initialized("resnet18"), "resnet18")
