"""Exponential function and logarithms of float64 numbers, for losses: below 1 unit in the last place.

They consist of + - * / without fused multiply-adds. LLVM may compute several numbers at once. Source of the formulas
and coefficients: fdlibm by Sun Microsystems (1993), ``e_exp.c``, ``e_log.c``, ``s_log1p.c``.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LN2_HIGH, LN2_LOW, LOG2_E = 6.93147180369123816490e-01, 1.90821492927058770002e-10, 1.44269504088896338700
#: ``x + ROUNDING - ROUNDING`` is the nearest whole number; the sum has it in its lowest bits.
ROUNDING, ROUNDING_BITS = 6755399441055744.0, 0x4338000000000000
#: Above and below, exp is infinite and 0.
EXP_MOST, EXP_LEAST = 710.0, -746.0
EXP = (
    1.66666666666666019037e-01,
    -2.77777777770155933842e-03,
    6.61375632143793436117e-05,
    -1.65339022054652515390e-06,
    4.13813679705723846039e-08,
)
LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
SQRT_HALF_BITS, ONE_BITS, MANTISSA = 0x3FE6A09E667F3BCD, 0x3FF0000000000000, 0x000FFFFFFFFFFFFF


@intrinsic
def bits_of(typing: Any, x: Any) -> Any:
    """Return the bits of a float64 number."""
    return types.int64(types.float64), lambda context, builder, kind, given: builder.bitcast(given[0], ir.IntType(64))


@intrinsic
def from_bits(typing: Any, x: Any) -> Any:
    """Return the float64 number with these bits."""
    return types.float64(types.int64), lambda context, builder, kind, given: builder.bitcast(given[0], ir.DoubleType())


@njit(inline="always")
def exp(x):
    """Return e to the power x.

    x is first limited to EXP_LEAST .. EXP_MOST. With ``s = x LOG2_E + ROUNDING`` and ``n = s - ROUNDING``:
    ``high = x - n LN2_HIGH``, ``low = n LN2_LOW``, ``r = high - low``, ``t = r r``, ``c = r - t p(t; EXP)`` with
    ``p = t (c0 + t (c1 + ...))``, ``y = 1 - ((low - r c / (2 - c)) - high)``. Then y is multiplied by 2 to the power
    floor(n / 2) and by the rest of 2 to the power n.
    """
    x = EXP_MOST if x > EXP_MOST else x
    x = EXP_LEAST if x < EXP_LEAST else x
    s = x * LOG2_E + ROUNDING
    n = s - ROUNDING
    high, low = x - n * LN2_HIGH, n * LN2_LOW
    r = high - low
    t = r * r
    c = r - t * (EXP[0] + t * (EXP[1] + t * (EXP[2] + t * (EXP[3] + t * EXP[4]))))
    y = 1.0 - ((low - (r * c) / (2.0 - c)) - high)
    whole = bits_of(s) - ROUNDING_BITS
    half = whole >> 1
    return y * from_bits((half + 1023) << 52) * from_bits((whole - half + 1023) << 52)


@njit(inline="always")
def _log_of_sum(n, f, c):
    """Return ``n ln 2 + log(1 + f) + c``, for 1 + f from sqrt(1/2) to sqrt(2) and a small correction c."""
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (LOG[1] + w * (LOG[3] + w * LOG[5]))
    odd = z * (LOG[0] + w * (LOG[2] + w * (LOG[4] + w * LOG[6])))
    half = 0.5 * f * f
    return n * LN2_HIGH - ((half - (s * (half + (odd + even)) + (n * LN2_LOW + c))) - f)


@njit(inline="always")
def log(x):
    """Return the natural logarithm of a normal positive number; NaN gives NaN."""
    bits = bits_of(x) + (ONE_BITS - SQRT_HALF_BITS)
    y = _log_of_sum(np.float64((bits >> 52) - 1023), from_bits((bits & MANTISSA) + SQRT_HALF_BITS) - 1.0, 0.0)
    return y if x == x else x


@njit(inline="always")
def log1p(x):
    """Return ``log(1 + x)`` for x from 0 to 1; NaN gives NaN."""
    u = 1.0 + x
    c = (x - (u - 1.0)) / u
    if u < 1.4142135623730951:
        return _log_of_sum(0.0, u - 1.0, c)
    return _log_of_sum(1.0, 0.5 * u - 1.0, c)
