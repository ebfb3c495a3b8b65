"""Elementary functions are as exact as promised, from basic arithmetic alone: so no CPU and no library changes them."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from distdl.elementary import BLOCK, cosine, logarithm, power, sine_and_cosine


def exact_sine_and_cosine(x):
    """Return both by their series, to 50 digits."""
    with localcontext() as context:
        context.prec = 60
        x, sums, term = Decimal(x), [Decimal(0), Decimal(0)], Decimal(1)
        for order in range(1, 80):
            sums[order % 2] += term if order % 4 in {1, 2} else -term
            term *= x / order
        return sums[0], sums[1]


def exact_logarithm(x):
    with localcontext() as context:
        context.prec = 60
        return Decimal(x).ln()


def error(found, exact):
    """Return the error in units in the last place."""
    return abs(float((Decimal(found) - exact) / Decimal(math.ulp(float(exact)))))


def test_powers_are_correctly_rounded():
    for base in (0.9, 0.999, 0.5, 1.0, 0.1, 1.5, 3e-5, 0.0, 1 - 2.0**-53):
        for exponent in (0, 1, 2, 3, 10, 57, 1000):
            assert power(base, exponent) == float(Fraction(base) ** exponent), (base, exponent)
    assert power(0.999, 10**6) == pytest.approx(math.exp(10**6 * math.log(0.999)), rel=1e-9)


def test_cosines_of_single_numbers_are_correctly_rounded():
    numbers = [math.pi * step / 997 for step in range(998)] + [-1.0, 1e-9, 5e-324, -4.0, 4.0]
    assert [cosine(x) for x in numbers] == [float(exact_sine_and_cosine(x)[1]) for x in numbers]
    assert (cosine(0.0), cosine(math.pi)) == (1.0, -1.0)


def test_logarithms_are_right_to_one_unit_in_the_last_place():
    random = np.random.default_rng(0).random(2000)
    edges = [
        1.0,
        0.5,
        2.0,
        math.sqrt(0.5),
        math.sqrt(2),
        2.0**-53,
        2.0**-1074,
        1e300,
        *np.nextafter([1.0, 1.0], [0, 2]),
    ]
    x = np.array([*edges, *random, *(1 - random * 1e-8)])
    found = logarithm(x)
    assert max(error(y, exact_logarithm(at)) for at, y in zip(x.tolist(), found.tolist(), strict=True) if at != 1) < 1
    assert found[0] == 0
    assert np.signbit(found[x < 1]).all()


def test_sines_and_cosines_are_right_to_one_unit_in_the_last_place():
    random = np.random.default_rng(0).random(2000)
    x = np.array(
        [*(2 * math.pi * random), *(16 * random - 8), *(np.arange(-5, 6) * math.pi / 4), *np.ldexp(random, -30)]
    )
    found = zip(x.tolist(), *(values.tolist() for values in sine_and_cosine(x)), strict=True)
    for at, *both in found:
        for one, exact in zip(both, exact_sine_and_cosine(at), strict=True):
            assert error(one, exact) < 1 if exact else one == 0, at


def test_a_turn_by_a_quarter_is_exact_enough_to_copy_pixels():
    quarters = np.deg2rad(np.array([0.0, 90.0, 180.0, -90.0, -180.0]))
    sine, cosine_ = sine_and_cosine(quarters)
    np.testing.assert_allclose(sine, [0, 1, 0, -1, 0], atol=1e-15)
    np.testing.assert_allclose(cosine_, [1, 0, -1, 0, -1], atol=1e-15)


@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17])
def test_an_array_has_the_bits_of_its_parts(count):
    x = np.random.default_rng(1).random(count) + 0.1
    parts = [slice(0, count // 3), slice(count // 3, count)]
    assert logarithm(x).tobytes() == b"".join(logarithm(x[part]).tobytes() for part in parts)
    for number in (0, 1):
        assert sine_and_cosine(x)[number].tobytes() == b"".join(
            sine_and_cosine(x[part])[number].tobytes() for part in parts
        )
