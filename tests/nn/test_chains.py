"""The fast form gives the results of the plain layers, for every shape that it supports."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distdl.errors import UserError
from distdl.nn import (
    MODELS,
    Affine,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    SoftmaxCrossEntropy,
    build_model,
)
from distdl.nn.kernels import PLAIN
from distdl.nn.kernels.chains import PatchBlock, WinogradBlock
from distdl.rng import Key

NETWORKS = {
    "first and inner, pooled": lambda p: [
        Conv2d(4, 3, padding=p),
        ReLU(),
        Conv2d(5, 3, padding=1),
        ReLU(),
        MaxPool2d(2),
    ],
    "pooled without ReLU": lambda p: [Conv2d(4, 3, padding=p), MaxPool2d(2), Conv2d(3, 3, padding=2)],
    "ReLU after pooling": lambda p: [Conv2d(4, 3, padding=p), MaxPool2d(2), ReLU(), Conv2d(3, 3, padding=1), ReLU()],
    "rectangular first kernel": lambda p: [Conv2d(4, (2, 3), padding=(1, p)), ReLU(), MaxPool2d(2)],
    "large first kernel": lambda p: [Conv2d(4, 5, padding=p), ReLU(), MaxPool2d(2), Conv2d(3, 3, padding=1), ReLU()],
    "interrupted by another layer": lambda p: [
        Conv2d(4, 3, padding=p),
        ReLU(),
        Sigmoid(),
        Conv2d(3, 3, padding=1),
        ReLU(),
        Conv2d(2, 3, padding=(2, 0)),
    ],
    "without bias": lambda p: [
        *(
            Conv2d(4, 3, padding=p, bias=False),
            ReLU(),
            MaxPool2d(2),
            Conv2d(16, 3, padding=1, bias=False),
            MaxPool2d(2),
        ),
        *(Conv2d(3, 3, padding=1, bias=False), ReLU(), Conv2d(2, 1, bias=False)),
    ],
    "three pooled in a row": lambda p: [
        layer for _ in range(3) for layer in (Conv2d(3, 3, padding=max(p, 1)), ReLU(), MaxPool2d(2))
    ],
    "other strides and windows": lambda p: [
        Conv2d(4, 3, stride=2, padding=p),
        ReLU(),
        Conv2d(4, 3, padding=1),
        ReLU(),
        MaxPool2d(2, stride=1),
        Conv2d(3, 1),
    ],
}


def random(key, *shape):
    return Key(1).of(key).normal(int(np.prod(shape))).reshape(shape)


def outcome(network, x, dy=None, **keywords):
    """Return the output, and all gradients for a random output gradient."""
    y = network.forward(x, **keywords).copy()
    network.backward(random("dy", *y.shape).astype(y.dtype) if dy is None else dy)
    return [y, *(gradient.copy() for _, gradient in network.named_gradients())]


def both_forms(layers, shape, dtype=np.float64):
    fast = Sequential(layers(), shape, dtype=dtype)
    plain = Sequential(layers(), shape, dtype=dtype, kernels=PLAIN)
    fast.initialize(Key(2))
    fast.parameters += 0.1 * Key(3).normal(fast.parameters.size)
    plain.parameters[:] = fast.parameters
    return fast, plain


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max(initial=0) <= tolerance * max(np.abs(other).max(initial=0), 1e-3)


def assert_agree(layers, shape, N, *, blank=True):
    try:
        fast, plain = both_forms(layers, shape)
    except UserError:
        return False  # the image is too small for these layers in both forms
    x = random("x", N, *shape)
    if blank:
        x[:, : shape[0] // 2] = 0  # ties in every window
    assert_close(outcome(fast, x), outcome(plain, x), 1e-11)
    return True


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_shape_gives_the_results_of_the_plain_layers(name, padding):
    agreed = 0
    for height in (3, 4, 5, 7, 8, 9, 16):
        for width in (3, 6, 7, 13):
            for channels, N in ((1, 1), (1, 5), (3, 2), (8, 3), (9, 1)):
                agreed += assert_agree(lambda: NETWORKS[name](padding), (height, width, channels), N)
    assert agreed >= 5


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(3, 14), st.integers(3, 14), st.integers(1, 10)),
    st.integers(1, 40),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.integers(1, 9) | st.sampled_from([15, 16, 30]),
    st.booleans(),
    st.booleans(),
)
def test_any_first_and_second_convolution_give_the_results_of_the_plain_layers(
    shape, N, kernel, padding, filters, relu, pool
):
    def layers():
        following = ([ReLU()] if relu else []) + ([MaxPool2d(2)] if pool else [])
        return [Conv2d(filters, kernel, padding=padding), *following, Conv2d(3, 3, padding=padding), ReLU(), Flatten()]

    assert_agree(layers, shape, N, blank=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", range(1, 9))
def test_a_single_sample_of_few_channels_gives_the_results_of_the_plain_layers(channels, dtype):
    """With one sample and one channel, views have strides for which NumPy 2.4's negative is wrong."""
    for shape in ((3, 6), (3, 7), (4, 5), (6, 3), (9, 9)):
        fast, plain = both_forms(lambda: [Conv2d(channels, 1), Conv2d(channels, 3), Conv2d(1, 1)], (*shape, 1), dtype)
        x = random("x", 1, *shape, 1).astype(dtype)
        assert_close(outcome(fast, x), outcome(plain, x), 1e-11 if dtype == np.float64 else 1e-4)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("model", ["simple_convnet", "deep_convnet"])
@pytest.mark.parametrize("shape", [(28, 28, 1), (15, 18, 3), (32, 32, 3)])
def test_the_convnets_agree_with_their_plain_form_in_float32(model, shape, N):
    network = build_model(model, shape, 10)
    network.initialize(Key(5))
    plain = Sequential(MODELS[model](shape, 10).layers, shape, dtype=np.float64, kernels=PLAIN)
    for (_, target), (_, source) in zip(plain.named_parameters(), network.named_parameters(), strict=True):
        target[...] = source
    x = random("x", N, *shape).astype(np.float32)
    x[:, :, : shape[1] // 2] = -0.5
    dy = random("dy", N, 10)
    keywords = {"training": True, "key": Key(6)}
    found = outcome(network, x, dy.astype(np.float32), **keywords)
    assert_close(
        found, outcome(plain, x.astype(np.float64), dy.astype(np.float32).astype(np.float64), **keywords), 1e-5
    )


def algorithms(network):
    return [[type(block) for block in chain.blocks] if chain else None for *_, chain in network.stack.segments]


def test_the_models_run_their_convolutions_as_one_chain():
    assert algorithms(build_model("deep_convnet", (28, 28, 1), 10))[0] == [PatchBlock] + 5 * [WinogradBlock]
    assert algorithms(build_model("simple_convnet", (28, 28, 1), 10))[0] == [PatchBlock]


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("simple_convnet", {8: 16, 32: 12, 48: 5, 64: 4}), ("deep_convnet", {8: 16, 32: 16, 48: 9, 64: 5, 96: 4})],
)
def test_the_tile_size_never_changes_because_the_bits_depend_on_it(model, sizes):
    found = {side: build_model(model, (side, side, 3), 10).stack.segments[0][-1].tile_size for side in sizes}
    assert found == sizes


def test_large_transformed_weights_have_a_chain_of_their_own_with_tiles_as_large():
    """Such tiles would push the activations of the first layers of VGG11 out of the cache."""
    small, large = (chain for *_, chain in build_model("vgg11", (32, 32, 3), 10).stack.segments if chain)
    assert (small.tile_size, large.tile_size) == (11, 171)
    weights = max(block.weight_bytes for block in large.blocks)
    assert large.tile_size * max(block.bytes_per_sample for block in large.blocks) >= weights


def test_the_first_convolution_keeps_only_its_planes_patches_and_outputs():
    """8 planes (one for each channel), 9 patches (with that of the bias), the product and the output."""
    network = Sequential([Conv2d(1, 1)], (64, 64, 8))
    assert algorithms(network) == [[PatchBlock]]
    x = np.zeros((4, 64, 64, 8), np.float32)
    tracemalloc.start()
    try:
        network.forward(x)
        assert tracemalloc.get_traced_memory()[0] < 1.05 * (8 + 9 + 1 + 1) * x[..., 0].nbytes
    finally:
        tracemalloc.stop()


def test_other_strides_kernels_and_derived_layers_run_as_plain_layers():
    class OwnConvolution(Conv2d):
        pass

    class OwnReLU(ReLU):
        pass

    layers = [OwnConvolution(2, 3), Conv2d(2, 3, stride=2), Conv2d(2, 5, padding=2), Conv2d(2, 3, padding=1), OwnReLU()]
    assert algorithms(Sequential(layers, (16, 16, 2))) == [None, None, None, [WinogradBlock], None]


def test_the_same_call_gives_the_same_bits_after_other_calls():
    network = build_model("deep_convnet", (14, 14, 1), 10)
    network.initialize(Key(1))
    x = random("x", 21, 14, 14, 1).astype(np.float32)
    first = outcome(network, x[:16])
    for N in (1, 21, 7):
        outcome(network, x[:N])
    for one, other in zip(outcome(network, x[:16]), first, strict=True):
        assert one.tobytes() == other.tobytes()


def test_constant_parameters_give_the_same_bits():
    network = build_model("deep_convnet", (14, 14, 1), 10)
    network.initialize(Key(1))
    x = random("x", 16, 14, 14, 1).astype(np.float32)
    first = outcome(network, x)
    with network.constant_parameters():
        for _ in range(2):
            for one, other in zip(outcome(network, x), first, strict=True):
                assert one.tobytes() == other.tobytes()
    network.parameters *= 2
    assert outcome(network, x)[0].tobytes() != first[0].tobytes()


def test_the_input_does_not_change():
    network = build_model("deep_convnet", (14, 14, 1), 10)
    network.initialize(Key(1))
    x, dy = random("x", 5, 14, 14, 1).astype(np.float32), random("dy", 5, 10).astype(np.float32)
    kept = x.copy(), dy.copy()
    outcome(network, x, dy)
    assert (x == kept[0]).all()
    assert (dy == kept[1]).all()


def test_a_network_that_begins_with_another_layer_gets_its_gradient_through_the_chain():
    class Scale(Layer):
        def parameter_specs(self):
            from distdl.nn import ParameterSpec

            return [ParameterSpec("scale", (1,), lambda key, shape, fan_in: np.ones(shape), fan_in=1)]

        def forward(self, x, *, training, key):
            self.x = x
            return x * self.parameters["scale"]

        def backward(self, dy):
            self.gradients["scale"][0] = (dy * self.x).sum()
            return dy * self.parameters["scale"]

    layers = lambda: [Scale(), Conv2d(4, 3, padding=1), ReLU(), MaxPool2d(2), Dropout(0.0), Flatten(), Affine(3)]  # noqa: E731
    fast, plain = both_forms(layers, (7, 6, 2))
    assert algorithms(fast)[1] == [WinogradBlock]
    x = random("x", 19, 7, 6, 2)
    labels = np.arange(19) % 3
    gradients = []
    for network in (fast, plain):
        loss = SoftmaxCrossEntropy()
        loss.forward(network.forward(x), labels)
        network.backward(loss.backward())
        gradients.append([gradient.copy() for _, gradient in network.named_gradients()])
    assert_close(*gradients, 1e-11)
