"""Compiled joints of composites: the sum of a residual block with its ReLU, and the concatenation of branches.

The stacks inside run by their own kernels. All operations are elementwise or copies. The order of sums:

- Residual: body + shortcut, then the ReLU. Backward: the body's gradient + the shortcut's.
- Branches: the gradients of the branches in their order, ``((first + second) + third) + fourth``.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from numba import njit

from distdl.nn.activations import ReLU
from distdl.nn.composites import Composite, Residual
from distdl.nn.kernels.compiled.arrays import is_streamed
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.batch_norm import CompiledBatchNorm
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import (
    greater,
    load_bits,
    load_lanes,
    maximum,
    select,
    splat,
    store_bits,
    store_lanes,
    stream,
)
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layer_stack import LayerStack
from distdl.nn.layers import Array, Layer
from distdl.nn.working_memory import elements_of_stack
from distdl.rng import Key

f4 = np.float32


# ---------------------------------------------------------------------------------------------------------- kernels


@kernel
def add_with_relu(x_, z_, y_, bits_):
    """Write ``y = max(x + z, 0)``; `bits` receives for each 16 elements the comparisons ``y > 0``."""
    x, z, y, bits, size = x_.ctypes.data, z_.ctypes.data, y_.ctypes.data, bits_.ctypes.data, x_.size
    zero = splat(f4(0))
    for i in range(0, size, 16):
        v = maximum(load_lanes(x, i, size - i) + load_lanes(z, i, size - i), zero)
        store_bits(bits, i >> 4, greater(v, zero))
        store_lanes(y, i, v, size - i)


@kernel
def mask(dy_, bits_, g_):
    """Write ``g = dy`` where the bit is set, and 0 elsewhere."""
    dy, g, bits, size = dy_.ctypes.data, g_.ctypes.data, bits_.ctypes.data, dy_.size
    for i in range(0, size, 16):
        store_lanes(g, i, select(load_bits(bits, i >> 4), load_lanes(dy, i, size - i), splat(f4(0))), size - i)


@kernel
def add_masked(x_, dy_, bits_):
    """Add dy to x where the bit is set, and 0 elsewhere."""
    x, dy, bits, size = x_.ctypes.data, dy_.ctypes.data, bits_.ctypes.data, dy_.size
    for i in range(0, size, 16):
        g = select(load_bits(bits, i >> 4), load_lanes(dy, i, size - i), splat(f4(0)))
        store_lanes(x, i, load_lanes(x, i, size - i) + g, size - i)


@kernel
def add(x_, a_, b_, c_, count):
    """Add `count` arrays to x, up to three: a, then b, then c."""
    x, a, b, c, size = x_.ctypes.data, a_.ctypes.data, b_.ctypes.data, c_.ctypes.data, x_.size
    for i in range(0, size, 16):
        v = load_lanes(x, i, size - i) + load_lanes(a, i, size - i)
        if count > 1:
            v = v + load_lanes(b, i, size - i)
        if count > 2:
            v = v + load_lanes(c, i, size - i)
        store_lanes(x, i, v, size - i)


@njit(inline="always")
def _copy_run(source, s, to, t, width, streamed):
    for c in range(0, width, 16):
        v = load_lanes(source, s + c, width - c)
        if streamed:
            stream(to, t + c, v)
        else:
            store_lanes(to, t + c, v, width - c)


@kernel
def copy_into_columns(part_, whole_, first, streamed):
    """Copy a matrix into columns of a wider one, from column `first` on; if `streamed`, past the caches."""
    part, whole, (rows, width), columns = part_.ctypes.data, whole_.ctypes.data, part_.shape, whole_.shape[1]
    aligned = width % 16 == 0 and columns % 16 == 0 and first % 16 == 0
    for row in range(rows):
        _copy_run(part, row * width, whole, row * columns + first, width, streamed and aligned)


@kernel
def copy_columns(whole_, part_, first):
    """Copy columns of a matrix, from column `first` on, into a narrower one."""
    part, whole, (rows, width), columns = part_.ctypes.data, whole_.ctypes.data, part_.shape, whole_.shape[1]
    for row in range(rows):
        _copy_run(whole, row * columns + first, part, row * width, width, False)


# ---------------------------------------------------------------------------------------------------------- layers


def residual_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of a Residual and of the ReLU that follows it, if any."""
    relu = len(layers) > 1 and type(layers[1]) is ReLU
    return CompiledResidual(layers[: 1 + relu], names[0], relu=relu)


def branches_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of Branches."""
    return CompiledBranches(layers[:1], names[0])


class _CompiledComposite(CompiledLayers):
    """The base of composites; `stacks` are their branches in order.

    The arrays of gradients: a stack releases those inside, and its caller releases the argument and the result.
    """

    def __init__(self, layers: Sequence[Layer], name: str) -> None:
        self.composite = cast("Composite", layers[0])
        self.branch_names = [name for name, _ in self.composite.members]
        self.stacks: list[LayerStack] = [stack for _, stack in self.composite.members]
        shapes = [stack.shapes[-1] if stack.shapes else self.composite.input_shape for stack in self.stacks]
        self.widths = [shape[-1] for shape in shapes]
        joined = shapes[0] if isinstance(self.composite, Residual) else (*shapes[0][:-1], sum(self.widths))
        super().__init__(layers, name, joined)

    def elements(self) -> Elements:
        stacks = (elements_of_stack(stack, self.composite.input_shape) for stack in self.stacks)
        inside, own = sum(stacks, Elements()), self._own_elements()
        return replace(inside + own, gradient=inside.gradient + own.gradient)

    @abstractmethod
    def _own_elements(self) -> Elements:
        """Return the numbers of elements of the arrays outside of the stacks, in addition to those inside."""

    def _run(self, number: int, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the output of one branch as a contiguous array."""
        below = None if key is None else key.of(self.branch_names[number])
        return np.ascontiguousarray(self.stacks[number].forward(x, training=training, key=below))

    def _to_change(self, dx: Array, *others: Array) -> Array:
        """Return the gradient as an array that may change: a copy if it is a layer's own or one of the others."""
        if self.gradients.has(dx) and not any(np.may_share_memory(dx, other) for other in others):
            return dx
        copy = self.gradients.take(dx.shape)
        np.copyto(copy, dx)
        return copy


class CompiledResidual(_CompiledComposite):
    """A Residual, with the ReLU that follows it.

    If the body ends with a BatchNorm, its kernels also compute the sum and the ReLU: it takes the shortcut's output as
    its addend, and the shortcut takes the gradient in front of its ReLU.
    """

    def __init__(self, layers: Sequence[Layer], name: str, *, relu: bool) -> None:
        super().__init__(layers, name)
        self.relu = relu
        self.body, self.shortcut = self.stacks
        last = self.body.segments[-1][3]
        self.norm = last if isinstance(last, CompiledBatchNorm) and not last.relu else None
        if self.norm is not None:
            self.norm.relu, self.norm.keeps_masked = relu, bool(self.shortcut.layers)

    def _own_elements(self) -> Elements:
        y = math.prod(self.output_shape)
        has_own_gradient = self.relu if self.norm is None else bool(self.shortcut.layers)
        return Elements(kept=y * (1 + self.relu / 32) * (self.norm is None), gradient=y * has_own_gradient)

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        shortcut = self._run(1, x, training=training, key=key)
        if self.norm is not None:
            self.norm.addend = shortcut
            return self._run(0, x, training=training, key=key)
        body = self._run(0, x, training=training, key=key)
        y = self.kept.array("y", body.shape)
        if self.relu:
            add_with_relu(body.reshape(-1), shortcut.reshape(-1), y.reshape(-1), self._bits(y))
        else:
            np.add(body, shortcut, out=y)
        return y

    def _bits(self, y: Array) -> Array:
        return self.kept.array("bits", (-(-y.size // 16),), np.uint16)

    def _backward(self, dy: Array) -> Array | None:
        g = dy
        if self.norm is None and self.relu:
            g = self.gradients.take(dy.shape)
            mask(dy.reshape(-1), self._bits(dy), g.reshape(-1))
        body = self.body.backward(g)
        if self.norm is not None and self.norm.keeps_masked:
            g = self.norm.masked
        shortcut = self.shortcut.backward(g) if self.shortcut.layers else g
        dx = None
        if body is not None and shortcut is not None and self.composite.needs_input_gradient:
            dx = self._to_change(np.ascontiguousarray(body), dy, g, shortcut)
            if self.norm is not None and self.relu and not self.norm.keeps_masked:
                add_masked(dx.reshape(-1), dy.reshape(-1), self.norm.bits)
            else:
                np.add(dx, shortcut, out=dx)
        for gradient in (g, shortcut):
            if gradient is not None:
                self.gradients.release(gradient, dy)
        return dx


class CompiledBranches(_CompiledComposite):
    """Branches, which copy the channels of each branch in one run per pixel."""

    def _own_elements(self) -> Elements:
        x, y = math.prod(self.composite.input_shape), math.prod(self.output_shape)
        return Elements(kept=y, gradient=x * (len(self.stacks) - 1))

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        outputs = [self._run(number, x, training=training, key=key) for number in range(len(self.stacks))]
        y = self.kept.array("y", (len(x), *self.output_shape))
        rows, first = y.reshape(-1, y.shape[-1]), 0
        for part, width in zip(outputs, self.widths, strict=True):
            copy_into_columns(part.reshape(-1, width), rows, first, is_streamed(y))
            first += width
        return y

    def _backward(self, dy: Array) -> Array | None:
        rows, first, gradients = dy.reshape(-1, dy.shape[-1]), 0, []
        for stack, width in zip(self.stacks, self.widths, strict=True):
            part = self.gradients.take((*dy.shape[:-1], width))
            copy_columns(rows, part.reshape(-1, width), first)
            first += width
            dx = stack.backward(part)
            if dx is not None:
                gradients.append(np.ascontiguousarray(dx))
            self.gradients.release(part, dx)
        if not self.composite.needs_input_gradient:
            return None
        total, others = self._to_change(gradients[0]), gradients[1:]
        for start in range(0, len(others), 3):
            flat = [other.reshape(-1) for other in others[start : start + 3]]
            add(total.reshape(-1), *(flat + flat[:1] * 2)[:3], len(flat))
        for other in others:
            self.gradients.release(other)
        return total
