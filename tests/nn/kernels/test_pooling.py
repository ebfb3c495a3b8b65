"""Compiled pooling has the bits of its formula, for every window, stride and padding."""

import numpy as np
import pytest

from distdl.nn import AvgPool2d, GlobalAvgPool2d, MaxPool2d

pytest.importorskip("numba")
from distdl.nn.kernels.compiled import COMPILED
from tests.nn.kernels.exact import assert_same_bits, numbers
from tests.nn.kernels.single_layers import assert_close, compiled_outcome, network, plain_outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
f4 = np.float32

WINDOWS = [
    *((2,), (3,), (3, 2), (3, 1, 1), (3, 2, 1), (2, 1), (2, 3), (1, 2), (5, 2, 2)),
    *(((2, 3), (1, 2), (1, 0)), ((3, 2), (2, 1), (0, 1)), ((1, 4), (3, 3), (0, 3)), ((7, 9), (1, 1), (0, 1))),
]
SHAPES = [(2, 7, 8, C) for C in (1, 3, 6, 16, 24, 30, 64)] + [(1, 9, 7, 17)]


def oracle(x, dy, window, *, average):
    """Return y and dx, window by window."""
    (FH, FW), (SH, SW), (PH, PW) = window.kernel, window.stride, window.padding
    N, H, W, C = x.shape
    OH, OW = window.output_size((H, W))
    y, share = np.zeros((N, OH, OW, C), f4), f4(1 / (FH * FW))
    winners = np.full(y.shape, -1)
    dx = np.zeros_like(x)

    def elements(h, w):
        for i in range(FH):
            for j in range(FW):
                if 0 <= h * SH - PH + i < H and 0 <= w * SW - PW + j < W:
                    yield i * FW + j, h * SH - PH + i, w * SW - PW + j

    for h in range(OH):
        for w in range(OW):
            if average:
                for _, i, j in elements(h, w):
                    y[:, h, w] += x[:, i, j]
                y[:, h, w] *= share
            else:
                numbers_, pixels = zip(*((k, x[:, i, j]) for k, i, j in elements(h, w)), strict=True)
                best = pixels[0]
                for pixel in pixels[1:]:  # as the kernel: of equal numbers, +0 and -0, the last
                    best = np.where(np.isnan(best) | (best > pixel), best, pixel)
                y[:, h, w] = best
                first = np.argmax(np.stack([pixel == best for pixel in pixels]), axis=0)
                winners[:, h, w] = np.where(np.isnan(best), -1, np.array(numbers_)[first])
    for k in range(FH * FW):  # a pixel adds its windows in the order of its number in them
        for h in range(OH):
            for w in range(OW):
                for number, i, j in elements(h, w):
                    if number == k:
                        won = dy[:, h, w] * share if average else np.where(winners[:, h, w] == k, dy[:, h, w], f4(0))
                        dx[:, i, j] += won
    return y, dx


@pytest.mark.parametrize("kind", [MaxPool2d, AvgPool2d])
@pytest.mark.parametrize("arguments", WINDOWS, ids=str)
def test_the_bits_are_those_of_the_formula(kind, arguments):
    for seed, shape in enumerate(SHAPES):
        layer = kind(*arguments)
        special = 0.1 if seed % 2 else 0
        x = numbers(shape, seed, special)
        if seed % 3 == 0:
            x = np.where(x > 0.5, np.round(x), f4(0))  # ties
        dy = numbers((shape[0], *layer.window.output_size(shape[1:3]), shape[3]), 7, special)
        y, dx = compiled_outcome([layer], x, dy)
        expected, d_expected = oracle(x, dy, layer.window, average=kind is AvgPool2d)
        assert_same_bits(y, expected)
        assert_same_bits(dx, d_expected)
        if not special:
            assert_close((y, dx), plain_outcome([kind(*arguments)], x, dy), 1e-6)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 1, 1, 5), (2, 12, 20, 40)])
def test_global_averages_are_chains_over_the_pixels(shape):
    x, dy = numbers(shape, 1), numbers((shape[0], shape[3]), 2)
    total = np.zeros_like(dy)
    for h in range(shape[1]):
        for w in range(shape[2]):
            total += x[:, h, w]
    y, dx = compiled_outcome([GlobalAvgPool2d()], x, dy)
    pixels = shape[1] * shape[2]
    assert_same_bits(y, total / f4(pixels))
    assert_same_bits(dx, np.broadcast_to((dy * f4(1 / pixels))[:, None, None], shape))


def test_a_window_with_too_many_elements_for_a_byte_runs_as_written():
    (*_, fused), _ = network([MaxPool2d((16, 16)), MaxPool2d(1)], (16, 16, 1), COMPILED).stack.segments
    assert fused is None
