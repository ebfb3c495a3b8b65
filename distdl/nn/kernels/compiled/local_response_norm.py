"""Compiled local response normalization: one pass over memory each way.

With ``s = k + alpha / size * (sum of squares over the window)`` and ``f = s^-beta``: ``y = x f``. Backward, with
``t = dy y / s``: ``dx = dy f - 2 alpha beta / size x (sum of t over the windows with this element)``. The order of
operations, all in float32:

- A sum over a window begins with 0 and adds the channels in ascending order. Channels outside count as zeros.
- ``s = fma(sum, alpha / size, k)`` with the factor rounded to float32.
- For beta 0.25, 0.5, 0.75 and 1: ``f = 1 / r``, with ``r = sqrt(sqrt(s))``, ``sqrt(s)``, ``sqrt(s) sqrt(sqrt(s))``
  or s. For other beta: ``f = exp(log(s) (-beta))`` with the functions of `functions`.
- ``y = x f``; ``t = dy (x f) / s``; ``dx = fma(x (sum of t), -2 alpha beta / size, dy f)`` with the factor rounded.

C channels. The scratch has the values of a block of pixels, with a margin of zeros around the channels of each pixel.
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numba import njit

from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.functions import exp, log
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import fma, load, load_lanes, splat, square_root, store, store_lanes
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layers import Array, Layer
from distdl.nn.normalization import LocalResponseNorm
from distdl.rng import Key

f4 = np.float32
PIXELS_OF_BLOCK = 8


# ---------------------------------------------------------------------------------------------------------- kernels


@njit(inline="always")
def _window_sum(values, at, before, after):
    total = splat(f4(0))
    for distance in range(-before, after + 1):
        total = total + load(values, at + distance)
    return total


@njit(inline="always")
def _factor(s, beta):
    """Return ``s^-beta``."""
    quarters = 4 * beta
    if not (quarters == 1 or quarters == 2 or quarters == 3 or quarters == 4):
        return exp(log(s) * splat(f4(-beta)))
    root = s
    if quarters < 4:
        root = square_root(s)
    if quarters == 1:
        root = square_root(root)
    if quarters == 3:
        root = root * square_root(root)
    return splat(f4(1)) / root


@njit(inline="always")
def _write_squares(x, first, C, squares, margin):
    for c in range(0, C, 16):
        v = load_lanes(x, first + c, C - c)
        store(squares, margin + c, v * v)


@kernel
def forward(x_, y_, scratch_, C, margin, before, after, alpha, k, beta):
    """Write y; the scratch has zeros, and room for the squares of a block of pixels (pixels, width)."""
    x, y, scratch, pixels, width = x_.ctypes.data, y_.ctypes.data, scratch_.ctypes.data, x_.size // C, scratch_.shape[2]
    alphas, ks = splat(f4(alpha)), splat(f4(k))
    for start in range(0, pixels, PIXELS_OF_BLOCK):
        count = min(PIXELS_OF_BLOCK, pixels - start)
        for p in range(count):
            _write_squares(x, (start + p) * C, C, scratch + 4 * p * width, margin)
        for p in range(count):
            for c in range(0, C, 16):
                s = fma(_window_sum(scratch, p * width + margin + c, before, after), alphas, ks)
                i = (start + p) * C + c
                store_lanes(y, i, load_lanes(x, i, C - c) * _factor(s, beta), C - c)


@kernel
def backward(x_, dy_, dx_, scratch_, C, margin, before, after, alpha, k, beta, coefficient):
    """Write dx; the scratch has zeros, and room for squares, t and ``dy f`` of a block (3, pixels, width)."""
    x, dy, dx, pixels, width = x_.ctypes.data, dy_.ctypes.data, dx_.ctypes.data, x_.size // C, scratch_.shape[2]
    squares = scratch_.ctypes.data
    through, direct = squares + 4 * PIXELS_OF_BLOCK * width, squares + 8 * PIXELS_OF_BLOCK * width
    alphas, ks, coefficients = splat(f4(alpha)), splat(f4(k)), splat(f4(coefficient))
    for start in range(0, pixels, PIXELS_OF_BLOCK):
        count = min(PIXELS_OF_BLOCK, pixels - start)
        for p in range(count):
            _write_squares(x, (start + p) * C, C, squares + 4 * p * width, margin)
        for p in range(count):
            for c in range(0, C, 16):
                at, i = p * width + margin + c, (start + p) * C + c
                s = fma(_window_sum(squares, at, before, after), alphas, ks)
                f = _factor(s, beta)
                d = load_lanes(dy, i, C - c)
                store_lanes(through, at, d * (load_lanes(x, i, C - c) * f) / s, C - c)
                store(direct, at, d * f)
        for p in range(count):
            for c in range(0, C, 16):
                at, i = p * width + margin + c, (start + p) * C + c
                v = load_lanes(x, i, C - c) * _window_sum(through, at, after, before)
                store_lanes(dx, i, fma(v, coefficients, load(direct, at)), C - c)


# ---------------------------------------------------------------------------------------------------------- layers


def local_response_norm_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of a local response normalization."""
    return CompiledLocalResponseNorm(layers[:1], names[0])


class CompiledLocalResponseNorm(CompiledLayers):
    """A local response normalization; the layer in front keeps x, and the sums are computed again."""

    def __init__(self, layers: Sequence[Layer], name: str) -> None:
        super().__init__(layers, name, layers[0].input_shape)
        norm = cast("LocalResponseNorm", layers[0])
        farthest = self.output_shape[-1] - 1
        window = min(norm.size // 2, farthest), min((norm.size - 1) // 2, farthest)
        self.margin = -(-window[0] // 16) * 16
        self.numbers = (self.margin, *window, norm.alpha / norm.size, float(norm.k), float(norm.beta))
        self.coefficient = -2 * norm.alpha * norm.beta / norm.size

    def elements(self) -> Elements:
        size, C = math.prod(self.output_shape), self.output_shape[-1]
        return Elements(kept=size, of_weights=3 * PIXELS_OF_BLOCK * (-(-C // 16) * 16 + 2 * self.margin), gradient=size)

    def _scratch(self, C: int) -> Array:
        """Return the scratch, whose margins stay zero."""
        return self.kept.array("scratch", (3, PIXELS_OF_BLOCK, -(-C // 16) * 16 + 2 * self.margin))

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x = x
        y, C = self.kept.array("y", x.shape), x.shape[-1]
        forward(x.reshape(-1), y.reshape(-1), self._scratch(C), C, *self.numbers)
        return y

    def _backward(self, dy: Array) -> Array:
        dx, C = self.gradients.take(dy.shape), dy.shape[-1]
        flat = self.x.reshape(-1), dy.reshape(-1), dx.reshape(-1)
        backward(*flat, self._scratch(C), C, *self.numbers, self.coefficient)
        return dx
