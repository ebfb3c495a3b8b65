"""Patches, convolution and pooling equal plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distdl.errors import UserError
from distdl.nn import Conv2d, MaxPool2d, Window, patches, patches_adjoint

from . import oracles
from .oracles import built, normal, relative_error

# input (N, H, W, C), filters, kernel, stride, padding
CONVOLUTIONS = {
    "simple_convnet": ((3, 12, 12, 1), 30, (5, 5), (1, 1), (0, 0)),
    "deep_convnet": ((2, 7, 7, 16), 16, (3, 3), (1, 1), (1, 1)),
    "wide padding of deep_convnet": ((2, 6, 6, 4), 8, (3, 3), (1, 1), (2, 2)),
    "1x1": ((2, 5, 4, 3), 4, (1, 1), (1, 1), (0, 0)),
    "one pixel": ((1, 1, 1, 3), 2, (1, 1), (1, 1), (0, 0)),
    "kernel as large as the image": ((2, 4, 5, 2), 3, (4, 5), (1, 1), (0, 0)),
    "padding beyond the kernel": ((2, 4, 4, 2), 3, (2, 2), (1, 1), (3, 3)),
    "padding beyond the kernel on one axis": ((2, 4, 4, 2), 3, (1, 5), (1, 1), (2, 1)),
    "stride 2": ((2, 7, 7, 3), 4, (3, 3), (2, 2), (1, 1)),
    "stride that does not divide": ((2, 8, 9, 3), 4, (3, 2), (3, 2), (0, 1)),
    "stride beyond the kernel": ((2, 9, 9, 2), 2, (2, 2), (4, 3), (0, 0)),
    "stride on one axis": ((1, 6, 7, 2), 3, (3, 3), (1, 2), (1, 0)),
}
# input (N, H, W, C), size, stride, padding
POOLINGS = {
    "the book's": ((3, 8, 8, 5), (2, 2), (2, 2), (0, 0)),
    "odd image": ((2, 7, 5, 3), (2, 2), (2, 2), (0, 0)),
    "overlapping": ((2, 7, 7, 3), (3, 3), (2, 2), (0, 0)),
    "overlapping on one axis": ((2, 6, 7, 2), (2, 3), (2, 1), (0, 0)),
    "rectangular": ((2, 6, 9, 2), (1, 3), (1, 3), (0, 0)),
    "padded": ((2, 6, 6, 2), (3, 3), (3, 3), (1, 1)),
    "padded and overlapping": ((2, 7, 6, 2), (3, 2), (2, 1), (1, 1)),
    "gaps between windows": ((2, 8, 8, 2), (2, 1), (3, 2), (0, 0)),
    "one pixel": ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
}

pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
margins = st.tuples(st.integers(0, 3), st.integers(0, 3))
images = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))


def assert_convolution_is_the_oracle(shape, filters, kernel, stride, padding, dtype, tolerance):
    layer = built(Conv2d(filters, kernel, stride=stride, padding=padding), shape[1:], dtype)
    x = normal(shape, dtype=dtype)
    weight, bias = layer.parameters["weight"], layer.parameters["bias"]
    y = layer.forward(x, training=True, key=None)
    assert relative_error(y, oracles.convolution(x, weight, bias, stride, padding)) < tolerance
    dy = normal(y.shape, "dy", dtype)
    dx = layer.backward(dy)
    expected = oracles.convolution_gradients(x, weight, dy, stride, padding)
    actual = (dx, layer.gradients["weight"], layer.gradients["bias"])
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, e) < tolerance


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_in_float32_is_within_1e_5_of_plain_loops(case):
    assert_convolution_is_the_oracle(*CONVOLUTIONS[case], np.float32, 1e-5)


@settings(deadline=None, max_examples=40)
@given(shape=images, filters=st.integers(1, 3), kernel=pairs, stride=pairs, padding=margins)
def test_convolution_of_any_geometry_equals_plain_loops(shape, filters, kernel, stride, padding):
    assume(min(Window(kernel, stride, padding).output_size(shape[1:3])) >= 1)
    assert_convolution_is_the_oracle(shape, filters, kernel, stride, padding, np.float64, 1e-11)


def test_both_algorithms_for_the_input_gradient_agree():
    """The convolution with the flipped kernel, for stride 1, and the scattering of patches, for every stride."""
    layer = built(Conv2d(4, (3, 2), padding=(1, 2)), (6, 5, 3))
    y = layer.forward(normal((2, 6, 5, 3)), training=True, key=None)
    dy = normal(y.shape, "dy")
    assert relative_error(layer.backward(dy), layer._by_scattering(dy.reshape(-1, 4))) < 1e-12


def test_patches_have_the_shapes_of_the_book():
    """Section 7.4.3: (1, 3, 7, 7) with 5x5 gives (9, 75), ten of them (90, 75)."""
    assert patches(np.zeros((1, 7, 7, 3)), Window((5, 5))).shape == (9, 75)
    assert patches(np.zeros((10, 7, 7, 3)), Window((5, 5))).shape == (90, 75)


def test_patches_of_one_pixel_are_not_copied():
    x = np.zeros((2, 5, 4, 3))
    assert np.shares_memory(patches(x, Window((1, 1))), x)
    assert not np.shares_memory(patches(x, Window((1, 1), stride=(2, 2))), x)


def test_a_row_of_patches_has_the_pixels_under_the_kernel():
    x = np.arange(2 * 4 * 5 * 3.0).reshape(2, 4, 5, 3)
    rows = patches(x, Window((3, 2), stride=(1, 2), padding=(1, 0)))
    rows = rows.reshape(2, 4, 2, 3, 2, 3)  # N, OH, OW, FH, FW, C
    assert (rows[1, 2, 1] == x[1, 1:4, 2:4]).all()
    assert (rows[0, 0, 1, 0] == 0).all(), "the padding"
    assert (rows[0, 0, 1, 1:] == x[0, 0:2, 2:4]).all()


@settings(deadline=None, max_examples=60)
@given(shape=images, kernel=pairs, stride=pairs, padding=margins)
def test_patches_adjoint_is_the_adjoint_of_patches(shape, kernel, stride, padding):
    window = Window(kernel, stride, padding)
    assume(min(window.output_size(shape[1:3])) >= 1)
    x = normal(shape)
    cut = patches(x, window)
    d = normal(cut.shape, "d")
    back = patches_adjoint(d, shape[1:3], window)
    assert back.shape == shape
    assert np.vdot(cut, d) == pytest.approx(np.vdot(x, back), rel=1e-10, abs=1e-10)


def assert_pooling_is_the_oracle(x, size, stride, padding):
    layer = built(MaxPool2d(size, stride, padding), x.shape[1:], x.dtype)
    y = layer.forward(x, training=True, key=None)
    expected, winners = oracles.max_pooling(x, size, stride, padding)
    assert (y == expected).all()
    dy = normal(y.shape, "dy", x.dtype)
    dx = layer.backward(dy)
    assert relative_error(dx, oracles.max_pooling_gradient(x, winners, dy)) < 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", POOLINGS)
def test_pooling_equals_plain_loops(case, dtype):
    shape, *geometry = POOLINGS[case]
    assert_pooling_is_the_oracle(normal(shape, dtype=dtype), *geometry)


@pytest.mark.parametrize("case", POOLINGS)
def test_the_first_of_equal_maxima_wins_in_blank_areas(case):
    shape, *geometry = POOLINGS[case]
    x = normal(shape)
    x[:, shape[1] // 2 :] = 0  # blank
    x[:, :, : shape[2] // 2] = np.round(x[:, :, : shape[2] // 2])  # many ties
    assert_pooling_is_the_oracle(x, *geometry)
    assert_pooling_is_the_oracle(np.zeros(shape, np.float32), *geometry)


@settings(deadline=None, max_examples=40)
@given(shape=images, size=pairs, stride=pairs, padding=margins)
def test_pooling_of_any_geometry_equals_plain_loops_with_ties(shape, size, stride, padding):
    assume(padding[0] < size[0] and padding[1] < size[1])
    assume(min(Window(size, stride, padding).output_size(shape[1:3])) >= 1)
    assert_pooling_is_the_oracle(np.round(normal(shape)), size, stride, padding)


def test_pooling_a_blank_image_passes_the_gradient_to_one_winner():
    layer = built(MaxPool2d(2), (4, 4, 1))
    layer.forward(np.zeros((1, 4, 4, 1)), training=True, key=None)
    dx = layer.backward(np.full((1, 2, 2, 1), 5.0))
    assert dx[0, :, :, 0].tolist() == [[5, 0, 5, 0], [0, 0, 0, 0], [5, 0, 5, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: Conv2d(30, 0), "Conv2d: size 0 given"),
        (lambda: Conv2d(30, 3, stride=(1, 0)), r"Conv2d: stride \(1, 0\) given"),
        (lambda: Conv2d(30, 3, padding=-1), "Conv2d: padding -1 given"),
        (lambda: Conv2d(0, 3), "filters 0 given, expected a whole number of at least 1"),
        (lambda: MaxPool2d(2, padding=2), "padding 2x2 given, expected less than the window 2x2"),
        (lambda: MaxPool2d((2, 2, 2)), r"MaxPool2d: size \(2, 2, 2\) given, expected one or two"),
    ],
)
def test_an_invalid_geometry_is_refused(layer, message):
    with pytest.raises(UserError, match=message):
        layer()


def test_a_convolution_without_bias_equals_one_with_bias_zero():
    without, zero = built(Conv2d(4, 3, padding=1, bias=False), (5, 6, 2)), built(Conv2d(4, 3, padding=1), (5, 6, 2))
    assert list(without.parameters) == ["weight"]
    zero.parameters["bias"][...] = 0
    x, dy = normal((3, 5, 6, 2)), normal((3, 5, 6, 4), "dy")
    outputs = [layer.forward(x, training=True, key=None) for layer in (without, zero)]
    assert (outputs[0] == outputs[1]).all()
    assert (without.backward(dy) == zero.backward(dy)).all()
    assert (without.gradients["weight"] == zero.gradients["weight"]).all()
