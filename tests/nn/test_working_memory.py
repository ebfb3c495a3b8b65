"""The estimate of the working arrays agrees with the arrays that networks make, for every kind of layer."""

import gc

import numpy as np
import pytest

from distdl import nn
from distdl.nn.kernels import NUMPY, PLAIN
from distdl.nn.layers import Workspace
from distdl.nn.working_memory import working_bytes
from distdl.rng import Key

TRAINING, EVALUATION = {4, 3}, {4, 2}


def bytes_made():
    """Return the bytes of all working arrays of this process."""
    gc.collect()
    spaces = [one for one in gc.get_objects() if isinstance(one, Workspace)]
    return sum(array.nbytes for space in spaces for array in space._arrays.values())


def made_by(network):
    before = bytes_made()
    network.initialize(Key(0))
    for N in TRAINING | EVALUATION:
        y = network.forward(np.zeros((N, *network.input_shape), np.float32), training=N in TRAINING, key=Key(1))
        if N in TRAINING:
            network.backward(np.zeros_like(y))
    return bytes_made() - before


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (28, 28, 1)),
        ("simple_convnet", (28, 28, 1)),
        ("deep_convnet", (21, 35, 3)),
        ("lenet", (32, 32, 1)),
        ("alexnet", (32, 32, 3)),
        ("vgg11", (32, 32, 3)),
        ("googlenet", (32, 32, 3)),
        ("resnet20", (45, 33, 3)),
    ],
)
def test_the_estimate_of_a_model_is_right_within_a_fifth(name, shape):
    network = nn.build_model(name, shape, 10)
    assert working_bytes(network, TRAINING, EVALUATION) == pytest.approx(made_by(network), rel=0.2)


KINDS = {
    "Conv2d": [nn.Conv2d(8, 5, stride=2, padding=2), nn.Conv2d(8, 3, stride=2, padding=1)],
    "Conv2d of stride 1": [nn.Conv2d(4, 3, stride=2), nn.Conv2d(8, 5, padding=1)],
    "ConvTranspose2d": [nn.Conv2d(4, 1, stride=2), nn.ConvTranspose2d(6, 4, stride=2, padding=1)],
    "BatchNorm": [nn.BatchNorm()],
    "LocalResponseNorm": [nn.LocalResponseNorm()],
    "MaxPool2d": [nn.BatchNorm(), nn.MaxPool2d(3, 2, 1)],
    "AvgPool2d": [nn.BatchNorm(), nn.AvgPool2d(2)],
    "GlobalAvgPool2d": [nn.BatchNorm(), nn.GlobalAvgPool2d()],
    "Upsample2d": [nn.BatchNorm(), nn.Upsample2d(2)],
    "ReLU": [nn.BatchNorm(), nn.ReLU()],
    "LeakyReLU": [nn.BatchNorm(), nn.LeakyReLU()],
    "Tanh": [nn.BatchNorm(), nn.Tanh()],
    "Sigmoid": [nn.BatchNorm(), nn.Sigmoid()],
    "Dropout": [nn.BatchNorm(), nn.Dropout(0.5)],
    "Affine": [nn.Flatten(), nn.Affine(100), nn.Affine(3)],
    "Branches": [nn.BatchNorm(), nn.Branches([nn.Conv2d(4, 1, stride=2)], [nn.MaxPool2d(2)])],
    "Residual": [nn.BatchNorm(), nn.Residual([nn.BatchNorm(), nn.ReLU()])],
}


@pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kernels", [NUMPY, PLAIN])
def test_the_estimate_of_each_kind_of_layer_is_right_within_a_third(layers, kernels):
    network = nn.Sequential(layers, (24, 20, 3), kernels=kernels)
    assert working_bytes(network, TRAINING, EVALUATION) == pytest.approx(made_by(network), rel=0.33)


def test_the_estimate_grows_with_the_samples_and_the_pixels():
    small, large = (nn.build_model("resnet20", (size, size, 3), 10) for size in (32, 128))
    assert working_bytes(small, {16}, {16}) == pytest.approx(4 * working_bytes(small, {4}, {4}), rel=0.1)
    assert working_bytes(large, {4}, {4}) == pytest.approx(15 * working_bytes(small, {4}, {4}), rel=0.1)
