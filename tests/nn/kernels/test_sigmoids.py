"""Compiled sigmoid, tanh, softmax and interpolation have the bits of their formulas."""

import numpy as np
import pytest

pytest.importorskip("numba")
from distdl.nn import Sequential, Sigmoid, Tanh, Upsample2d
from distdl.nn.activations import Softmax
from distdl.nn.kernels.compiled import COMPILED

from . import oracles_functions as oracles
from .exact import assert_same_bits, numbers


def passes(layer, x, dy):
    """Return the output and the gradient of the input of a compiled layer."""
    network = Sequential([layer], x.shape[1:], kernels=COMPILED)
    assert network.stack.segments[0][-1] is not None
    network.bind(needs_input_gradient=True)
    return network.forward(x), network.backward(dy)


@pytest.mark.parametrize("special", [0, 0.05], ids=["normal", "special"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 5, 7), (4, 16), (2, 33)])
@pytest.mark.parametrize("layer", [Sigmoid, Tanh, Softmax])
def test_activations_have_the_bits_of_their_formula(layer, shape, special):
    x, dy = numbers(shape, 1, special) * (1 if special else 3), numbers(shape, 2, special)
    y, dx = passes(layer(), x, dy)
    one = np.float32(1)
    with np.errstate(all="ignore"):
        if layer is Softmax:
            rows = (-1, shape[-1])
            expected = oracles.softmax(x.reshape(rows)).reshape(shape)
            expected_dx = oracles.softmax_backward(expected.reshape(rows), dy.reshape(rows)).reshape(shape)
        elif layer is Sigmoid:
            expected = oracles.sigmoid(x)
            expected_dx = (one - expected) * expected * dy
        else:
            expected = oracles.tanh(x)
            expected_dx = (one - expected * expected) * dy
    assert_same_bits(y, expected)
    assert_same_bits(dx, expected_dx)


@pytest.mark.parametrize("special", [0, 0.05], ids=["normal", "special"])
@pytest.mark.parametrize(
    ("shape", "factor"), [((1, 1, 1, 1), 3), ((2, 3, 1, 5), 2), ((1, 4, 5, 17), 3), ((2, 2, 3, 2), 1)]
)
def test_interpolation_has_the_bits_of_its_formula(shape, factor, special):
    layer = Upsample2d(factor)
    N, H, W, C = shape
    x, dy = numbers(shape, 1, special), numbers((N, factor * H, factor * W, C), 2, special)
    y, dx = passes(layer, x, dy)
    assert_same_bits(y, oracles.interpolated(x, layer.rows, layer.columns))
    assert_same_bits(dx, oracles.interpolated(dy, layer.rows.T, layer.columns.T))
