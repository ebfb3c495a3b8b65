"""The emulated fused multiply-add is correctly rounded."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from .exact import assert_same_bits, chain, fma

f4 = np.float32


def operands():
    """Return operands of all magnitudes, cancelling ones, and ones next to ties."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, (3, 6000), dtype=np.uint32)
    x, y, z = bits.view(f4)
    z[:2000] = -x[:2000] * y[:2000]  # cancels all but the rounding error of the product
    x[2000:4000] = 1 + rng.integers(0, 2**12, 2000) * f4(2**-23)
    y[2000:4000] = 1 + rng.integers(0, 2**12, 2000) * f4(2**-12)
    z[2000:4000] = rng.choice([0, 2.0**-60, -(2.0**-60), 2.0**-24, 1, 2.0**30], 2000)
    x[4000:5000], y[4000:5000] = x[4000:5000] * f4(2**-60), y[4000:5000] * f4(2**-60)  # subnormal results
    return x, y, z


def test_fma_is_the_nearest_float32_of_the_exact_result():
    with np.errstate(all="ignore"):
        x, y, z = operands()
        results = fma(x, y, z)
        finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(z) & np.isfinite(results)
        below, above = np.nextafter(results, f4(-np.inf)), np.nextafter(results, f4(np.inf))
    checked = 0
    for k in np.flatnonzero(finite & np.isfinite(below) & np.isfinite(above)):
        exact = Fraction(float(x[k])) * Fraction(float(y[k])) + Fraction(float(z[k]))
        distance = abs(exact - Fraction(float(results[k])))
        nearest = min(abs(exact - Fraction(float(neighbour[k]))) for neighbour in (below, above))
        assert distance <= nearest
        assert distance < nearest or results[k].view(np.uint32) % 2 == 0  # a tie goes to the even one
        checked += 1
    assert checked > 3000


def test_fma_differs_from_two_roundings():
    x, y, z = f4(1 + 2**-12), f4(1 + 2**-12), f4(-1 - 2**-11)
    assert x * y + z == 0
    assert fma(x, y, z) == 2**-24
    assert fma(f4(1 + 2**-23), f4(1 - 2**-23), f4(2**-60)) == 1  # above the tie of float64 and float32


def test_fma_of_special_values():
    inf, nan = f4(np.inf), f4(np.nan)
    x = np.array([inf, inf, inf, nan, 1, -1, 0, 3e38, -3e38, 1e-30, -1e-30], f4)
    y = np.array([2, 0, 1, 1, 0, 0, -1, 10, 10, 1e-30, 1e-30], f4)
    z = np.array([1, 1, -inf, 1, 0, -0.0, -0.0, 0, 0, 0, 0], f4)
    expected = np.array([inf, nan, nan, nan, 0, -0.0, -0.0, inf, -inf, 0, -0.0], f4)
    assert_same_bits(fma(x, y, z), expected)


def test_a_chain_is_ascending():
    A = np.array([[1, 2**24, -(2**24)]], f4)
    assert chain(A, np.ones((3, 1), f4))[0, 0] == 0
    assert chain(A[:, ::-1], np.ones((3, 1), f4))[0, 0] == 1
    assert chain(A[:, :1], np.ones((1, 1), f4), start=2)[0, 0] == 3
