"""LeNet to ResNet: sizes and numbers of parameters are the published ones, and a step of SGD reduces the loss."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from distdl.errors import UserError
from distdl.nn import MODELS, Sigmoid, SoftmaxCrossEntropy, Tanh, build_model, lenet
from distdl.optim import optimizer_class
from distdl.rng import Key

from .oracles import normal

FULL = os.environ.get("DISTDL_FULL") == "1"
TABLE = Path(__file__).parents[2] / "docs" / "models.md"
IMAGENET = (224, 224, 3)
DEEP = ("lenet", "alexnet", "vgg11", "vgg16", "googlenet", "resnet18", "resnet20", "resnet50")
TWO_VARIANTS = ("alexnet", "vgg11", "vgg16", "googlenet", "resnet18", "resnet50")


@pytest.mark.parametrize(
    ("name", "input_shape", "classes", "count"),
    [
        ("lenet", (32, 32, 1), 10, 61_706),
        ("lenet", (28, 28, 1), 10, 61_706),
        ("alexnet", IMAGENET, 1000, 61_100_840),  # torchvision
        ("alexnet", (227, 227, 3), 1000, 61_100_840),
        ("vgg11", IMAGENET, 1000, 132_863_336),  # torchvision
        ("vgg16", IMAGENET, 1000, 138_357_544),  # torchvision; "138 million" in the paper's table 2
        ("googlenet", IMAGENET, 1000, 6_998_552),  # Caffe's bvlc_googlenet without its auxiliary classifiers
        ("resnet18", IMAGENET, 1000, 11_689_512),  # torchvision
        ("resnet50", IMAGENET, 1000, 25_557_032),  # torchvision
        ("resnet20", (32, 32, 3), 10, 272_474),  # with projections; "0.27 million" in the paper's table 6
    ],
)
def test_the_number_of_parameters_is_the_published_one(name, input_shape, classes, count):
    assert build_model(name, input_shape, classes).parameter_count == count


#: Outputs, in order, of all layers that change the size or the channels.
PUBLISHED_SIZES = {
    # LeCun et al. 1998, figure 2: C1, S2, C3, S4, and C5 as an affine layer, F6
    ("lenet", (32, 32, 1), 10): [(28, 28, 6), (14, 14, 6), (10, 10, 16), (5, 5, 16), (400,), (120,), (84,), (10,)],
    # Krizhevsky 2012, figure 2, with the widths of Krizhevsky 2014
    ("alexnet", IMAGENET, 1000): [
        *((55, 55, 64), (27, 27, 64), (27, 27, 192), (13, 13, 192), (13, 13, 384), (13, 13, 256), (6, 6, 256)),
        *((9216,), (4096,), (1000,)),
    ],
    # Simonyan and Zisserman 2014, table 1, column D
    ("vgg16", IMAGENET, 1000): [
        *((224, 224, 64), (112, 112, 64), (112, 112, 128), (56, 56, 128), (56, 56, 256), (28, 28, 256)),
        *((28, 28, 512), (14, 14, 512), (7, 7, 512), (25088,), (4096,), (1000,)),
    ],
    # Szegedy et al. 2014, table 1
    ("googlenet", IMAGENET, 1000): [
        *((112, 112, 64), (56, 56, 64), (56, 56, 192), (28, 28, 192), (28, 28, 256), (28, 28, 480), (14, 14, 480)),
        *((14, 14, 512), (14, 14, 528), (14, 14, 832), (7, 7, 832), (7, 7, 1024), (1024,), (1000,)),
    ],
    # He et al. 2015, table 1
    ("resnet18", IMAGENET, 1000): [
        *((112, 112, 64), (56, 56, 64), (28, 28, 128), (14, 14, 256), (7, 7, 512), (512,), (1000,)),
    ],
    ("resnet50", IMAGENET, 1000): [
        *((112, 112, 64), (56, 56, 64), (56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048), (2048,), (1000,)),
    ],
    # He et al. 2015, section 4.2
    ("resnet20", (32, 32, 3), 10): [(32, 32, 16), (16, 16, 32), (8, 8, 64), (64,), (10,)],
}


@pytest.mark.parametrize("case", PUBLISHED_SIZES, ids=lambda case: case[0])
def test_outputs_have_the_published_sizes_layer_by_layer(case):
    shapes = build_model(*case).stack.shapes
    different = [shape for shape, before in zip(shapes, [case[1], *shapes], strict=False) if shape != before]
    assert different == PUBLISHED_SIZES[case]


@pytest.mark.parametrize(
    ("name", "convolutions", "affine_layers"),
    [
        *(("alexnet", 5, 3), ("vgg11", 8, 3), ("vgg16", 13, 3), ("googlenet", 57, 1)),
        *(("resnet18", 17 + 3, 1), ("resnet20", 19 + 2, 1), ("resnet50", 49 + 4, 1)),
    ],
)
def test_a_network_is_as_deep_as_its_name_says(name, convolutions, affine_layers):
    """GoogLeNet has six convolutions per module; a ResNet's name does not count those of its shortcuts."""
    weights = [name for name, _ in build_model(name, (32, 32, 3), 10).named_parameters() if name.endswith("weight")]
    kinds = [name.split(".")[-2].split("_")[0] for name in weights]
    assert (kinds.count("conv2d"), kinds.count("affine")) == (convolutions, affine_layers)


@pytest.mark.parametrize("name", TWO_VARIANTS)
def test_the_size_of_the_image_selects_the_variant(name):
    first = {shape: build_model(name, shape, 10).layers[0].window.kernel for shape in ((28, 64, 1), (192, 300, 3))}
    assert first == {(28, 64, 1): {"alexnet": (5, 5)}.get(name, (3, 3)), (192, 300, 3): ORIGINAL_KERNEL[name[:6]]}
    for shape in ((27, 28, 1), (8, 8, 1), (64, 65, 3), (191, 191, 3), (28, 224, 1)):
        with pytest.raises(UserError, match=f"{name} takes images with sides of 28 to 64 pixels .* at least 192"):
            build_model(name, shape, 10)
    with pytest.raises(UserError, match=f"{name} takes images: input 784 given"):
        build_model(name, (784,), 10)


ORIGINAL_KERNEL = {"alexne": (11, 11), "vgg11": (3, 3), "vgg16": (3, 3), "google": (7, 7), "resnet": (7, 7)}


def test_lenet_has_the_activation_of_the_paper_or_of_the_book():
    of_paper, of_book = lenet((28, 28, 1), 10), lenet((28, 28, 1), 10, activation="sigmoid")
    assert [sum(isinstance(layer, kind) for layer in of_paper.layers) for kind in (Tanh, Sigmoid)] == [4, 0]
    assert [sum(isinstance(layer, kind) for layer in of_book.layers) for kind in (Tanh, Sigmoid)] == [0, 4]
    assert of_paper.stack.shapes[0] == (28, 28, 6), "28x28 lies within 32x32"
    with pytest.raises(UserError, match="avgpool2d_2"):
        lenet((11, 11, 1), 10)


def losses_of(network, N, steps, learning_rate):
    """Take steps of SGD on one micro-batch, check gradients, and return the losses before each step and at the end."""
    x, labels, key = normal((N, *network.input_shape), dtype=np.float32), np.arange(N) % 10, Key(2)
    loss, optimizer, losses = SoftmaxCrossEntropy(), optimizer_class("sgd")(network.parameters.size), []
    for step in range(1, steps + 1):
        losses.append(loss.forward(network.forward(x, training=True, key=key), labels) / N)
        network.backward(loss.backward())
        assert np.isfinite(network.gradients).all()
        idle = [name for name, gradient in network.named_gradients() if not gradient.any()]
        assert idle == [], "every parameter learns"
        network.gradients /= N
        network.update_buffers(network.statistics)
        optimizer.update(network.parameters, network.gradients, learning_rate, step)
    losses.append(loss.forward(network.forward(x, training=True, key=key), labels) / N)
    assert np.isfinite(network.forward(x)).all(), "in evaluation"
    return losses


@pytest.mark.parametrize("name", DEEP)
def test_steps_of_sgd_reduce_the_loss_of_the_small_variant(name):
    network = build_model(name, (28, 28, 1), 10)
    network.initialize(Key(0))
    losses = losses_of(network, 4, 1 if name == "resnet50" else 2, 0.01 if name == "lenet" else 0.001)
    assert np.isfinite(losses).all()
    assert losses == sorted(losses, reverse=True)


def initialize_fast(network):
    """Set weights to repeating numbers with He's standard deviation: drawing a hundred million takes ten seconds."""
    drawn = normal((10_007,))
    for (name, view), spec in zip(network.named_parameters(), network.stack.parameter_specs(), strict=True):
        view[...] = spec.initializer(Key(0), (1,), 1) if "weight" not in name else 0
        if name.endswith("weight"):
            rows = view.reshape(-1)
            for start in range(0, len(rows), len(drawn)):
                rows[start : start + len(drawn)] = drawn[: len(rows) - start]
            rows *= np.sqrt(2 / spec.fan_in)


@pytest.mark.parametrize("name", TWO_VARIANTS)
def test_a_step_of_sgd_reduces_the_loss_of_the_original_variant(name):
    if name in {"vgg11", "vgg16", "resnet50"} and not FULL:
        pytest.skip("takes one or two gigabytes: set DISTDL_FULL=1")
    network = build_model(name, IMAGENET, 1000)
    initialize_fast(network)
    before, after = losses_of(network, 2 if name.startswith("resnet") else 1, 1, 1e-4)
    assert after < before


def test_the_table_of_the_documentation_lists_all_models_with_their_parameters():
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| ([0-9,]+)(?:; ([0-9,]+))? \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [name for name, _, _ in rows] == list(MODELS)
    for name, small, original in rows:
        assert f"{build_model(name, (28, 28, 1), 10).parameter_count:,}" == small
        assert (name in TWO_VARIANTS) == bool(original)
        assert not original or f"{build_model(name, IMAGENET, 1000).parameter_count:,}" == original


def test_every_model_is_tested_here_or_among_the_books_own():
    assert set(DEEP) | {"logistic", "mlp", "simple_convnet", "deep_convnet"} == set(MODELS)
