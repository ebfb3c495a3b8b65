"""Compiled ReLU, leaky ReLU and dropout: one pass over memory each way; all operations are elementwise.

- ReLU: ``y = maximum(x, 0)``; ``dx = dy`` where ``y > 0``, else 0.
- Leaky ReLU: ``y = x`` where ``x > 0``, else ``slope x``; ``dx = dy`` where ``y > 0``, else ``slope dy``. The slope is
  not negative, so y has the sign of x.
- Dropout: ``y = x scale`` where the mask is set, else 0, with ``scale = 1 / (1 - ratio)`` rounded to float32. The mask
  is that of `Key.mask`.
"""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np

from distdl.nn.activations import LeakyReLU
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import (
    greater,
    load_bits,
    load_lanes,
    maximum,
    select,
    splat,
    store_lanes,
)
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layers import Array, Dropout, Layer
from distdl.rng import Key

f4 = np.float32


# ---------------------------------------------------------------------------------------------------------- kernels


@kernel
def relu(x_, y_):
    """Write the ReLU of x to y."""
    x, y, size = x_.ctypes.data, y_.ctypes.data, x_.size
    for i in range(0, size, 16):
        store_lanes(y, i, maximum(load_lanes(x, i, size - i), splat(f4(0))), size - i)


@kernel
def pass_positive(y_, dy_, dx_):
    """Write dy where y is positive, and 0 elsewhere."""
    y, dy, dx, size = y_.ctypes.data, dy_.ctypes.data, dx_.ctypes.data, y_.size
    zero = splat(f4(0))
    for i in range(0, size, 16):
        positive = greater(load_lanes(y, i, size - i), zero)
        store_lanes(dx, i, select(positive, load_lanes(dy, i, size - i), zero), size - i)


@kernel
def scale_negative(sign_, d_, to_, slope):
    """Write d where `sign` is positive, and ``slope d`` elsewhere."""
    sign, d, to, size = sign_.ctypes.data, d_.ctypes.data, to_.ctypes.data, d_.size
    factor, zero = splat(f4(slope)), splat(f4(0))
    for i in range(0, size, 16):
        v = load_lanes(d, i, size - i)
        positive = greater(load_lanes(sign, i, size - i), zero)
        store_lanes(to, i, select(positive, v, v * factor), size - i)


@kernel
def masked(x_, bits_, y_, scale):
    """Write ``y = x scale`` where the mask is set, and 0 elsewhere."""
    x, bits, y, size = x_.ctypes.data, bits_.ctypes.data, y_.ctypes.data, x_.size
    factor, zero = splat(f4(scale)), splat(f4(0))
    for i in range(0, size, 16):
        v = load_lanes(x, i, size - i) * factor
        store_lanes(y, i, select(load_bits(bits, i >> 4), v, zero), size - i)


# ---------------------------------------------------------------------------------------------------------- layers


def relu_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of a ReLU that no layer in front of it takes."""
    return CompiledReLU(layers[:1], names[0], layers[0].input_shape)


def leaky_relu_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of a leaky ReLU."""
    return CompiledLeakyReLU(layers[:1], names[0], layers[0].input_shape)


def dropout_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of a dropout."""
    return CompiledDropout(layers[:1], names[0], layers[0].input_shape)


class CompiledReLU(CompiledLayers):
    """A ReLU."""

    def elements(self) -> Elements:
        size = math.prod(self.output_shape)
        return Elements(kept=size, gradient=size)

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.y = self.kept.array("y", x.shape)
        relu(x.reshape(-1), self.y.reshape(-1))
        return self.y

    def _backward(self, dy: Array) -> Array:
        dx = self.gradients.take(dy.shape)
        pass_positive(self.y.reshape(-1), dy.reshape(-1), dx.reshape(-1))
        return dx


class CompiledLeakyReLU(CompiledLayers):
    """A leaky ReLU."""

    def elements(self) -> Elements:
        size = math.prod(self.output_shape)
        return Elements(kept=size, gradient=size)

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.slope = float(cast("LeakyReLU", self.layers[0]).slope)
        self.y = self.kept.array("y", x.shape)
        scale_negative(x.reshape(-1), x.reshape(-1), self.y.reshape(-1), self.slope)
        return self.y

    def _backward(self, dy: Array) -> Array:
        dx = self.gradients.take(dy.shape)
        scale_negative(self.y.reshape(-1), dy.reshape(-1), dx.reshape(-1), self.slope)
        return dx


class CompiledDropout(CompiledLayers):
    """A dropout, which keeps one bit per element."""

    def elements(self) -> Elements:
        size = math.prod(self.output_shape)
        return Elements(kept=size * (1 + 1 / 32), gradient=size)

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        ratio = cast("Dropout", self.layers[0]).ratio
        self.training = training
        if not training:
            return x
        if key is None:
            raise ValueError("Dropout draws random numbers in training: pass key=Key(seed).of(...) to forward")
        self.bits = self.kept.array("bits", (-(-x.size // 16),), np.uint16)
        packed = np.packbits(key.mask(x.size, 1 - ratio), bitorder="little")
        self.bits.view(np.uint8)[: len(packed)] = packed
        self.scale = 1 / (1 - ratio)
        return self._masked(x, self.kept.array("y", x.shape))

    def _backward(self, dy: Array) -> Array:
        return self._masked(dy, self.gradients.take(dy.shape)) if self.training else dy

    def _masked(self, x: Array, to: Array) -> Array:
        masked(x.reshape(-1), self.bits, to.reshape(-1), self.scale)
        return to
