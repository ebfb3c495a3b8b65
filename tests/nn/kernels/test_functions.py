"""Compiled exp, log, tanh and sigmoid: the bits of their formulas, small errors, and special values."""

import math

import numpy as np
import pytest

pytest.importorskip("numba")
from distdl.nn.kernels.compiled import functions
from distdl.nn.kernels.compiled.double_functions import exp, log, log1p
from distdl.nn.kernels.compiled.jit import kernel

from . import oracles_functions as oracles
from .error_of_functions import FUNCTIONS, greatest_error
from .exact import assert_same_bits

inf, nan = math.inf, math.nan


def around(*values):
    """Return each float32 value with its neighbours."""
    found = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        return np.concatenate([np.nextafter(found, np.float32(-inf)), found, np.nextafter(found, np.float32(inf))])


EDGES = around(
    0, -0.0, 1e-45, 1e-40, 2**-126, 1e-30, 2**-24, 2**-12, 0.5, math.sqrt(0.5), 1, math.sqrt(2), 2, 9.01, 10, 17, 88.72,
    88.8, 89, 104, 103.97, 87.3, 1e9, 3.4028235e38, math.log(2) / 2, math.log(2) * 1.5, inf, nan,
)  # fmt: skip
DENSE = (np.arange(0, 1 << 32, 40009) + 11).astype(np.uint32).view(np.float32)
SAMPLE = np.concatenate([EDGES, -EDGES, DENSE, np.linspace(-12, 12, 40_000, dtype=np.float32)])
SAMPLE = SAMPLE[: len(SAMPLE) // 16 * 16]


def computed(name, x):
    """Return the compiled function of x, whose size is a multiple of 16."""
    y = np.empty_like(x)
    FUNCTIONS[name][0](x, y)
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_the_bits_of_its_formula(name):
    assert_same_bits(computed(name, SAMPLE), getattr(oracles, name)(SAMPLE))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_error_of_each_7919th_float32_number_is_within_the_bound(name):
    assert 0.5 < greatest_error(name, step=7919)[0] < functions.GREATEST_ERROR[name] <= 2


ARGUMENTS = [inf, -inf, nan, 0, -0.0, 3e38, -3e38, 1e-45, -1e-45]
SPECIAL = {
    "exp": (ARGUMENTS, [inf, 0, nan, 1, 1, inf, 0, 1, 1]),
    "exp at its limits": ([88.72, 88.73, -103.9, -104], [3.3931806e38, inf, 1e-45, 0]),
    "log": (ARGUMENTS, [inf, nan, nan, -inf, -inf, 88.59685, nan, -103.27893, nan]),
    "tanh": (ARGUMENTS, [1, -1, nan, 0, -0.0, 1, -1, 1e-45, -1e-45]),
    "sigmoid": (ARGUMENTS, [1, 0, nan, 0.5, 0.5, 1, 0, 0.5, 0.5]),
    "sigmoid at its limits": ([-88, -105, 16, 18], [6.0546015e-39, 0, 0.9999999, 1]),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_values(case):
    arguments, values = SPECIAL[case]
    x = np.zeros(16, np.float32)
    x[: len(values)] = arguments
    assert_same_bits(computed(case.split()[0], x)[: len(values)], np.array(values, np.float32))


@kernel
def _double(x_, exp_, log_, log1p_):
    for i in range(x_.size):
        exp_[i] = exp(x_[i])
        log_[i] = log(abs(x_[i]))
        log1p_[i] = log1p(exp(-abs(x_[i])))


def test_float64_functions_have_the_bits_of_their_formulas_and_errors_below_a_unit():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-745, 709.7, 30_000), rng.uniform(-1, 1, 30_000), rng.uniform(0.5, 2, 30_000)])
    small = oracles.double_exp(-np.abs(x))
    results = [np.empty_like(x) for _ in range(3)]
    _double(x, *results)
    for actual, formula, exact in zip(
        results,
        (oracles.double_exp(x), oracles.double_log(np.abs(x)), oracles.double_log1p(small)),
        (
            np.exp(x.astype(np.longdouble)),
            np.log(np.abs(x).astype(np.longdouble)),
            np.log1p(small.astype(np.longdouble)),
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(actual.view(np.int64), formula.view(np.int64))
        if np.finfo(np.longdouble).nmant > 60:  # an exact enough reference
            assert (np.abs(actual - exact) < 0.95 * np.spacing(np.abs(actual))).all()


def test_float64_exp_of_special_values():
    x = np.array([inf, -inf, nan, 0.0, -0.0, 710, -746, -745.13, 709.78])
    result, _, _ = results = [np.empty_like(x) for _ in range(3)]
    _double(x, *results)
    np.testing.assert_allclose(result, [inf, 0, nan, 1, 1, inf, 0, 5e-324, 1.7928227943945155e308], rtol=1e-15)
