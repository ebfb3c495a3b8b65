"""Vectors of 16 int32 numbers, to take float32 numbers apart; see `simd`. Sums and shifts drop bits that do not fit."""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from distdl.nn.kernels.compiled.simd import WIDTH, vector

_I32 = ir.IntType(32)
_INTEGERS, _FLOATS = ir.VectorType(_I32, WIDTH), ir.VectorType(ir.FloatType(), WIDTH)


class IntegersType(types.Type):
    """The type of a vector of 16 int32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="int32x16")


integers = IntegersType()


@register_model(IntegersType)
class _IntegersModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _INTEGERS)


@intrinsic
def bits_of(typing: Any, x: Any) -> Any:
    """Return the bits of float32 numbers."""
    return integers(vector), lambda context, builder, kind, given: builder.bitcast(given[0], _INTEGERS)


@intrinsic
def from_bits(typing: Any, x: Any) -> Any:
    """Return the float32 numbers with these bits."""
    return vector(integers), lambda context, builder, kind, given: builder.bitcast(given[0], _FLOATS)


@intrinsic
def to_float(typing: Any, x: Any) -> Any:
    """Return the nearest float32 numbers."""
    return vector(integers), lambda context, builder, kind, given: builder.sitofp(given[0], _FLOATS)


@intrinsic
def splat_integer(typing: Any, number: Any) -> Any:
    """Return a vector that has the lowest 32 bits of this integer in each lane."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        undefined = ir.Constant(_INTEGERS, ir.Undefined)
        first = builder.insert_element(undefined, builder.trunc(given[0], _I32), ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(_INTEGERS, [0] * WIDTH))

    return integers(types.int64), generate


def _define(operation: Any, name: str) -> None:
    """Define the operation of integers and integers, or one Python integer for all lanes on the right."""

    @intrinsic
    def generated(typing: Any, x: Any, y: Any) -> Any:
        return integers(integers, integers), lambda context, builder, kind, given: getattr(builder, name)(*given)

    def typed(x, y):
        if not isinstance(x, IntegersType):
            return None
        if isinstance(y, types.Integer):
            return lambda x, y: generated(x, splat_integer(y))
        return lambda x, y: generated(x, y)  # noqa: PLW0108

    overload(operation)(typed)


for _operation, _name in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.lshift, "shl"),
    (operator.rshift, "ashr"),
):
    _define(_operation, _name)
