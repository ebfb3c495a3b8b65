"""Sums of channels and of their squares over all pixels of an array (..., C), accurate and in one pass over memory.

An array is a run of floats, cut into **lines** of L floats (`line_length`). L is a multiple of C and of 16, so position
p of each line belongs to channel ``p % C``. Eight lines that follow each other are a **group**. The order:

- Within a group, position p: ``((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))`` in float32.
- Over the groups: one chain in float64 for each position. Then the lines after the last whole group (the last of them
  may be shorter) are added one by one.
- Over the positions of a channel: one chain in float64, in ascending order.

The squares of a group are taken about its own mean, ``m = (sum of v) / 8`` in float32, so that no digits cancel:
``sum of v² = sum of (v - m)² + (sum of v)² / 8``. The last term and this sum are float64, the first is float32
(`products_of_group`). A line after the last whole group has the exact squares.
"""

import math
import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from distdl.nn.kernels.compiled.simd import fma, vector

#: Lines of a group, and the least number of floats in a line.
GROUP, LONG_LINE = 8, 512


def line_length(channels: int) -> int:
    """Return L: the least multiple of the channels and of 16, as often as it fits into 512 floats."""
    least = math.lcm(channels, 16)
    return least * max(1, LONG_LINE // least)


_I64, _WIDE = ir.IntType(64), ir.VectorType(ir.DoubleType(), 16)


class WideVectorType(types.Type):
    """The type of a vector of 16 float64 numbers."""

    def __init__(self) -> None:
        super().__init__(name="float64x16")


wide = WideVectorType()


@register_model(WideVectorType)
class _WideVectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _WIDE)


def _pointer(builder: Any, address: Any, offset: Any) -> Any:
    bytes_ = builder.mul(offset, ir.Constant(_I64, 8))
    return builder.inttoptr(builder.add(address, bytes_), _WIDE.as_pointer())


@intrinsic
def _load_wide(typing: Any, address: Any, offset: Any) -> Any:
    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return builder.load(_pointer(builder, *given), align=8, typ=_WIDE)

    return wide(types.int64, types.int64), generate


@intrinsic
def _store_wide(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        builder.store(given[2], _pointer(builder, *given[:2]), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, wide), generate


@intrinsic
def widen(typing: Any, x: Any) -> Any:
    """Return a vector of float32 numbers as float64."""
    return wide(vector), lambda context, builder, kind, given: builder.fpext(given[0], _WIDE)


@intrinsic
def _eighth(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return builder.fmul(given[0], ir.Constant(_WIDE, [0.125] * 16))

    return wide(wide), generate


def _overload(operation: Any, name: str) -> None:
    @intrinsic
    def implementation(typing: Any, x: Any, y: Any) -> Any:
        return wide(wide, wide), lambda context, builder, kind, given: getattr(builder, name)(*given)

    def typed(x, y):  # numba compares its signature with the lambda's
        if isinstance(x, WideVectorType) and isinstance(y, WideVectorType):
            return lambda x, y: implementation(x, y)  # noqa: PLW0108
        return None

    overload(operation)(typed)


_overload(operator.add, "fadd")
_overload(operator.mul, "fmul")


@njit(inline="always")
def add_wide(totals, p, value):
    """Add 16 float64 numbers to the totals from position p on; `totals` is the address of float64 numbers."""
    _store_wide(totals, p, _load_wide(totals, p) + value)


@njit(inline="always")
def sum_of_group(v0, v1, v2, v3, v4, v5, v6, v7):
    """Return the sum of eight vectors."""
    return ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))


@njit(inline="always")
def products_of_group(v0, v1, v2, v3, v4, v5, v6, v7, w0, w1, w2, w3, w4, w5, w6, w7):
    """Return the sum of eight products: four pairs ``v1 w1 + v0 w0`` with one rounding after the first product."""
    a, b = fma(v1, w1, v0 * w0), fma(v3, w3, v2 * w2)
    c, d = fma(v5, w5, v4 * w4), fma(v7, w7, v6 * w6)
    return (a + b) + (c + d)


@njit(inline="always")
def squares_of_group(squares, total):
    """Return the sum of squares of eight vectors, given that about their mean, and their sum."""
    t = widen(total)
    return widen(squares) + _eighth(t * t)


@njit(inline="always")
def square(v):
    """Return the exact square."""
    w = widen(v)
    return w * w


@njit(inline="always")
def sum_of_positions(totals_, first, length, channel, C):
    """Return the sum of the positions of one channel, from ``totals_[first + channel]`` on."""
    total = 0.0
    for p in range(channel, length, C):
        total += totals_[first + p]
    return total
