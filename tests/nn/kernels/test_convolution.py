"""Compiled convolutions have the bits of their formulas, whatever the block, and are as exact as the plain ones."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")
from distdl.nn import Conv2d, ConvTranspose2d, MaxPool2d, ReLU, Sequential
from distdl.nn.kernels import PLAIN
from distdl.nn.kernels.compiled import COMPILED, arrays, convolution

from . import oracles_convolution as oracles
from .exact import assert_same_bits, numbers

f4 = np.float32
PASS, RELU, POOL, BOTH = (False, False), (True, False), (False, True), (True, True)
# input (N, H, W, C), filters, kernel, stride, padding, (ReLU, pooling), bias
DIRECT = {
    "simple_convnet": ((3, 10, 12, 1), 30, (5, 5), (1, 1), (0, 0), BOTH, True),
    "lenet": ((2, 9, 8, 6), 16, (5, 5), (1, 1), (2, 2), PASS, True),
    "first layer of three channels": ((2, 9, 7, 3), 20, (3, 5), (2, 1), (1, 2), RELU, True),
    "odd output, pooled": ((2, 7, 9, 2), 5, (2, 2), (1, 1), (0, 1), BOTH, True),
    "pooled without ReLU": ((2, 6, 6, 2), 17, (1, 3), (1, 1), (0, 0), POOL, False),
    "stride 2": ((3, 7, 7, 16), 35, (3, 3), (2, 2), (1, 1), PASS, False),
    "strides of both axes": ((2, 8, 9, 3), 4, (3, 2), (3, 2), (0, 1), RELU, True),
    "stride beyond the kernel": ((2, 9, 9, 17), 2, (2, 2), (4, 3), (0, 0), PASS, True),
    "shortcut": ((2, 5, 5, 20), 40, (1, 1), (2, 2), (0, 0), PASS, False),
    "1x1": ((3, 3, 5, 50), 7, (1, 1), (1, 1), (0, 0), RELU, True),
    "1x1, few channels": ((2, 3, 4, 3), 33, (1, 1), (1, 1), (0, 0), PASS, True),
    "1x1, pooled": ((2, 4, 5, 18), 6, (1, 1), (1, 1), (0, 0), BOTH, True),
    "1x1, padded": ((1, 2, 3, 17), 3, (1, 1), (1, 1), (1, 0), PASS, True),
    "tiny image": ((5, 2, 2, 34), 19, (3, 3), (1, 1), (1, 1), RELU, True),
    "tiny image, pooled": ((3, 2, 2, 16), 4, (3, 3), (1, 1), (1, 1), BOTH, False),
    "one pixel": ((1, 1, 1, 1), 1, (1, 1), (1, 1), (0, 0), PASS, True),
    "one channel, one filter": ((1, 6, 5, 1), 1, (4, 2), (1, 2), (1, 1), RELU, False),
    "padding beyond the kernel": ((2, 3, 3, 16), 3, (2, 2), (1, 1), (3, 2), PASS, True),
    "kernel as large as the image": ((4, 4, 3, 18), 5, (4, 3), (1, 1), (0, 0), PASS, True),
    "many pixels": ((2, 12, 13, 16), 18, (5, 5), (1, 1), (2, 2), RELU, True),
    "many pixels with stride": ((1, 24, 23, 17), 3, (2, 3), (2, 2), (0, 1), PASS, True),
    "many channels": ((2, 12, 12, 65), 3, (2, 1), (1, 1), (0, 0), PASS, True),
    "more filters than a block": ((2, 4, 4, 16), 70, (2, 2), (1, 1), (1, 0), RELU, True),
}
WINOGRAD = {
    "deep_convnet": ((2, 9, 8, 16), 16, (3, 3), (1, 1), (1, 1), RELU, True),
    "pooled": ((3, 8, 6, 3), 20, (3, 3), (1, 1), (2, 2), BOTH, True),
    "odd output, pooled": ((1, 7, 9, 17), 2, (3, 3), (1, 1), (1, 1), BOTH, False),
    "pooled without ReLU": ((2, 5, 6, 1), 33, (3, 3), (1, 1), (1, 1), POOL, True),
    "no padding": ((2, 7, 5, 18), 5, (3, 3), (1, 1), (0, 0), PASS, False),
    "padding of both axes": ((2, 3, 4, 2), 70, (3, 3), (1, 1), (2, 1), PASS, True),
    "one sample, one channel, one filter": ((1, 5, 5, 1), 1, (3, 3), (1, 1), (0, 0), RELU, True),
}


@pytest.fixture(autouse=True)
def _scratch_is_poisoned(monkeypatch):
    def poisoned(name, size):
        array = arrays.scratch(name, size)
        if name != "gradient of weights":  # it holds sums that the next images of the same pass continue
            array.fill(np.nan)
        return array

    monkeypatch.setattr(convolution, "scratch", poisoned)


def network(case, kernels=COMPILED, dtype=f4):
    """Return the network of the convolution and what follows, with normal numbers as parameters."""
    (_, *shape), filters, kernel, stride, padding, (relu, pool), bias = case
    conv = Conv2d(filters, kernel, stride=stride, padding=padding, bias=bias)
    layers = [conv, *([ReLU()] if relu else []), *([MaxPool2d(2)] if pool else [])]
    net = Sequential(layers, tuple(shape), dtype=dtype, kernels=kernels)
    net.bind(needs_input_gradient=True)
    for seed, parameter in enumerate(conv.parameters.values()):
        parameter[...] = numbers(parameter.shape, 10 + seed)
    return net, conv


def results(case, special, kernels=COMPILED, dtype=f4):
    """Return y, dx, dW and db of a network, and its input, its output gradient and its layer."""
    net, conv = network(case, kernels, dtype)
    x = numbers(case[0], 1, special)
    y = net.forward(x.astype(dtype), training=True).copy()
    dy = numbers(y.shape, 2, special)
    dx = net.backward(dy.astype(dtype))
    return (y, dx, *(conv.gradients[name] for name in conv.parameters)), x, dy, conv


@np.errstate(invalid="ignore", over="ignore", under="ignore")
def expected(case, x, dy, conv, *, by_winograd):
    relu, pool = case[5]
    window = (*case[2], *case[3], *case[4])
    weight, bias = conv.parameters["weight"], conv.parameters.get("bias")
    size = conv.output_size
    sums = (
        oracles.winograd_convolution(x, weight, case[4], size)
        if by_winograd
        else oracles.convolution(x, weight, window, size)
    )
    y, winners = oracles.finish(sums, bias, relu=relu, pool=pool)
    d_masked, d = oracles.masked(dy, y, winners, size, relu=relu)
    if by_winograd:
        dW, db, dx = oracles.winograd_gradients(x, weight, d, case[4])
    else:
        few = x.shape[3] < convolution.FEW
        dx = oracles.input_gradient(d, weight, window, x.shape[1:3])
        if not pool:
            x, d, d_masked = oracles.as_points(window, x, d, d_masked)
        dW = oracles.weight_gradient(x, d, window, zeros_outside=few)
        db = oracles.sum_of_chunks(d_masked, d_masked.shape[2] if pool else 32)
    return (y, dx, dW, db) if bias is not None else (y, dx, dW)


@pytest.mark.parametrize("special", [0, 0.01], ids=["normal", "special"])
@pytest.mark.parametrize("case", DIRECT.values(), ids=DIRECT.keys())
def test_direct_convolution_has_the_bits_of_its_formula_for_every_block(case, special, monkeypatch):
    actual, *given = results(case, special)
    oracle = expected(case, *given, by_winograd=False)
    for a, e in zip(actual, oracle, strict=True):
        assert_same_bits(a, e)
    for images, by_pixels, rows in ((1, True, 2), (2, False, 4)):
        monkeypatch.setattr(convolution.Geometry, "block", lambda *_, images=images: images)
        monkeypatch.setattr(convolution.Geometry, "by_pixels", lambda *_, by_pixels=by_pixels: by_pixels)
        monkeypatch.setattr(convolution.Geometry, "rows", lambda *_, rows=rows: rows)
        for a, e in zip(results(case, special)[0], oracle, strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("special", [0, 0.01], ids=["normal", "special"])
@pytest.mark.parametrize("case", WINOGRAD.values(), ids=WINOGRAD.keys())
def test_winograd_has_the_bits_of_its_formula_for_every_block(case, special, monkeypatch):
    monkeypatch.setattr(convolution, "is_for_winograd", lambda _: True)
    actual, *given = results(case, special)
    oracle = expected(case, *given, by_winograd=True)
    for a, e in zip(actual, oracle, strict=True):
        assert_same_bits(a, e)
    for most_weights, tiles in ((2**20, 3), (0, 3), (0, 2**10)):  # kept, in several blocks, in one block
        monkeypatch.setattr(convolution, "MANY_WEIGHTS", most_weights)
        monkeypatch.setattr(convolution.WinogradConvolution, "_tiles_of_block", lambda *_, tiles=tiles: tiles)
        for a, e in zip(results(case, special)[0], oracle, strict=True):
            assert_same_bits(a, e)


# input (N, H, W, C), filters, kernel, stride, padding
TRANSPOSED = {
    "twice as large": ((3, 3, 4, 17), 16, (2, 2), (2, 2), (0, 0)),
    "few filters": ((2, 4, 3, 16), 3, (4, 4), (2, 2), (1, 1)),
    "gaps between the kernels": ((2, 3, 3, 5), 18, (1, 2), (3, 3), (0, 0)),
    "stride 1": ((2, 4, 4, 33), 20, (3, 3), (1, 1), (1, 2)),
    "1x1": ((2, 3, 3, 20), 35, (1, 1), (1, 1), (0, 0)),
    "one pixel": ((1, 1, 1, 1), 1, (3, 2), (2, 1), (0, 0)),
}


@pytest.mark.parametrize("special", [0, 0.01], ids=["normal", "special"])
@pytest.mark.parametrize("case", TRANSPOSED.values(), ids=TRANSPOSED.keys())
def test_transposed_convolution_has_the_bits_of_its_formula(case, special):
    (_, H, W, C), filters, kernel, stride, padding = case
    conv = ConvTranspose2d(filters, kernel, stride=stride, padding=padding)
    net = Sequential([conv], (H, W, C), kernels=COMPILED)
    net.bind(needs_input_gradient=True)
    weight, bias = conv.parameters["weight"], conv.parameters["bias"]
    weight[...], bias[...] = numbers(weight.shape, 10), numbers(bias.shape, 11)
    x = numbers(case[0], 1, special)
    y = net.forward(x, training=True)
    dy = numbers(y.shape, 2, special)
    dx = net.backward(dy)
    window, few = (*kernel, *stride, *padding), filters < convolution.FEW
    with np.errstate(invalid="ignore", over="ignore"):
        assert_same_bits(y, oracles.input_gradient(x, weight, window, conv.output_size) + bias)
        assert_same_bits(dx, oracles.convolution(dy, weight, window, (H, W)))
        dy, x = oracles.as_points(window, dy, x)
        assert_same_bits(conv.gradients["weight"], oracles.weight_gradient(dy, x, window, zeros_outside=few))
        assert_same_bits(conv.gradients["bias"], oracles.sum_of_chunks(dy, 32))


@pytest.mark.parametrize("by_winograd", [True, False], ids=["winograd", "direct"])
def test_the_first_of_equal_maxima_wins(by_winograd, monkeypatch):
    monkeypatch.setattr(convolution, "is_for_winograd", lambda _: by_winograd)
    case = ((2, 6, 6, 1), 3, (3, 3), (1, 1), (1, 1), POOL, False)
    net, conv = network(case)
    conv.parameters["weight"][...] = 0
    y = net.forward(np.ones(case[0], f4), training=True)
    net.backward(np.ones_like(y))
    d = np.zeros((2, *conv.output_size, 3), f4)
    d[:, : 2 * y.shape[1] : 2, : 2 * y.shape[2] : 2] = 1  # the upper left pixel of each window
    window = (3, 3, 1, 1, 1, 1)
    oracle = oracles.weight_gradient(np.ones(case[0], f4), d, window, zeros_outside=True)
    np.testing.assert_allclose(conv.gradients["weight"], oracle, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "filters", "kernel", "settings", "by_winograd"),
    [
        ((4, 4, 4), 4, 3, {"padding": 1}, True),
        ((28, 28, 1), 64, 3, {"padding": 1}, False),  # the first layer of vgg11
        ((32, 32, 3), 64, 3, {"padding": 1}, True),
        ((3, 3, 512), 512, 3, {"padding": 1}, False),
        ((6, 6, 8), 8, 3, {"stride": 2}, False),
        ((6, 6, 8), 8, (3, 2), {}, False),
        ((8, 8, 8), 8, 5, {"padding": 2}, False),
    ],
)
def test_the_shape_alone_chooses_winograd(shape, filters, kernel, settings, by_winograd):
    net = Sequential([Conv2d(filters, kernel, **settings)], shape, kernels=COMPILED)
    implementation = net.stack.segments[0][3]
    assert type(implementation) is (convolution.WinogradConvolution if by_winograd else convolution.DirectConvolution)


def error(actual, exact):
    return np.abs(actual - exact).max() / np.abs(exact).max()


# The greatest error, relative to the error of the plain form or to the rounding of float32, whichever is greater.
# Winograd rounds also in its transforms.
EXACT = {
    "5x5": (((8, 12, 12, 20), 32, (5, 5), (1, 1), (2, 2), BOTH, True), 5),
    "stride 2": (((8, 15, 15, 32), 48, (3, 3), (2, 2), (1, 1), RELU, True), 5),
    "1x1": (((8, 14, 14, 48), 32, (1, 1), (1, 1), (0, 0), PASS, True), 5),
    "first layer": (((32, 28, 28, 1), 30, (5, 5), (1, 1), (0, 0), BOTH, True), 5),
    "winograd": (((8, 14, 14, 32), 32, (3, 3), (1, 1), (1, 1), BOTH, True), 30),
}


@pytest.mark.parametrize(("case", "times"), EXACT.values(), ids=EXACT.keys())
def test_the_error_against_float64_is_a_small_multiple_of_the_plain_form_s(case, times):
    exact, plain, compiled = (
        results(case, 0, kernels, dtype)[0] for kernels, dtype in ((PLAIN, np.float64), (PLAIN, f4), (COMPILED, f4))
    )
    for c, p, e in zip(compiled, plain, exact, strict=True):
        assert error(c, e) <= times * max(error(p, e), 2**-24)
