"""Compiled affine layers have the bits of their formula."""

import pytest

pytest.importorskip("numba")
from distdl.nn import Affine, ReLU, Sequential
from distdl.nn.kernels.compiled import COMPILED, affine

from . import oracles_functions as oracles
from .exact import assert_same_bits, numbers

#: N, D, K: one of each, tails of all tiles, weights that are transposed or not, wide ones, more samples than a block.
SHAPES = [
    (1, 1, 1),
    (3, 20, 7),
    (64, 50, 10),
    (2, 130, 100),
    (affine.FEW_SAMPLES - 1, affine.FEW_ROWS * 2 + 1, affine.DIRECT_COLUMNS + 3),
    (affine.FEW_SAMPLES, affine.PANEL_ROWS + 5, affine.DIRECT_COLUMNS + 83),
    (affine.SAMPLES + 3, 2 * affine.INPUTS + 5, 17),
    (affine.SAMPLES * 2, 40, 33),
]


@pytest.mark.parametrize("special", [0, 0.02], ids=["normal", "special"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("N", "D", "K"), SHAPES)
def test_an_affine_layer_has_the_bits_of_its_formula(N, D, K, relu, special):
    network = Sequential([Affine(K), *[ReLU()] * relu], (D,), kernels=COMPILED)
    (*_, fused) = network.stack.segments[0]
    assert len(fused.layers) == 1 + relu
    (_, W), (_, b) = network.named_parameters()
    W[...], b[...] = numbers((D, K), 1, special), numbers(K, 2, special)
    x, dy = numbers((N, D), 3, special), numbers((N, K), 4, special)
    y = oracles.affine(x, W, b, relu)
    dW, db, dx = oracles.affine_backward(x, W, y, dy, relu)
    (_, weight), (_, bias) = network.named_gradients()
    for wanted in (False, True):
        network.bind(needs_input_gradient=wanted)
        assert_same_bits(network.forward(x), y)
        weight[...] = bias[...] = 7
        found = network.backward(dy)
        assert_same_bits(weight, dW)
        assert_same_bits(bias, db)
        if wanted:
            assert_same_bits(found, dx)
        else:
            assert found is None
