"""Elementary functions with the same bits on every CPU and C library: powers, logarithm, sine, cosine.

The functions of C libraries, and NumPy's own, are only nearly correct, and their last bits differ between versions and
CPUs. Here arrays get additions, multiplications, divisions and exact operations alone, which IEEE 754 fixes. Single
numbers are computed in decimal arithmetic with 50 digits and then rounded.

Source of the polynomials for arrays: fdlibm (Sun Microsystems, 1993); errors are below 1 unit in the last place.
"""

from collections.abc import Sequence
from decimal import Context, Decimal, localcontext
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

#: Numbers at a time, so that the intermediate arrays stay in the cache.
BLOCK = 4096
_DIGITS = Context(prec=50)
_SMALL = Decimal(10) ** -45

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # the first has 33 bits
_LOG = (
    *(6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01),
    *(1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01),
)
_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)  # 33, 33 and 53 bits
_SINE = (
    *(-1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04),
    *(2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10),
)
_COSINE = (
    *(4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05),
    *(-2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11),
)


def power(base: float, exponent: int) -> float:
    """Return ``base ** exponent`` for a whole exponent of at least 0.

    >>> power(0.999, 3) == 0.999**3, power(2.0, 0)
    (True, 1.0)
    """
    return float(_DIGITS.power(Decimal(base), exponent)) if exponent else 1.0


def cosine(x: float) -> float:
    """Return the cosine of a number between -4 and 4.

    >>> cosine(0.0), round(cosine(1.0), 12)
    (1.0, 0.540302305868)
    """
    with localcontext(_DIGITS):
        square = Decimal(x) ** 2
        total = term = Decimal(1)
        order = 0
        while abs(term) > _SMALL:
            order += 2
            term *= -square / (order * (order - 1))
            total += term
        return float(total)


def logarithm(x: Array) -> Array:
    """Return the natural logarithm of positive, finite numbers (n,).

    >>> logarithm(np.array([1.0, 8.0])).round(9).tolist()
    [0.0, 2.079441542]
    """
    y = np.empty_like(x)
    for start in range(0, len(x), BLOCK):
        mantissa, exponent = np.frexp(x[start : start + BLOCK])
        below = mantissa < np.sqrt(0.5)
        f = np.where(below, 2 * mantissa, mantissa) - 1  # x = 2^k (1 + f)
        k = (exponent - below).astype(np.float64)
        s = f / (2 + f)
        z = s * s
        rest = z * _polynomial(_LOG, z)
        half = 0.5 * f * f
        y[start : start + BLOCK] = k * _LN2_HIGH - ((half - (s * (half + rest) + k * _LN2_LOW)) - f)
    return y


def sine_and_cosine(x: Array) -> tuple[Array, Array]:
    """Return sine and cosine of angles (n,) between -8 and 8.

    >>> [values.round(9).tolist() for values in sine_and_cosine(np.array([0.0, 2.0]))]
    [[0.0, 0.909297427], [1.0, -0.416146837]]
    """
    sine, cosine = np.empty_like(x), np.empty_like(x)
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        turns = np.rint(part * (2 / np.pi))  # quarters of a turn
        r = part - turns * _HALF_PI[0]
        tail = turns * _HALF_PI[1]
        reduced = r - tail
        tail = (r - reduced) - tail - turns * _HALF_PI[2]  # what the difference has lost
        r = reduced + tail
        tail = (reduced - r) + tail
        z = r * r
        of_sine = r + (tail + z * r * _polynomial(_SINE, z))
        half = 0.5 * z
        w = 1 - half
        of_cosine = w + (((1 - w) - half) + (z * z * _polynomial(_COSINE, z) - r * tail))
        quarter = turns.astype(np.int64) & 3
        odd = (quarter & 1).astype(bool)
        sine[start : start + BLOCK] = np.where(odd, of_cosine, of_sine) * np.where(quarter >= 2, -1.0, 1.0)
        sign = np.where((quarter == 1) | (quarter == 2), -1.0, 1.0)
        cosine[start : start + BLOCK] = np.where(odd, of_sine, of_cosine) * sign
    return sine, cosine


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Return ``c[0] + x (c[1] + x (c[2] + …))``."""
    y = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        y *= x
        y += coefficient
    return y
