"""Arithmetic of the compiled kernels in plain NumPy, correct to the last bit: the fused multiply-add of float32."""

from __future__ import annotations

import numpy as np


def fma(x, y, z):
    """Return ``x y + z`` in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd: if it is inexact and its last bit is even, the neighbour
    towards the exact sum replaces it. Such a sum keeps all that the second rounding, to float32, needs.
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        product = np.multiply(x, y, dtype=np.float64)
        product, z = np.broadcast_arrays(product, np.asarray(z, np.float64))
        total = product + z
        part = total - product
        error = (product - (total - part)) + (z - part)  # exact (Knuth's TwoSum); NaN if an operand is not finite
        even = total.view(np.int64) % 2 == 0
        towards = np.nextafter(total, np.copysign(np.inf, error))
        return np.where(np.isfinite(error) & (error != 0) & even, towards, total).astype(np.float32)


def chain(A, B, start=0):
    """Return ``start + A B``: each element is one chain of fused multiply-adds over k in ascending order.

    A is (..., M, K), B is (..., K, N).
    """
    shape = (*np.broadcast_shapes(A.shape[:-2], B.shape[:-2]), A.shape[-2], B.shape[-1])
    total = np.broadcast_to(np.float32(start), shape)
    for k in range(A.shape[-1]):
        total = fma(A[..., :, k, None], B[..., k, None, :], total)
    return total


def assert_same_bits(actual, expected):
    """Compare every bit of float32 arrays; any NaN equals any other, because its bits depend on the CPU."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    different = (actual.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(actual) & np.isnan(expected))
    if different.any():
        where = np.argwhere(different)
        first = tuple(where[0])
        raise AssertionError(
            f"{len(where)} of {actual.size} differ, first at {first}: {actual[first]!r}, {expected[first]!r} expected"
        )


def numbers(shape, seed=0, special=0.0):
    """Return normal float32 numbers; the share `special` of them are ±0, ±inf, NaN, subnormal or huge."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    if special:
        unusual = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -3e-45, 3e38, -1e38, 1e-38], np.float32)
        x = np.where(rng.random(shape) < special, rng.choice(unusual, shape), x)
    return x
