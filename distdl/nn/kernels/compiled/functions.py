"""Exponential function, logarithm, hyperbolic tangent and sigmoid of vectors, made of exactly rounded operations.

`GREATEST_ERROR` bounds the errors over all float32 numbers, in units in the last place of the exact result;
``tests/nn/kernels/error_of_functions.py`` measures them. NaN gives NaN; infinities, zeros and subnormal numbers give
what IEEE 754 recommends.

``p(x; c0, c1, ...)`` below is Horner's scheme with fused multiply-adds: ``fma(x, fma(x, ..., c1), c0)``.
"""

import numpy as np
from numba import njit

from distdl.nn.kernels.compiled.integers import bits_of, from_bits, to_float
from distdl.nn.kernels.compiled.simd import fma, greater, greater_equal, select, splat

f4 = np.float32

GREATEST_ERROR = {"exp": 1.05, "log": 0.9, "tanh": 1.2, "sigmoid": 1.6}
#: Above and below, exp is infinite and 0.
EXP_MOST, EXP_LEAST = f4(89.0), f4(-104.0)
LOG2_E = f4(1.44269504)
#: ln 2 as a sum: the first part has few bits, so its products with exponents are exact.
LN2_HIGH, LN2_LOW = f4(0.693359375), f4(-2.12194440e-4)
#: ``x + ROUNDING - ROUNDING`` is the nearest whole number; the sum has it in its lowest bits.
ROUNDING, ROUNDING_BITS = f4(12582912.0), 0x4B400000
#: (exp(r) - 1 - r) / r² for |r| <= ln 2 / 2.
EXP = tuple(map(f4, (0.5, 0.16666518, 0.041666206, 0.008368911, 0.0013950525)))
#: (tanh(x) - x) / x³ as a polynomial of x² up to 1.
TANH = tuple(map(f4, (-0.33333299, 0.13332422, -0.05388467, 0.021500928, -0.007967349, 0.0023169592, -0.00036293583)))
#: (log(1 + f) - f + f² / 2) / f³ for 1 + f from sqrt(1/2) to sqrt(2).
LOG = tuple(
    map(f4, (0.33333316, -0.25000808, 0.20002286, -0.16624595, 0.14181215, -0.13128404, 0.12881405, -0.078602076))
)
SQRT_HALF_BITS = 0x3F3504F3
#: From here on tanh is 1, rounded.
TANH_MOST = f4(10.0)
SIGN, MAGNITUDE, MANTISSA = -0x80000000, 0x7FFFFFFF, 0x007FFFFF
LEAST_NORMAL = f4(2.0**-126)


@njit(inline="always")
def absolute(x):
    """Return x without its sign."""
    return from_bits(bits_of(x) & MAGNITUDE)


@njit(inline="always")
def with_sign(x, y):
    """Return x, which is not negative, with the sign of y."""
    return from_bits(bits_of(x) | (bits_of(y) & SIGN))


@njit(inline="always")
def _power_of_two(n):
    """Return 2 to the power of integers from -126 to 127."""
    return from_bits((n + 127) << 23)


@njit(inline="always")
def _expm1_parts(x):
    """Return y and integers n with ``exp(x) = (1 + y) 2^n``; see `exp`."""
    s = fma(x, splat(LOG2_E), splat(ROUNDING))
    n = s - splat(ROUNDING)
    r = fma(n, splat(-LN2_LOW), fma(n, splat(-LN2_HIGH), x))
    p = fma(r, splat(EXP[4]), splat(EXP[3]))
    p = fma(r, p, splat(EXP[2]))
    p = fma(r, p, splat(EXP[1]))
    p = fma(r, p, splat(EXP[0]))
    return fma(r * r, p, r), bits_of(s) - ROUNDING_BITS


@njit(inline="always")
def exp(x):
    """Return e to the power x: ``(1 + r + r² p(r; EXP)) 2^n`` with ``n = round(x log2 e)`` and ``r = x - n ln 2``.

    x is first limited to EXP_LEAST .. EXP_MOST. Then ``s = fma(x, LOG2_E, ROUNDING)``, ``n = s - ROUNDING``,
    ``r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))``, ``y = fma(r r, p, r)``. Last, ``y + 1`` is multiplied by 2 to the
    power floor(n / 2) and by the rest of the power.
    """
    most, least = splat(EXP_MOST), splat(EXP_LEAST)
    y, n = _expm1_parts(select(greater(x, most), most, select(greater(least, x), least, x)))
    half = n >> 1
    return (y + splat(f4(1))) * _power_of_two(half) * _power_of_two(n - half)


@njit(inline="always")
def log(x):
    """Return the natural logarithm.

    ``x = 2^n (1 + f)`` with 1 + f from sqrt(1/2) to sqrt(2); a subnormal x is first multiplied by 2^23. Then
    ``y = fma(n, LN2_LOW, f³ p(f; LOG))`` with ``f³ = f² f`` and ``f² = f f``; ``y = fma(-1/2, f², y)``; the result is
    ``fma(n, LN2_HIGH, f + y)``.
    """
    zero, one, inf = splat(f4(0)), splat(f4(1)), splat(f4(np.inf))
    small = greater(splat(LEAST_NORMAL), x)
    scaled = select(small, x * splat(f4(2.0**23)), x)
    bits = bits_of(scaled) + (0x3F800000 - SQRT_HALF_BITS)
    n = to_float((bits >> 23) + -127) - select(small, splat(f4(23)), zero)
    f = from_bits((bits & MANTISSA) + SQRT_HALF_BITS) - one
    p = fma(f, splat(LOG[7]), splat(LOG[6]))
    p = fma(f, p, splat(LOG[5]))
    p = fma(f, p, splat(LOG[4]))
    p = fma(f, p, splat(LOG[3]))
    p = fma(f, p, splat(LOG[2]))
    p = fma(f, p, splat(LOG[1]))
    p = fma(f, p, splat(LOG[0]))
    square = f * f
    y = fma(n, splat(LN2_LOW), square * f * p)
    y = fma(splat(f4(-0.5)), square, y)
    y = fma(n, splat(LN2_HIGH), f + y)
    y = select(greater(inf, x), y, x)  # also NaN
    return select(greater(x, zero), y, select(greater_equal(x, zero), splat(f4(-np.inf)), splat(f4(np.nan))))


@njit(inline="always")
def tanh(x):
    """Return the hyperbolic tangent of ``a = |x|``, with the sign of x.

    Below 1 it is ``fma(a z, p(z; TANH), a)`` with ``z = a a``. From 1 on it is ``1 - 2 / (exp(2 a) + 1)`` with
    ``exp(2 a) = (y + 1) 2^n`` (see `exp`), and a is first limited to TANH_MOST.
    """
    one, two, most = splat(f4(1)), splat(f4(2)), splat(TANH_MOST)
    a = absolute(x)
    z = a * a
    p = fma(z, splat(TANH[6]), splat(TANH[5]))
    p = fma(z, p, splat(TANH[4]))
    p = fma(z, p, splat(TANH[3]))
    p = fma(z, p, splat(TANH[2]))
    p = fma(z, p, splat(TANH[1]))
    p = fma(z, p, splat(TANH[0]))
    small = fma(a * z, p, a)
    y, n = _expm1_parts(two * select(greater(a, most), most, a))
    large = one - two / ((y + one) * _power_of_two(n) + one)
    return with_sign(select(greater(one, a), small, large), x)


@njit(inline="always")
def sigmoid(x):
    """Return ``1 / (1 + exp(-x))``, which for ``e = exp(-|x|)`` is ``u / (1 + e)``: u is 1 if x >= 0, and e otherwise.

    ``q = u / d`` with ``d = 1 + e`` is then corrected for the rounding errors of both:
    ``fma(fma(-q, e - (d - 1), fma(-q, d, u)), fma(d, -0.5, 1.457), q)``; the last factor is near 1 / d.
    """
    zero, one = splat(f4(0)), splat(f4(1))
    e = exp(zero - absolute(x))
    u, d = select(greater_equal(x, zero), one, e), one + e
    q = u / d
    rest = fma(zero - q, e - (d - one), fma(zero - q, d, u))
    return fma(rest, fma(d, splat(f4(-0.5)), splat(f4(1.457))), q)


@njit(inline="always")
def greatest_number(numbers_):
    """Return the greatest of some numbers, or NaN if one of them is NaN."""
    greatest = numbers_[0]
    for number in numbers_[1:]:
        if not number <= greatest and greatest == greatest:  # a NaN stays
            greatest = number
    return greatest
