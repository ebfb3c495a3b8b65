"""Compiled sigmoid, hyperbolic tangent and softmax; see `functions` for the functions of an element.

The order of operations:

- Backward, without fused multiply-adds: sigmoid ``dx = ((1 - y) y) dy``, tanh ``dx = (1 - y y) dy``.
- Softmax: ``e[k] = exp(x[k] - m)`` with the maximum m, or NaN if some x is NaN; then ``y[k] = e[k] / s``.
  Backward: ``dx[k] = (dy[k] - t) y[k]``.
- The sums ``s`` of e[k] and ``t`` of y[k] dy[k]: lane j of 16 adds the elements k = j, j + 16, ... to 0, in this order;
  then the lanes are added to 0 in order.

M rows, K elements of a row.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numba import njit

from distdl.nn.activations import Sigmoid, Softmax, Tanh
from distdl.nn.kernels.compiled import functions
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.functions import exp
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import load, load_lanes, maximum, splat, store, store_lanes
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layers import Array, Layer
from distdl.rng import Key

f4 = np.float32


@kernel
def sigmoid(x_, y_):
    """Write the sigmoid of each element."""
    x, y, size = x_.ctypes.data, y_.ctypes.data, x_.size
    for i in range(0, size, 16):
        store_lanes(y, i, functions.sigmoid(load_lanes(x, i, size - i)), size - i)


@kernel
def sigmoid_backward(y_, dy_, dx_):
    """Write the gradient of the input."""
    y, dy, dx, size, one = y_.ctypes.data, dy_.ctypes.data, dx_.ctypes.data, y_.size, splat(f4(1))
    for i in range(0, size, 16):
        lanes = size - i
        v = load_lanes(y, i, lanes)
        store_lanes(dx, i, (one - v) * v * load_lanes(dy, i, lanes), lanes)


@kernel
def tanh(x_, y_):
    """Write the hyperbolic tangent of each element."""
    x, y, size = x_.ctypes.data, y_.ctypes.data, x_.size
    for i in range(0, size, 16):
        store_lanes(y, i, functions.tanh(load_lanes(x, i, size - i)), size - i)


@kernel
def tanh_backward(y_, dy_, dx_):
    """Write the gradient of the input."""
    y, dy, dx, size, one = y_.ctypes.data, dy_.ctypes.data, dx_.ctypes.data, y_.size, splat(f4(1))
    for i in range(0, size, 16):
        lanes = size - i
        v = load_lanes(y, i, lanes)
        store_lanes(dx, i, (one - v * v) * load_lanes(dy, i, lanes), lanes)


@njit(inline="always")
def _sum_of_lanes(sums, lanes_):
    store(lanes_.ctypes.data, 0, sums)
    total = f4(0)
    for lane in range(16):
        total += lanes_[lane]
    return splat(total)


@njit(inline="always")
def _greatest(x, row_, o, K, lanes_):
    if K < 16:
        return functions.greatest_number(row_)
    most = load(x, o + K - 16)
    for k in range(0, K - 16, 16):
        most = maximum(load(x, o + k), most)
    store(lanes_.ctypes.data, 0, most)
    return functions.greatest_number(lanes_)


@kernel
def softmax(x_, y_):
    """Write the softmax of each row (M, K)."""
    M, K = x_.shape
    x, y, lanes_ = x_.ctypes.data, y_.ctypes.data, np.empty(16, np.float32)
    for m in range(M):
        greatest = _greatest(x, x_[m], m * K, K, lanes_)
        shift, sums = splat(greatest), splat(f4(0))
        for k in range(0, K, 16):
            lanes, o = K - k, m * K + k
            store_lanes(y, o, exp(load_lanes(x, o, lanes) - shift), lanes)
            sums = sums + load_lanes(y, o, lanes)
        total = _sum_of_lanes(sums, lanes_)
        for k in range(0, K, 16):
            lanes, o = K - k, m * K + k
            store_lanes(y, o, load_lanes(y, o, lanes) / total, lanes)


@kernel
def softmax_backward(y_, dy_, dx_):
    """Write the gradient of the input (M, K)."""
    M, K = y_.shape
    y, dy, dx, lanes_ = y_.ctypes.data, dy_.ctypes.data, dx_.ctypes.data, np.empty(16, np.float32)
    for m in range(M):
        sums = splat(f4(0))
        for k in range(0, K, 16):
            lanes, o = K - k, m * K + k
            sums = sums + load_lanes(y, o, lanes) * load_lanes(dy, o, lanes)
        total = _sum_of_lanes(sums, lanes_)
        for k in range(0, K, 16):
            lanes, o = K - k, m * K + k
            store_lanes(dx, o, (load_lanes(dy, o, lanes) - total) * load_lanes(y, o, lanes), lanes)


def sigmoid_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers:
    """Return the implementation of the sigmoid, tanh or softmax at the first of these layers."""
    return CompiledActivation(layers[0], names[0], *_KERNELS[type(layers[0])])


_KERNELS: dict[type[Layer], tuple[Callable[..., None], Callable[..., None], bool]] = {
    Sigmoid: (sigmoid, sigmoid_backward, False),
    Tanh: (tanh, tanh_backward, False),
    Softmax: (softmax, softmax_backward, True),
}


class CompiledActivation(CompiledLayers):
    """A layer whose gradient follows from its output; its kernels take all elements, or `by_row` the last axis."""

    def __init__(
        self, layer: Layer, name: str, forward: Callable[..., None], backward: Callable[..., None], by_row: bool
    ) -> None:
        super().__init__([layer], name, layer.input_shape)
        self._kernels, self._by_row = (forward, backward), by_row

    def elements(self) -> Elements:
        size = math.prod(self.output_shape)
        return Elements(kept=size, gradient=size)

    def _flat(self, x: Array) -> Array:
        return x.reshape(-1, x.shape[-1]) if self._by_row else x.reshape(-1)

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.y = self.kept.array("y", x.shape)
        self._kernels[0](self._flat(x), self._flat(self.y))
        return self.y

    def _backward(self, dy: Array) -> Array:
        dx = self.gradients.take(dy.shape)
        self._kernels[1](self._flat(self.y), self._flat(dy), self._flat(dx))
        return dx
