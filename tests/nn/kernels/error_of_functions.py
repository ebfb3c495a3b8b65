"""Measure the errors of the compiled functions over all float32 numbers, in units in the last place.

    python -m tests.nn.kernels.error_of_functions

It takes some minutes. The references are those of the C library, in float64.
"""

import math
import sys

import numpy as np
from numba import njit

from distdl.nn.kernels.compiled import functions, sigmoids
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import load, store

BLOCK = 1 << 20


@kernel
def exp_(x_, y_):
    """Write exp of each element; the size is a multiple of 16."""
    for i in range(0, x_.size, 16):
        store(y_.ctypes.data, i, functions.exp(load(x_.ctypes.data, i)))


@kernel
def log_(x_, y_):
    """Write log of each element; the size is a multiple of 16."""
    for i in range(0, x_.size, 16):
        store(y_.ctypes.data, i, functions.log(load(x_.ctypes.data, i)))


@njit(inline="always")
def _log(x):
    if x > 0:
        return math.log(x)
    return -np.inf if x == 0 else np.nan


@njit(inline="always")
def _sigmoid(x):
    return 0.0 if x < -700 else 1 / (1 + math.exp(-x))


@njit(inline="always")
def _exp(x):
    return np.inf if x > 700 else math.exp(x)


@njit(inline="always")
def _tanh(x):
    return math.tanh(x)


def _measure(reference):
    """Return a kernel for the greatest error of y and its index, as a share of the last place of the reference."""

    @njit
    def greatest(x_, y_):
        worst, at = 0.0, 0
        for i in range(x_.size):
            exact = reference(np.float64(x_[i]))
            nearest = np.float32(exact)
            if math.isfinite(nearest) and math.isfinite(y_[i]):
                error = abs(np.float64(y_[i]) - exact) / _place(exact)
            else:
                same = y_[i] == nearest or (y_[i] != y_[i] and nearest != nearest)
                error = 0.0 if same else np.inf
            if error > worst:
                worst, at = error, i
        return worst, at

    return greatest


@njit(inline="always")
def _place(exact):
    """Return the unit in the last place of a float32 number near this one."""
    _, exponent = math.frexp(exact)
    return math.ldexp(1.0, max(exponent - 24, -149))


FUNCTIONS = {
    "exp": (exp_, _measure(_exp)),
    "log": (log_, _measure(_log)),
    "tanh": (sigmoids.tanh, _measure(_tanh)),
    "sigmoid": (sigmoids.sigmoid, _measure(_sigmoid)),
}


def greatest_error(name, step=1):
    """Return the greatest error of a function over each `step`-th float32 number, and its argument."""
    compute, measure = FUNCTIONS[name]
    worst = (0.0, np.float32(0))
    for start in range(0, 1 << 32, BLOCK * step):
        x = (start + step * np.arange(BLOCK)).astype(np.uint32).view(np.float32)
        y = np.empty_like(x)
        compute(x, y)
        error, at = measure(x, y)
        worst = max(worst, (error, x[at]), key=lambda one: one[0])
    return worst


if __name__ == "__main__":
    for name in sys.argv[1:] or FUNCTIONS:
        print("{}: {:.3f} at {!r}".format(name, *greatest_error(name)), flush=True)
