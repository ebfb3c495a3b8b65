"""Half precision rounds number by number as documented; recorded outputs are those of the network."""

import numpy as np
import pytest

from distdl.nn import (
    Affine,
    BatchNorm,
    Branches,
    Conv2d,
    Flatten,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    build_model,
)
from distdl.nn.composites import Composite
from distdl.nn.kernels import NUMPY, PLAIN
from distdl.nn.network_copies import HalfStorage, half_precision, layer_outputs
from distdl.rng import Key

MODELS = ["mlp", "simple_convnet", "deep_convnet", "composites"]


def network_of(model, kernels=NUMPY):
    """Return a network with random weights and random running moments, if it has any."""
    if model == "composites":
        layers = [
            Conv2d(4, 3, padding=1),
            BatchNorm(),
            ReLU(),
            Residual([Conv2d(4, 3, padding=1), BatchNorm(), ReLU(), Conv2d(4, 3, padding=1)]),
            Branches([Conv2d(2, 1)], [Residual([Conv2d(4, 3, padding=1)], shortcut=[Conv2d(4, 1)]), ReLU()], []),
            MaxPool2d(2),
            Flatten(),
            Affine(10),
        ]
    else:
        layers = build_model(model, (8, 8, 1), 10).layers
    network = Sequential(layers, (8, 8, 1), kernels=kernels)
    network.initialize(Key(3).of("initialization"))
    for name, view in network.named_buffers():
        view[...] = Key(4).of(name.replace("/", " ")).uniform(view.size).reshape(view.shape) + 0.1
    return network


def images(count=5):
    return Key(5).normal(count * 64).reshape(count, 8, 8, 1).astype(np.float32)


def rounded(array):
    """Return the nearest float16, ties to even, computed from the number of its bits.

    It has 11 significant bits, the lowest at 2**-24 or above; numbers that round to 2**16 or more become infinite.
    """
    exact = array.astype(np.float64)
    _, exponent = np.frexp(exact)
    unit = 2.0 ** np.maximum(exponent - 11, -24)
    nearest = np.round(exact / unit) * unit  # NumPy's round is to even
    return np.where(np.abs(nearest) >= 65520, np.copysign(np.inf, exact), nearest).astype(np.float32)


def test_the_oracle_rounds_as_float16_does():
    edges = [0, 1, -1, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 65519, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 6.1e-5, -6.0e-8, 0.1]
    numbers = np.array([*edges, *Key(1).normal(1000), *(Key(2).normal(1000) * 1e-6)], np.float32)
    assert np.array_equal(rounded(numbers), numbers.astype(np.float16).astype(np.float32))
    assert rounded(np.array([65520], np.float32)) == np.inf


def plainly(layers, x):
    """Run layers one by one as written; round the input and the output of each."""
    x = rounded(x)
    for layer in layers:
        x = np.ascontiguousarray(x)
        if isinstance(layer, Composite):
            outputs = [plainly(branch.layers, x) for _, branch in layer.members]
            x = sum(outputs) if isinstance(layer, Residual) else np.concatenate(outputs, axis=-1)
        else:
            x = layer.forward(x, training=False, key=None)
        x = rounded(x)
    return x


@pytest.mark.parametrize("model", MODELS)
def test_half_precision_rounds_weights_input_and_outputs_of_layers_only(model):
    network = network_of(model, PLAIN)
    found = half_precision(network).forward(images()).copy()
    for vector in (network.parameters, network.buffers):
        vector[...] = rounded(vector)
    expected = plainly(network.layers, images())
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, network.forward(images())), "activations are not rounded"


@pytest.mark.parametrize("model", MODELS)
def test_half_precision_is_close_to_full_precision_in_the_fast_form_too(model):
    network = network_of(model)
    full = network.forward(images()).copy()
    half = half_precision(network).forward(images())
    assert half.dtype == np.float32
    assert np.array_equal(half, rounded(half))
    assert 0 < np.abs(half - full).max() < 0.02 * np.abs(full).max()


@pytest.mark.parametrize("model", MODELS)
def test_the_original_does_not_change(model):
    network = network_of(model)
    parameters, buffers, before = network.parameters.copy(), network.buffers.copy(), network.forward(images()).copy()
    half = half_precision(network)
    half.forward(images())
    layer_outputs(network, images())
    assert np.array_equal(network.parameters, parameters)
    assert np.array_equal(network.buffers, buffers)
    assert np.array_equal(network.forward(images()), before)
    assert [name for name, _ in half.named_parameters()] == [name for name, _ in network.named_parameters()]
    assert [name for name, _ in half.named_buffers()] == [name for name, _ in network.named_buffers()]


def test_numbers_beyond_float16_become_infinite_without_an_error():
    layer = HalfStorage()
    layer.build((6,), np.float32)
    stored = layer.forward(
        np.array([[70000, -65520, 65519, 65504, 2.0**-25, 1e-9]], np.float32), training=False, key=None
    )
    assert stored.tolist() == [[np.inf, -np.inf, 65504, 65504, 0, 0]]


@pytest.mark.parametrize("model", MODELS)
def test_layer_outputs_are_the_outputs_of_the_layers(model):
    network = network_of(model, PLAIN)
    x, expected = images(), {}
    for layer, name in zip(network.layers, network.layer_names, strict=True):
        x = layer.forward(np.ascontiguousarray(x), training=False, key=None).copy()
        expected[name] = x
    found = layer_outputs(network, images())
    assert list(found) == network.layer_names
    for name, output in expected.items():
        assert np.array_equal(found[name], output), name
