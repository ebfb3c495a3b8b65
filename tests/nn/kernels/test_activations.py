"""Compiled ReLU, leaky ReLU and dropout have the bits of the layers as written."""

import numpy as np
import pytest

from distdl.nn import Dropout, LeakyReLU, ReLU

pytest.importorskip("numba")
from distdl.rng import Key
from tests.nn.kernels.exact import assert_same_bits, numbers
from tests.nn.kernels.single_layers import compiled_outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
f4 = np.float32
SHAPES = [(1, 1), (3, 5), (2, 16), (4, 3, 5, 7), (1, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layer", [ReLU, LeakyReLU, lambda: LeakyReLU(0), lambda: LeakyReLU(2.5)])
def test_the_sign_of_x_decides(shape, layer):
    x, dy = numbers(shape, 1, special=0.3), numbers(shape, 2, special=0.3)
    built = layer()
    y, dx = compiled_outcome([built], x, dy)
    if isinstance(built, ReLU):
        assert_same_bits(y, np.maximum(x, f4(0)))
        assert_same_bits(dx, np.where(x > 0, dy, f4(0)))
    else:
        assert_same_bits(y, np.where(x > 0, x, x * f4(built.slope)))
        assert_same_bits(dx, np.where(x > 0, dy, dy * f4(built.slope)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0, 0.3, 0.5])
def test_dropout_draws_the_mask_of_its_key(shape, ratio):
    x, dy = numbers(shape, 1, special=0.1), numbers(shape, 2)
    y, dx = compiled_outcome([Dropout(ratio)], x, dy)
    mask = Key(1).of("dropout_1").mask(x.size, 1 - ratio).reshape(shape)
    assert_same_bits(y, np.where(mask, x * f4(1 / (1 - ratio)), f4(0)))
    assert_same_bits(dx, np.where(mask, dy * f4(1 / (1 - ratio)), f4(0)))


def test_dropout_passes_its_input_on_in_evaluation():
    x, dy = numbers((3, 5), 1), numbers((3, 5), 2)
    y, dx = compiled_outcome([Dropout(0.5)], x, dy, training=False)
    assert_same_bits(y, x)
    assert_same_bits(dx, dy)
