"""Compiled pooling over images (N, H, W, C); see `distdl.nn.windows` for the names of sizes.

The element (i, j) of a window has the number ``i FW + j``. The order of operations:

- Max-pooling: the elements inside the image in ascending order, by `maximum`. The winner is the first maximum; its
  number is kept as one byte per output. A window with NaN has no winner (`NO_WINNER`).
- Backward: each pixel begins with 0 and adds the gradients of the windows that it won, in the order of its number in
  the window, ascending.
- Average pooling: begins with 0, adds the elements inside the image in ascending order, and multiplies the sum by
  ``1 / (FH FW)``, rounded to float32. Backward: each pixel begins with 0 and adds ``dy / (FH FW)`` in the same order.
- Global average pooling: begins with 0, adds the pixels in ascending order, and divides by ``H W``. Backward: ``dy``
  times ``1 / (H W)``, rounded to float32.
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numba import njit

from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import (
    equal_bytes,
    greater,
    greater_equal,
    load_bytes,
    load_lanes,
    maximum,
    select,
    select_bytes,
    splat,
    splat_byte,
    store_bytes,
    store_lanes,
)
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layers import Array, Layer
from distdl.nn.pooling import AvgPool2d, MaxPool2d
from distdl.rng import Key

f4 = np.float32
NO_WINNER = 255


# ---------------------------------------------------------------------------------------------------------- kernels


@njit(inline="always")
def _winner(x, first, row, C, lanes, i0, i1, j0, j1, FW):
    """Return the maximum and the number of the winner; `first` is the place of the window's element (0, 0)."""
    best, number = load_lanes(x, first + i0 * row + j0 * C, lanes), splat_byte(i0 * FW + j0)
    for i in range(i0, i1):
        for j in range(j0, j1):
            v = load_lanes(x, first + i * row + j * C, lanes)
            number = select_bytes(greater(v, best), splat_byte(i * FW + j), number)
            best = maximum(best, v)
    return best, select_bytes(greater_equal(best, best), number, splat_byte(NO_WINNER))


@kernel
def max_forward(x_, y_, winners_, FH, FW, SH, SW, PH, PW):
    """Write the maxima y (N, OH, OW, C), and the numbers of the winners (windows, vectors of C, 16)."""
    N, H, W, C = x_.shape
    _, OH, OW, _ = y_.shape
    x, y, winners, row = x_.ctypes.data, y_.ctypes.data, winners_.ctypes.data, W * C
    vectors = (C + 15) // 16
    for n in range(N):
        for oh in range(OH):
            h0 = oh * SH - PH
            i0, i1 = max(0, -h0), min(FH, H - h0)
            for ow in range(OW):
                w0 = ow * SW - PW
                j0, j1 = max(0, -w0), min(FW, W - w0)
                window, first = (n * OH + oh) * OW + ow, ((n * H + h0) * W + w0) * C
                whole = (i1 - i0) * (j1 - j0) == FH * FW
                for k in range(vectors):
                    c = 16 * k
                    if whole and FH == 3 and FW == 3:
                        best, number = _winner(x, first + c, row, C, C - c, 0, 3, 0, 3, 3)
                    elif whole and FH == 2 and FW == 2:
                        best, number = _winner(x, first + c, row, C, C - c, 0, 2, 0, 2, 2)
                    else:
                        best, number = _winner(x, first + c, row, C, C - c, i0, i1, j0, j1, FW)
                    store_lanes(y, window * C + c, best, C - c)
                    store_bytes(winners, 16 * (window * vectors + k), number)


@njit(inline="always")
def _windows(h, F, S, P, O):
    """Return the first and the last window, of O, that contain the pixel h along one axis."""
    if S == 1:
        return max(0, h + P - F + 1), min(O - 1, h + P)
    if S == 2:  # a shift rounds down as the division does, and is faster
        return max(0, (h + P - F + 2) >> 1), min(O - 1, (h + P) >> 1)
    return max(0, (h + P - F + S) // S), min(O - 1, (h + P) // S)


@njit(inline="always")
def _won_by(dy, winners, first, row, vectors, C, k, FH, FW):
    """Return the gradient of a pixel that is in FH FW windows, with stride 1; it is element (0, 0) of `first`."""
    total = splat(f4(0))
    for i in range(FH):
        for j in range(FW):
            window = first - i * row - j
            won = equal_bytes(load_bytes(winners, 16 * (window * vectors + k)), splat_byte(i * FW + j))
            total = total + select(won, load_lanes(dy, window * C + 16 * k, C - 16 * k), splat(f4(0)))
    return total


@kernel
def max_backward(dy_, winners_, dx_, FH, FW, SH, SW, PH, PW):
    """Write dx (N, H, W, C): each pixel gets the gradients of the windows that it won."""
    N, H, W, C = dx_.shape
    _, OH, OW, _ = dy_.shape
    dy, winners, dx = dy_.ctypes.data, winners_.ctypes.data, dx_.ctypes.data
    vectors, zero = (C + 15) // 16, splat(f4(0))
    for n in range(N):
        for h in range(H):
            oh0, oh1 = _windows(h, FH, SH, PH, OH)
            for w in range(W):
                ow0, ow1 = _windows(w, FW, SW, PW, OW)
                pixel = (n * H + h) * W + w
                if FH == 3 and FW == 3 and SH == 1 and SW == 1 and oh1 - oh0 == 2 and ow1 - ow0 == 2:
                    first = (n * OH + oh1) * OW + ow1
                    for k in range(vectors):
                        total = _won_by(dy, winners, first, OW, vectors, C, k, 3, 3)
                        store_lanes(dx, pixel * C + 16 * k, total, C - 16 * k)
                    continue
                for k in range(vectors):
                    c, total = 16 * k, zero
                    for oh in range(oh1, oh0 - 1, -1):
                        for ow in range(ow1, ow0 - 1, -1):
                            window = (n * OH + oh) * OW + ow
                            number = splat_byte((h + PH - oh * SH) * FW + w + PW - ow * SW)
                            won = equal_bytes(load_bytes(winners, 16 * (window * vectors + k)), number)
                            total = total + select(won, load_lanes(dy, window * C + c, C - c), zero)
                    store_lanes(dx, pixel * C + c, total, C - c)


@njit(inline="always")
def _sum_of_window(x, first, row, C, lanes, i0, i1, j0, j1):
    """Return the sum of a window; `first` is the place of its element (0, 0)."""
    total = splat(f4(0))
    for i in range(i0, i1):
        for j in range(j0, j1):
            total = total + load_lanes(x, first + i * row + j * C, lanes)
    return total


@kernel
def average_forward(x_, y_, FH, FW, SH, SW, PH, PW, share):
    """Write the means y (N, OH, OW, C); `share` is 1 / (FH FW)."""
    N, H, W, C = x_.shape
    _, OH, OW, _ = y_.shape
    x, y = x_.ctypes.data, y_.ctypes.data
    for n in range(N):
        for oh in range(OH):
            h0 = oh * SH - PH
            i0, i1 = max(0, -h0), min(FH, H - h0)
            for ow in range(OW):
                w0 = ow * SW - PW
                j0, j1 = max(0, -w0), min(FW, W - w0)
                first, whole = ((n * H + h0) * W + w0) * C, (i1 - i0) * (j1 - j0) == FH * FW
                for c in range(0, C, 16):
                    if whole and FH == 2 and FW == 2:
                        total = _sum_of_window(x, first + c, W * C, C, C - c, 0, 2, 0, 2)
                    else:
                        total = _sum_of_window(x, first + c, W * C, C, C - c, i0, i1, j0, j1)
                    store_lanes(y, ((n * OH + oh) * OW + ow) * C + c, total * splat(f4(share)), C - c)


@njit(inline="always")
def _spread(dy, dx, N, H, W, C, OH, OW, FH, FW, share):
    """Do the same as `average_backward` for windows that follow each other without padding.

    Pixels are written in ascending order, so a vector may extend into the next ones.
    """
    size, zero = N * H * W * C, splat(f4(0))
    for n in range(N):
        for h in range(H):
            window, at = (n * OH + h // FH) * OW * C, (n * H + h) * W * C
            inside = OW if h < OH * FH else 0
            for _ow in range(inside):
                for _j in range(FW):
                    for c in range(0, C, 16):
                        v = zero + load_lanes(dy, window + c, C - c) * splat(f4(share))
                        store_lanes(dx, at + c, v, 16 if at + c + 16 <= size else C - c)
                    at += C
                window += C
            for rest in range(at, (n * H + h + 1) * W * C, 16):
                store_lanes(dx, rest, zero, 16 if rest + 16 <= size else size - rest)


@kernel
def average_backward(dy_, dx_, FH, FW, SH, SW, PH, PW, share):
    """Write dx (N, H, W, C): each pixel gets its share of all windows that contain it."""
    N, H, W, C = dx_.shape
    _, OH, OW, _ = dy_.shape
    dy, dx = dy_.ctypes.data, dx_.ctypes.data
    if FH == SH and FW == SW and PH == 0 and PW == 0:
        _spread(dy, dx, N, H, W, C, OH, OW, FH, FW, share)
        return
    for n in range(N):
        for h in range(H):
            oh0, oh1 = _windows(h, FH, SH, PH, OH)
            for w in range(W):
                ow0, ow1 = _windows(w, FW, SW, PW, OW)
                for c in range(0, C, 16):
                    total = splat(f4(0))
                    for oh in range(oh1, oh0 - 1, -1):
                        for ow in range(ow1, ow0 - 1, -1):
                            d = load_lanes(dy, ((n * OH + oh) * OW + ow) * C + c, C - c)
                            total = total + d * splat(f4(share))
                    store_lanes(dx, ((n * H + h) * W + w) * C + c, total, C - c)


@kernel
def global_average_forward(x_, y_):
    """Write the means y (N, C) of x (N, H, W, C)."""
    N, H, W, C = x_.shape
    x, y, pixels = x_.ctypes.data, y_.ctypes.data, H * W
    for n in range(N):
        for c in range(0, C, 16):
            total = splat(f4(0))
            for pixel in range(pixels):
                total = total + load_lanes(x, (n * pixels + pixel) * C + c, C - c)
            store_lanes(y, n * C + c, total / splat(f4(pixels)), C - c)


@kernel
def global_average_backward(dy_, dx_):
    """Write dx (N, H, W, C): each pixel gets the same share of dy (N, C)."""
    N, H, W, C = dx_.shape
    dy, dx, pixels = dy_.ctypes.data, dx_.ctypes.data, H * W
    share = splat(f4(1.0 / pixels))
    for n in range(N):
        for pixel in range(pixels):
            for c in range(0, C, 16):
                store_lanes(dx, (n * pixels + pixel) * C + c, load_lanes(dy, n * C + c, C - c) * share, C - c)


# ---------------------------------------------------------------------------------------------------------- layers


def max_pool_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of a max-pooling, or None if its windows have too many elements for a byte."""
    window = cast("MaxPool2d", layers[0]).window
    return None if math.prod(window.kernel) > NO_WINNER else CompiledMaxPool(layers[:1], names[0])


def average_pool_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of an average pooling."""
    return CompiledAvgPool(layers[:1], names[0])


def global_average_pool_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of a global average pooling."""
    return CompiledGlobalAvgPool(layers[:1], names[0], layers[0].input_shape[2:])


class _CompiledPool(CompiledLayers):
    def __init__(self, layers: Sequence[Layer], name: str) -> None:
        pool = cast("MaxPool2d | AvgPool2d", layers[0])
        H, W, C = pool.input_shape
        self.numbers = (*pool.window.kernel, *pool.window.stride, *pool.window.padding)
        super().__init__(layers, name, (*pool.window.output_size((H, W)), C))

    def elements(self) -> Elements:
        return Elements(kept=math.prod(self.output_shape), gradient=math.prod(self.layers[0].input_shape))

    def _output(self, x: Array) -> Array:
        self.shape = x.shape
        return self.kept.array("y", (len(x), *self.output_shape))


class CompiledMaxPool(_CompiledPool):
    """A max-pooling, which keeps one byte per output."""

    def elements(self) -> Elements:
        *size, C = self.output_shape
        return super().elements() + Elements(kept=math.prod(size) * -(-C // 16) * 16 / 4)

    def _winners(self, y: Array) -> Array:
        N, OH, OW, C = y.shape
        return self.kept.array("winners", (N * OH * OW, -(-C // 16), 16), np.uint8)

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        y = self._output(x)
        max_forward(x, y, self._winners(y), *self.numbers)
        return y

    def _backward(self, dy: Array) -> Array:
        dx = self.gradients.take(self.shape)
        max_backward(dy, self._winners(dy), dx, *self.numbers)
        return dx


class CompiledAvgPool(_CompiledPool):
    """An average pooling."""

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        y = self._output(x)
        average_forward(x, y, *self.numbers, 1 / math.prod(self.numbers[:2]))
        return y

    def _backward(self, dy: Array) -> Array:
        dx = self.gradients.take(self.shape)
        average_backward(dy, dx, *self.numbers, 1 / math.prod(self.numbers[:2]))
        return dx


class CompiledGlobalAvgPool(CompiledLayers):
    """A global average pooling."""

    def elements(self) -> Elements:
        return Elements(kept=self.output_shape[0], gradient=math.prod(self.layers[0].input_shape))

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.shape = x.shape
        y = self.kept.array("y", (len(x), x.shape[3]))
        global_average_forward(x, y)
        return y

    def _backward(self, dy: Array) -> Array:
        dx = self.gradients.take(self.shape)
        global_average_backward(dy, dx)
        return dx
