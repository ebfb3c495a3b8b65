"""No number that is none goes unnoticed, and no large one is taken for one."""

import numpy as np
import pytest

from distdl.engine.checks.nonfinite import BLOCK, average, is_finite

SIZES = (1, 16, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 16)


def total(size, loss=1.0, fill=1e30):
    return {"gradient": np.full(size, fill, np.float32), "loss_sum": np.array([loss])}


def test_a_large_gradient_whose_squares_overflow_is_finite():
    assert is_finite(np.full(1000, 1e38, np.float32))
    for bad in (np.nan, np.inf, -np.inf):
        array = np.full(1000, 1e38, np.float32)
        array[-1] = bad
        with np.errstate(over="ignore", invalid="ignore"):
            assert not is_finite(array)


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_gradient_is_the_sum_divided_once(size):
    found = total(size)
    found["gradient"][:] = np.linspace(-1e30, 1e30, size)
    mean = np.empty(size, np.float32)
    assert average(found, 3, mean) is None
    assert (mean == found["gradient"] / 3).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", SIZES)
def test_a_single_bad_element_anywhere_is_noticed(size, bad):
    for place in {0, size // 2, size - 1}:
        found = total(size)
        found["gradient"][place] = bad
        with np.errstate(over="ignore", invalid="ignore"):
            assert average(found, 2, np.empty(size, np.float32)) == "the gradient is not finite"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_loss_is_noticed_before_the_gradient(bad):
    assert average(total(4, loss=bad, fill=np.nan), 2, np.empty(4, np.float32)) == f"the loss is {bad}"
