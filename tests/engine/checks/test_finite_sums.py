"""The check finds every number that is not finite, and accepts large finite numbers."""

import numpy as np
import pytest

from distdl.engine.checks.nonfinite import is_finite, what_is_not_finite

SIZES = (1, 16, 32767, 32768, 32769, 65552)


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
def test_a_finite_gradient_is_accepted(size):
    assert what_is_not_finite(total(size)) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", SIZES)
def test_a_single_bad_element_is_found_at_any_position(size, bad):
    for place in {0, size // 2, size - 1}:
        found = total(size)
        found["gradient"][place] = bad
        with np.errstate(over="ignore", invalid="ignore"):
            assert what_is_not_finite(found) == "the gradient is not finite"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_loss_is_found_before_the_gradient(bad):
    assert what_is_not_finite(total(4, loss=bad, fill=np.nan)) == f"the loss is {bad}"
