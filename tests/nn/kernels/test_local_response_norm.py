"""The compiled local response normalization has the bits of its formula."""

import numpy as np
import pytest

from distdl.nn import LocalResponseNorm

pytest.importorskip("numba")
from tests.nn.kernels.exact import assert_same_bits, fma, numbers
from tests.nn.kernels.oracles_functions import exp, log
from tests.nn.kernels.single_layers import assert_close, compiled_outcome, plain_outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
f4 = np.float32


def window_sum(values, before, after):
    C = values.shape[-1]
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(before, after)])
    total = np.zeros_like(values)
    for start in range(before + after + 1):
        total += padded[..., start : start + C]
    return total


def oracle(norm, x, dy):
    before, after = norm.size // 2, (norm.size - 1) // 2
    s = fma(window_sum(x * x, before, after), f4(norm.alpha / norm.size), f4(norm.k))
    root = np.sqrt(s)
    roots = {0.25: np.sqrt(root), 0.5: root, 0.75: root * np.sqrt(root), 1: s}
    f = f4(1) / roots[norm.beta] if norm.beta in roots else exp(log(s) * f4(-norm.beta))
    through = window_sum(dy * (x * f) / s, after, before)
    return x * f, fma(x * through, f4(-2 * norm.alpha * norm.beta / norm.size), dy * f)


@pytest.mark.parametrize("shape", [(2, 3, 3, C) for C in (1, 3, 6, 16, 17, 30, 64)] + [(3, 40)])
@pytest.mark.parametrize("special", [0, 0.02])
@pytest.mark.parametrize(
    "norm",
    [
        LocalResponseNorm(),
        LocalResponseNorm(4, alpha=0.1, beta=0.5, k=2),
        LocalResponseNorm(1, alpha=1, beta=0.25),
        LocalResponseNorm(32, alpha=0.3, beta=1),
        LocalResponseNorm(47, alpha=0.3, beta=0.6, k=0.5),
        LocalResponseNorm(3, beta=-1.5),
    ],
    ids=lambda norm: f"size {norm.size}, beta {norm.beta}",
)
def test_the_bits_are_those_of_the_formula(shape, special, norm):
    x, dy = numbers(shape, 1, special), numbers(shape, 2, special)
    outcome = compiled_outcome([norm], x, dy)
    for actual, expected in zip(outcome, oracle(norm, x, dy), strict=True):
        assert_same_bits(actual, expected)
    if not special:
        assert_close(outcome, plain_outcome([norm], x, dy))
