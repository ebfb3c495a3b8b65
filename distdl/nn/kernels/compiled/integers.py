"""Vectors of 16 int32 numbers, to take float32 numbers apart; see `simd`. Sums and shifts drop bits that do not fit."""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from distdl.nn.kernels.compiled.simd import WIDTH, vector

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_INTEGERS, _FLOATS = ir.VectorType(_I32, WIDTH), ir.VectorType(ir.FloatType(), WIDTH)
_LONGS = ir.VectorType(ir.IntType(64), WIDTH)
_MAGNITUDE, _MANTISSA, _SIGN = 0x7FFFFFFF, 0x7FFFFF, 0x80000000
#: A factor of `subnormal_product` is a multiple of 1 / 2^24.
FACTOR_BITS = 24


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


def _all(kind: Any, number: int) -> Any:
    return ir.Constant(kind, [number] * WIDTH)


@intrinsic
def subnormal(typing: Any, x: Any) -> Any:
    """Return 16 bits, the lowest for the first lane: whether the number is below the smallest normal one, but not 0."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        magnitude = builder.and_(builder.bitcast(given[0], _INTEGERS), _all(_INTEGERS, _MAGNITUDE))
        before = builder.sub(magnitude, _all(_INTEGERS, 1))
        return builder.bitcast(builder.icmp_unsigned("<", before, _all(_INTEGERS, _MANTISSA)), _I16)

    return types.uint16(vector), generate


@intrinsic
def subnormal_product(typing: Any, x: Any, factor: Any) -> Any:
    """Return ``x * factor / 2**24`` for subnormal numbers x and an integer of at most 2^24: rounded once, to even.

    A subnormal number is its mantissa times 2^-149, and so is the product.
    """

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        undefined = ir.Constant(_INTEGERS, ir.Undefined)
        first = builder.insert_element(undefined, builder.trunc(given[1], _I32), ir.Constant(_I32, 0))
        factors = builder.zext(builder.shuffle_vector(first, undefined, _all(_INTEGERS, 0)), _LONGS)
        bits = builder.bitcast(given[0], _INTEGERS)
        product = builder.mul(builder.zext(builder.and_(bits, _all(_INTEGERS, _MANTISSA)), _LONGS), factors)
        shift = _all(_LONGS, FACTOR_BITS)
        odd = builder.and_(builder.lshr(product, shift), _all(_LONGS, 1))
        half = builder.add(odd, _all(_LONGS, 2 ** (FACTOR_BITS - 1) - 1))
        rounded = builder.trunc(builder.lshr(builder.add(product, half), shift), _INTEGERS)
        return builder.bitcast(builder.or_(rounded, builder.and_(bits, _all(_INTEGERS, _SIGN))), _FLOATS)

    return vector(vector, types.int64), generate
