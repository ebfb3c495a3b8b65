"""Compiled batch normalization, with the sum of a residual block and the ReLU that follow it.

With the moments over all pixels of the micro-batch: ``scale = gamma / sqrt(variance + epsilon)``,
``y = (x - mean) scale + beta (+ addend) (ReLU)``. Backward, with g = dy where the ReLU passes it, M pixels and
``n = (x - mean) / sqrt(variance + epsilon)``:
``d_beta = sum of g``, ``d_gamma = sum of g n``, ``dx = scale (g - d_beta / M - n d_gamma / M)``.

Two passes over memory forward (moments, output) and two backward (sums, gradient): n is computed again, not kept.
The order of operations:

- Sums over pixels: see `sums`. With S and Q the sums of x and of its squares, the moments are ``mean = S / M`` and
  ``variance = max((Q - S S / M) / M, 0)`` in float64; each is then rounded to float32.
- ``inverse = 1 / sqrt(variance + epsilon)`` and ``scale = inverse gamma`` in float32.
- ``y``: ``fma(x - mean, scale, beta)``, then the addend, then the ReLU.
- ``d_beta`` is the float64 sum, ``d_gamma`` that of ``g (x - mean)`` times inverse; each is then rounded to float32.
- ``dx``: ``fma(g, scale, fma(x - mean, a, b))`` with ``a = -scale inverse (sum of g (x - mean)) inverse / M`` and
  ``b = -scale d_beta / M``, computed from left to right in float64 and rounded to float32.
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numba import njit

from distdl.nn.activations import ReLU
from distdl.nn.kernels.compiled.arrays import is_streamed, scratch
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import (
    fma,
    greater,
    load,
    load_bits,
    load_lanes,
    maximum,
    select,
    splat,
    store,
    store_bits,
    store_lanes,
    stream,
)
from distdl.nn.kernels.compiled.sums import (
    add_wide,
    line_length,
    products_of_group,
    square,
    squares_of_group,
    sum_of_group,
    sum_of_positions,
    widen,
)
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layers import Array, Layer
from distdl.nn.normalization import BatchNorm
from distdl.rng import Key

f4, f8 = np.float32, np.float64


# ---------------------------------------------------------------------------------------------------------- kernels


@njit(inline="always")
def _output(x, addend, y, bits, i, mean, scale, beta, lanes, add, relu, streamed):
    v = fma(load_lanes(x, i, lanes) - mean, scale, beta)
    if add:
        v = v + load_lanes(addend, i, lanes)
    if relu:
        zero = splat(f4(0))
        v = maximum(v, zero)
        store_bits(bits, i >> 4, greater(v, zero))
    if streamed and lanes >= 16:
        stream(y, i, v)
    else:
        store_lanes(y, i, v, lanes)


@kernel
def write_output(x_, addend_, y_, bits_, lines_, add, relu, streamed):
    """Write y for the lines of mean, scale and beta; see `forward`."""
    x, addend, y, lines = x_.ctypes.data, addend_.ctypes.data, y_.ctypes.data, lines_.ctypes.data
    bits, size, L = bits_.ctypes.data, x_.size, lines_.shape[1]
    whole = size // L * L
    for o in range(0, whole, L):
        for p in range(0, L, 16):
            mean, scale, beta = load(lines, p), load(lines, L + p), load(lines, 2 * L + p)
            _output(x, addend, y, bits, o + p, mean, scale, beta, 16, add, relu, streamed)
    for i in range(whole, size, 16):
        p = i - whole
        mean, scale, beta = load(lines, p), load(lines, L + p), load(lines, 2 * L + p)
        _output(x, addend, y, bits, i, mean, scale, beta, size - i, add, relu, streamed)


@njit(inline="always")
def _fill_lines(lines_, row, values_):
    C = values_.size
    for first in range(0, lines_.shape[1], C):
        for c in range(C):
            lines_[row, first + c] = values_[c]


@kernel
def forward(
    x_, addend_, gamma_, beta_, y_, bits_, lines_, totals_, channels_, sums_, squares_, epsilon, add, relu,
    streamed,
):  # fmt: skip
    """Write y for the moments of x; write the moments' sums: of x and the count (C + 1,), and of squares (C,).

    The scratch: lines (5, L) float32, totals (2 L,) float64. `channels` (3, C) receives mean, inverse and scale. With
    `relu`, `bits` receives for each 16 elements the comparisons ``y > 0``. The addend is read only with `add`.
    With `streamed`, y is written past the caches.
    """
    x, totals, size, L, C = x_.ctypes.data, totals_.ctypes.data, x_.size, lines_.shape[1], gamma_.size
    totals_[:] = 0
    eighth = splat(f4(0.125))
    whole = size // (8 * L) * (8 * L)
    for o in range(0, whole, 8 * L):
        for i in range(o, o + L, 16):
            x0, x1, x2, x3 = load(x, i), load(x, i + L), load(x, i + 2 * L), load(x, i + 3 * L)
            x4, x5, x6, x7 = load(x, i + 4 * L), load(x, i + 5 * L), load(x, i + 6 * L), load(x, i + 7 * L)
            total = sum_of_group(x0, x1, x2, x3, x4, x5, x6, x7)
            m = total * eighth
            x0, x1, x2, x3, x4, x5, x6, x7 = x0 - m, x1 - m, x2 - m, x3 - m, x4 - m, x5 - m, x6 - m, x7 - m
            about_m = products_of_group(x0, x1, x2, x3, x4, x5, x6, x7, x0, x1, x2, x3, x4, x5, x6, x7)
            add_wide(totals, i - o, widen(total))
            add_wide(totals, L + i - o, squares_of_group(about_m, total))
    for o in range(whole, size, L):
        for i in range(o, min(o + L, size), 16):
            v = load_lanes(x, i, size - i)
            add_wide(totals, i - o, widen(v))
            add_wide(totals, L + i - o, square(v))
    M = f8(size // C)
    for c in range(C):
        total, squares = sum_of_positions(totals_, 0, L, c, C), sum_of_positions(totals_, L, L, c, C)
        sums_[c], squares_[c] = total, squares
        variance = (squares - total * total / M) / M
        if variance < 0:
            variance = 0.0
        channels_[0, c] = f4(total / M)
        channels_[1, c] = f4(1) / np.sqrt(f4(variance) + f4(epsilon))
        channels_[2, c] = channels_[1, c] * gamma_[c]
    sums_[C] = M
    _fill_lines(lines_, 0, channels_[0])
    _fill_lines(lines_, 1, channels_[2])
    _fill_lines(lines_, 2, beta_)
    write_output(x_, addend_, y_, bits_, lines_, add, relu, streamed)


@kernel
def evaluate(x_, addend_, mean_, variance_, gamma_, beta_, y_, bits_, lines_, channels_, epsilon, add, relu, streamed):
    """Write y for the given moments; see `forward`."""
    for c in range(gamma_.size):
        channels_[0, c] = mean_[c]
        channels_[1, c] = f4(1) / np.sqrt(variance_[c] + f4(epsilon))
        channels_[2, c] = channels_[1, c] * gamma_[c]
    _fill_lines(lines_, 0, channels_[0])
    _fill_lines(lines_, 1, channels_[2])
    _fill_lines(lines_, 2, beta_)
    write_output(x_, addend_, y_, bits_, lines_, add, relu, streamed)


@njit(inline="always")
def _passed(dy, bits, i, lanes, relu):
    g = load_lanes(dy, i, lanes)
    if relu:
        g = select(load_bits(bits, i >> 4), g, splat(f4(0)))
    return g


@njit(inline="always")
def _write_gradient(x, dy, dx, bits, i, mean, scale, a, b, lanes, relu):
    g = _passed(dy, bits, i, lanes, relu)
    store_lanes(dx, i, fma(g, scale, fma(load_lanes(x, i, lanes) - mean, a, b)), lanes)


@kernel
def backward(x_, dy_, bits_, lines_, totals_, channels_, masked_, dx_, d_gamma_, d_beta_, relu, keep):
    """Write dx, d_gamma and d_beta; with `keep`, write g to `masked`. The arrays are those of `forward`."""
    x, dy, dx, masked = x_.ctypes.data, dy_.ctypes.data, dx_.ctypes.data, masked_.ctypes.data
    totals, lines, bits = totals_.ctypes.data, lines_.ctypes.data, bits_.ctypes.data
    size, L, C = x_.size, lines_.shape[1], d_gamma_.size
    totals_[:] = 0
    _fill_lines(lines_, 0, channels_[0])
    whole = size // (8 * L) * (8 * L)
    for o in range(0, whole, 8 * L):
        for i in range(o, o + L, 16):
            g0, g1 = _passed(dy, bits, i, 16, relu), _passed(dy, bits, i + L, 16, relu)
            g2, g3 = _passed(dy, bits, i + 2 * L, 16, relu), _passed(dy, bits, i + 3 * L, 16, relu)
            g4, g5 = _passed(dy, bits, i + 4 * L, 16, relu), _passed(dy, bits, i + 5 * L, 16, relu)
            g6, g7 = _passed(dy, bits, i + 6 * L, 16, relu), _passed(dy, bits, i + 7 * L, 16, relu)
            if keep:
                store(masked, i, g0)
                store(masked, i + L, g1)
                store(masked, i + 2 * L, g2)
                store(masked, i + 3 * L, g3)
                store(masked, i + 4 * L, g4)
                store(masked, i + 5 * L, g5)
                store(masked, i + 6 * L, g6)
                store(masked, i + 7 * L, g7)
            mean = load(lines, i - o)
            x0, x1 = load(x, i) - mean, load(x, i + L) - mean
            x2, x3 = load(x, i + 2 * L) - mean, load(x, i + 3 * L) - mean
            x4, x5 = load(x, i + 4 * L) - mean, load(x, i + 5 * L) - mean
            x6, x7 = load(x, i + 6 * L) - mean, load(x, i + 7 * L) - mean
            add_wide(totals, i - o, widen(sum_of_group(g0, g1, g2, g3, g4, g5, g6, g7)))
            products = products_of_group(g0, g1, g2, g3, g4, g5, g6, g7, x0, x1, x2, x3, x4, x5, x6, x7)
            add_wide(totals, L + i - o, widen(products))
    for o in range(whole, size, L):
        for i in range(o, min(o + L, size), 16):
            g = _passed(dy, bits, i, size - i, relu)
            if keep:
                store_lanes(masked, i, g, size - i)
            centred = load_lanes(x, i, size - i) - load_lanes(lines, i - o, size - i)
            add_wide(totals, i - o, widen(g))
            add_wide(totals, L + i - o, widen(g * centred))
    M = f8(size // C)
    for c in range(C):
        total, products = sum_of_positions(totals_, 0, L, c, C), sum_of_positions(totals_, L, L, c, C)
        inverse, scale = f8(channels_[1, c]), f8(channels_[2, c])
        d_beta_[c] = f4(total)
        d_gamma_[c] = f4(products * inverse)
        a, b = f4(-scale * inverse * products * inverse / M), f4(-scale * total / M)
        for p in range(c, L, C):
            lines_[1, p], lines_[3, p], lines_[4, p] = channels_[2, c], a, b
    whole = size // L * L
    for o in range(0, whole, L):
        for p in range(0, L, 16):
            mean, scale_, a_, b_ = load(lines, p), load(lines, L + p), load(lines, 3 * L + p), load(lines, 4 * L + p)
            _write_gradient(x, dy, dx, bits, o + p, mean, scale_, a_, b_, 16, relu)
    for i in range(whole, size, 16):
        p = i - whole
        mean, scale_, a_, b_ = load(lines, p), load(lines, L + p), load(lines, 3 * L + p), load(lines, 4 * L + p)
        _write_gradient(x, dy, dx, bits, i, mean, scale_, a_, b_, size - i, relu)


# ---------------------------------------------------------------------------------------------------------- layers


def batch_norm_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of a BatchNorm and of the ReLU that follows it, if any."""
    relu = len(layers) > 1 and type(layers[1]) is ReLU
    return CompiledBatchNorm(layers[: 1 + relu], names[0], relu=relu)


class CompiledBatchNorm(CompiledLayers):
    """A BatchNorm, with the sum of a residual block and a ReLU if wanted.

    The layer in front keeps x, so that this layer keeps y and one bit per element only. A residual block whose body
    ends with this layer sets `relu` and `keeps_masked` once, and `addend` before each forward.
    """

    def __init__(self, layers: Sequence[Layer], name: str, *, relu: bool) -> None:
        super().__init__(layers, name, layers[0].input_shape)
        self.norm = cast("BatchNorm", layers[0])
        self.relu = relu
        self.addend: Array | None = None
        #: Whether backward takes `masked`, the gradient in front of the ReLU; the residual block releases it.
        self.keeps_masked = False
        self.L = line_length(self.norm.channels)

    def elements(self) -> Elements:
        size = math.prod(self.output_shape)
        return Elements(
            kept=size * (1 + self.relu / 32),
            of_weights=3 * self.norm.channels,
            gradient=size,
            scratch=(5 + 4) * self.L,
        )

    def _scratch(self) -> tuple[Array, Array]:
        return scratch("lines", 5 * self.L).reshape(5, self.L), scratch("totals", 4 * self.L).view(np.float64)

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        norm = self.norm
        self.x, self.training = x, training
        y = self.kept.array("y", x.shape)
        self.bits = self.kept.array("bits", (-(-x.size // 16) if self.relu else 0,), np.uint16)
        self.channels = self.kept.array("channels", (3, norm.channels))
        add = self.addend is not None
        addend = x if self.addend is None else self.addend
        lines, totals = self._scratch()
        gamma, beta, epsilon = norm.parameters["gamma"], norm.parameters["beta"], norm.epsilon
        flat, flat_addend, flat_y = x.reshape(-1), addend.reshape(-1), y.reshape(-1)
        if training:
            forward(
                flat, flat_addend, gamma, beta, flat_y, self.bits, lines, totals, self.channels,
                norm.statistics["mean"], norm.statistics["variance"], epsilon, add, self.relu, is_streamed(y),
            )  # fmt: skip
        else:
            evaluate(
                flat, flat_addend, norm.buffers["mean"], norm.buffers["variance"], gamma, beta, flat_y, self.bits,
                lines, self.channels, epsilon, add, self.relu, is_streamed(y),
            )  # fmt: skip
        return y

    def _backward(self, dy: Array) -> Array:
        if not self.training:
            raise ValueError("BatchNorm: backward follows a forward in evaluation; call forward with training=True")
        keep = self.keeps_masked and self.relu
        self.masked = self.gradients.take(dy.shape) if keep else dy
        dx = self.gradients.take(dy.shape)
        backward(
            self.x.reshape(-1), dy.reshape(-1), self.bits, *self._scratch(), self.channels, self.masked.reshape(-1),
            dx.reshape(-1), self.norm.gradients["gamma"], self.norm.gradients["beta"], self.relu, keep,
        )  # fmt: skip
        return dx
