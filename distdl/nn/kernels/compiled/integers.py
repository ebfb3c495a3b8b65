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


def _with_constant(operation: Any, name: str) -> None:
    """Define the operation of integers and a Python integer, the same for each lane."""

    @intrinsic
    def generated(typing: Any, x: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
            first = builder.insert_element(
                ir.Constant(_INTEGERS, ir.Undefined), builder.trunc(given[1], _I32), ir.Constant(_I32, 0)
            )
            every = builder.shuffle_vector(first, first, ir.Constant(_INTEGERS, [0] * WIDTH))
            return getattr(builder, name)(given[0], every)

        return integers(integers, types.int64), generate

    def typed(x, y):
        if isinstance(x, IntegersType) and isinstance(y, types.Integer):
            return lambda x, y: generated(x, y)  # noqa: PLW0108
        return None

    overload(operation)(typed)


for _operation, _name in (
    (operator.lshift, "shl"),
    (operator.rshift, "ashr"),
    (operator.and_, "and_"),
    (operator.add, "add"),
):
    _with_constant(_operation, _name)


def _of_two(operation: Any, name: str) -> None:
    @intrinsic
    def generated(typing: Any, x: Any, y: Any) -> Any:
        return integers(integers, integers), lambda context, builder, kind, given: getattr(builder, name)(*given)

    def typed(x, y):
        if isinstance(x, IntegersType) and isinstance(y, IntegersType):
            return lambda x, y: generated(x, y)  # noqa: PLW0108
        return None

    overload(operation)(typed)


for _operation, _name in ((operator.sub, "sub"), (operator.or_, "or_")):
    _of_two(_operation, _name)
