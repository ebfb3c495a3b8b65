"""Vectors of 16 float32 numbers inside of numba, with LLVM's own vector operations.

Each operation is exactly the one that the source names: LLVM contracts or reorders none of them. So the result has the
same bits on every CPU; a CPU with shorter vectors computes one vector in several parts.

An array is given by the address of its first element, ``array.ctypes.data``, and offsets are counted in floats. Nothing
checks them. `lanes` is the number of valid lanes, from the first on; 16 or more means all.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

WIDTH = 16

_I1, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_F32 = ir.FloatType()
_VECTOR, _MASK, _INDICES, _BYTES = (ir.VectorType(kind, WIDTH) for kind in (_F32, _I1, _I32, ir.IntType(8)))


class VectorType(types.Type):
    """The type of a vector of 16 float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _pointer(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    bytes_ = builder.mul(offset, ir.Constant(_I64, 4))
    return builder.inttoptr(builder.add(address, bytes_), kind.as_pointer())


def _numbered(builder: Any, address: Any, index: Any, kind: Any, size: int) -> Any:
    return builder.inttoptr(builder.add(address, builder.mul(index, ir.Constant(_I64, size))), kind.as_pointer())


def _load(builder: Any, address: Any, offset: Any, kind: Any = _VECTOR) -> Any:
    return builder.load(_pointer(builder, address, offset, kind), align=4, typ=kind)


def _store(builder: Any, address: Any, offset: Any, value: Any) -> None:
    builder.store(value, _pointer(builder, address, offset, _VECTOR), align=4)


def _call(builder: Any, name: str, result: Any, arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _lane_mask(builder: Any, lanes: Any) -> Any:
    """Return the mask whose first `lanes` bits are set."""
    clipped = builder.select(builder.icmp_signed("<", lanes, ir.Constant(_I64, WIDTH)), lanes, ir.Constant(_I64, WIDTH))
    ones = builder.shl(ir.Constant(_I32, 1), builder.trunc(clipped, _I32))
    return builder.bitcast(builder.trunc(builder.sub(ones, ir.Constant(_I32, 1)), _I16), _MASK)


def _masked_load(builder: Any, address: Any, offset: Any, mask: Any) -> Any:
    pointer = _pointer(builder, address, offset, _VECTOR)
    zeros = ir.Constant(_VECTOR, [0.0] * WIDTH)
    return _call(builder, "llvm.masked.load.v16f32.p0", _VECTOR, [pointer, ir.Constant(_I32, 4), mask, zeros])


def _masked_store(builder: Any, address: Any, offset: Any, value: Any, mask: Any) -> None:
    pointer = _pointer(builder, address, offset, _VECTOR)
    _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), [value, pointer, ir.Constant(_I32, 4), mask])


def _broadcast(builder: Any, number: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INDICES, [0] * WIDTH))


@intrinsic
def load(typing: Any, address: Any, offset: Any) -> Any:
    """Return the 16 numbers from this offset on."""
    return vector(types.int64, types.int64), lambda context, builder, kind, given: _load(builder, *given)


@intrinsic
def store(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """Write 16 numbers from this offset on."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        _store(builder, *given)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector), generate


@intrinsic
def load_pixels(typing: Any, address: Any) -> Any:
    """Return the 16 bytes at this address as numbers 0 to 255."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        pointer = builder.inttoptr(given[0], _BYTES.as_pointer())
        return builder.uitofp(builder.load(pointer, align=1, typ=_BYTES), _VECTOR)

    return vector(types.int64), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Let the CPU fetch the line of the cache with this address; it may be any address."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        pointer = builder.inttoptr(given[0], _BYTES.as_pointer())
        hints = [ir.Constant(_I32, hint) for hint in (0, 3, 1)]  # to read, in all caches, data
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *hints])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def load_number(typing: Any, address: Any, offset: Any) -> Any:
    """Return the number at this offset."""
    return types.float32(types.int64, types.int64), lambda context, builder, kind, given: _load(
        builder, given[0], given[1], _F32
    )


@intrinsic
def store_number(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """Write one number at this offset."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        address, offset, value = given
        builder.store(value, _pointer(builder, address, offset, _F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def stream(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """Write 16 numbers past the caches to a 64-byte boundary: faster if nothing reads them soon."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        written = builder.store(given[2], _pointer(builder, given[0], given[1], _VECTOR), align=64)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector), generate


@intrinsic
def _load_part(typing: Any, address: Any, offset: Any, lanes: Any) -> Any:
    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return _masked_load(builder, given[0], given[1], _lane_mask(builder, given[2]))

    return vector(types.int64, types.int64, types.int64), generate


@intrinsic
def _store_part(typing: Any, address: Any, offset: Any, value: Any, lanes: Any) -> Any:
    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        address, offset, value, lanes = given
        _masked_store(builder, address, offset, value, _lane_mask(builder, lanes))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector, types.int64), generate


@njit(inline="always")
def load_lanes(address, offset, lanes):
    """Return the first `lanes` numbers from this offset on, and zeros in the other lanes."""
    if lanes >= WIDTH:
        return load(address, offset)
    return _load_part(address, offset, lanes)


@njit(inline="always")
def store_lanes(address, offset, value, lanes):
    """Write the first `lanes` numbers from this offset on."""
    if lanes >= WIDTH:
        store(address, offset, value)
    else:
        _store_part(address, offset, value, lanes)


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """Return a vector that has this float32 number in each lane."""
    return vector(types.float32), lambda context, builder, kind, given: _broadcast(builder, given[0])


def _binary(name: str) -> Any:
    @intrinsic
    def operation(typing: Any, x: Any, y: Any) -> Any:
        return vector(vector, vector), lambda context, builder, kind, given: getattr(builder, name)(*given)

    return operation


def _overload(operation: Any, implementation: Any) -> None:
    def typed(x, y):  # numba compares its signature with the lambda's
        if isinstance(x, VectorType) and isinstance(y, VectorType):
            return lambda x, y: implementation(x, y)  # noqa: PLW0108
        return None

    overload(operation)(typed)


for _operation, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _overload(_operation, _binary(_name))


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """Return ``x y + z``, rounded once."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return _call(builder, "llvm.fma.v16f32", _VECTOR, given)

    return vector(vector, vector, vector), generate


@intrinsic
def square_root(typing: Any, x: Any) -> Any:
    """Return the square root, correctly rounded."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return _call(builder, "llvm.sqrt.v16f32", _VECTOR, given)

    return vector(vector), generate


@intrinsic
def maximum(typing: Any, x: Any, y: Any) -> Any:
    """Return the greater number, as NumPy does: NaN wins over numbers; of equal ones (+0, -0) it is the second."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        x, y = given
        greater = builder.select(builder.fcmp_ordered(">", x, y), x, y)
        return builder.select(builder.fcmp_unordered("uno", x, x), x, greater)

    return vector(vector, vector), generate


def _comparison(symbol: str) -> Any:
    @intrinsic
    def compare(typing: Any, x: Any, y: Any) -> Any:
        def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
            return builder.bitcast(builder.fcmp_ordered(symbol, *given), _I16)

        return types.uint16(vector, vector), generate

    return compare


#: 16 bits, the lowest for the first lane: whether the comparison holds. It does not hold for NaN.
greater_equal, greater = _comparison(">="), _comparison(">")


@intrinsic
def select(typing: Any, bits: Any, x: Any, y: Any) -> Any:
    """Return `x` in the lanes whose bit is set, and `y` in the others."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return builder.select(builder.bitcast(given[0], _MASK), given[1], given[2])

    return vector(types.uint16, vector, vector), generate


@intrinsic
def load_bits(typing: Any, address: Any, index: Any) -> Any:
    """Return the 16 bits of this index in an array of uint16, given by its address.

    A kernel that passes the array itself to an inlined function counts references at each call, which is slow.
    """

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return builder.load(_numbered(builder, given[0], given[1], _I16, 2), align=2, typ=_I16)

    return types.uint16(types.int64, types.int64), generate


@intrinsic
def store_bits(typing: Any, address: Any, index: Any, bits: Any) -> Any:
    """Write the 16 bits of this index; see `load_bits`."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        builder.store(given[2], _numbered(builder, given[0], given[1], _I16, 2), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint16), generate


class ByteVectorType(types.Type):
    """The type of a vector of 16 bytes, such as the numbers of the winners of 16 windows."""

    def __init__(self) -> None:
        super().__init__(name="uint8x16")


byte_vector = ByteVectorType()


@register_model(ByteVectorType)
class _ByteVectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _BYTES)


@intrinsic
def load_bytes(typing: Any, address: Any, offset: Any) -> Any:
    """Return the 16 bytes from this offset on."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return builder.load(_numbered(builder, given[0], given[1], _BYTES, 1), align=1, typ=_BYTES)

    return byte_vector(types.int64, types.int64), generate


@intrinsic
def store_bytes(typing: Any, address: Any, offset: Any, value: Any) -> Any:
    """Write 16 bytes from this offset on."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        builder.store(given[2], _numbered(builder, given[0], given[1], _BYTES, 1), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, byte_vector), generate


@intrinsic
def splat_byte(typing: Any, number: Any) -> Any:
    """Return a vector that has this whole number in each of its 16 bytes."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        undefined = ir.Constant(_BYTES, ir.Undefined)
        first = builder.insert_element(undefined, builder.trunc(given[0], ir.IntType(8)), ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(_INDICES, [0] * WIDTH))

    return byte_vector(types.int64), generate


@intrinsic
def select_bytes(typing: Any, bits: Any, x: Any, y: Any) -> Any:
    """Return `x` in the bytes whose bit is set, and `y` in the others."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return builder.select(builder.bitcast(given[0], _MASK), given[1], given[2])

    return byte_vector(types.uint16, byte_vector, byte_vector), generate


@intrinsic
def equal_bytes(typing: Any, x: Any, y: Any) -> Any:
    """Return 16 bits, the lowest for the first byte: whether the bytes are equal."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        return builder.bitcast(builder.icmp_unsigned("==", *given), _I16)

    return types.uint16(byte_vector, byte_vector), generate


class _Symbol:
    """A vector in generated code: arithmetic with it, and with numbers, generates instructions."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _apply(self, name: str, left: Any, right: Any) -> "_Symbol":
        left, right = (
            one.value if isinstance(one, _Symbol) else ir.Constant(_VECTOR, [float(one)] * WIDTH)
            for one in (left, right)
        )
        return _Symbol(self.builder, getattr(self.builder, name)(left, right))

    def __add__(self, other: Any) -> "_Symbol":
        return self._apply("fadd", self, other)

    def __sub__(self, other: Any) -> "_Symbol":
        return self._apply("fsub", self, other)

    def __mul__(self, other: Any) -> "_Symbol":
        return self._apply("fmul", self, other)

    def __rmul__(self, other: Any) -> "_Symbol":
        return self._apply("fmul", other, self)


def linear_transform(function: Any, inputs: int, outputs: int) -> Any:
    """Return an intrinsic that applies `function`, written with + - * and constants, to each of up to 16 lanes.

    ``transform(source, o, step, lanes, to, at, to_step, to_lanes)`` loads `inputs` vectors from `source`, the first at
    offset o and each `step` floats after the one before, and stores the `outputs` results likewise. The function is
    applied to vectors as it would be to NumPy arrays: operation by operation, constants rounded to float32.
    """

    @intrinsic
    def transform(
        typing: Any, source: Any, o: Any, step: Any, lanes: Any, to: Any, at: Any, to_step: Any, to_lanes: Any
    ) -> Any:
        def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
            source, o, step, lanes, to, at, to_step, to_lanes = given

            def place(first: Any, stride: Any, n: int) -> Any:
                return builder.add(first, builder.mul(stride, ir.Constant(_I64, n)))

            def is_partial(lanes: Any) -> Any:
                return builder.icmp_signed("<", lanes, ir.Constant(_I64, WIDTH))

            with builder.if_else(is_partial(lanes)) as (partly, wholly):
                with partly:
                    mask = _lane_mask(builder, lanes)
                    some = [_masked_load(builder, source, place(o, step, n), mask) for n in range(inputs)]
                    end_of_some = builder.block
                with wholly:
                    whole = [_load(builder, source, place(o, step, n)) for n in range(inputs)]
                    end_of_whole = builder.block
            values = []
            for pair in zip(some, whole, strict=True):
                value = builder.phi(_VECTOR)
                value.add_incoming(pair[0], end_of_some)
                value.add_incoming(pair[1], end_of_whole)
                values.append(_Symbol(builder, value))
            results = [symbol.value for symbol in function(*values)]
            assert len(results) == outputs
            with builder.if_else(is_partial(to_lanes)) as (partly, wholly):
                with partly:
                    mask = _lane_mask(builder, to_lanes)
                    for n, result in enumerate(results):
                        _masked_store(builder, to, place(at, to_step, n), result, mask)
                with wholly:
                    for n, result in enumerate(results):
                        _store(builder, to, place(at, to_step, n), result)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return transform


def tile_product(rows: int, vectors: int, *, masked: bool) -> Any:
    """Return an intrinsic for ``C[m, n] (+)= sum over i and k of A[m, i, k] B[i, k, n]``.

    It computes a tile of `rows` rows m and ``16 * vectors`` columns n in registers. Each element is one chain of fused
    multiply-adds, over i and then k in ascending order. It begins with 0, or if `add` is 1 with the element of C; if
    `add` is 2 it begins with 0 and is added to the element of C. Its
    bits are those of this formula: no tile size and no CPU changes them.

    All strides are counted in floats: of A for m, i and k; of B for i and k; of C for m. With `masked`, the last vector
    has only `lanes` columns.
    """
    last = vectors - 1

    @intrinsic
    def product(
        typing: Any, A: Any, a_m: Any, a_i: Any, a_k: Any, B: Any, b_i: Any, b_k: Any, C: Any, c_m: Any,
        I: Any, K: Any, add: Any, lanes: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
            A, a_m, a_i, a_k, B, b_i, b_k, C, c_m, I, K, add, lanes = given

            def number(n: int) -> Any:
                return ir.Constant(_I64, n)

            def load_vector(address: Any, offset: Any, v: int) -> Any:
                if masked and v == last:
                    return _masked_load(builder, address, offset, mask)
                return _load(builder, address, offset)

            mask = _lane_mask(builder, lanes)
            zero = ir.Constant(_VECTOR, [0.0] * WIDTH)
            tile = [
                (builder.add(builder.mul(c_m, number(m)), number(WIDTH * v)), v)
                for m in range(rows)
                for v in range(vectors)
            ]
            start = builder.block
            names = ("read", "outer", "inner", "body", "step", "end", "plus", "write")
            read, outer, inner, body, step, end, plus, write = (builder.append_basic_block(name) for name in names)
            builder.cbranch(builder.icmp_signed("==", add, number(1)), read, outer)
            builder.position_at_end(read)
            old = [load_vector(C, place, v) for place, v in tile]
            builder.branch(outer)
            builder.position_at_end(outer)
            i, sums_i = builder.phi(_I64), [builder.phi(_VECTOR) for _ in tile]
            builder.cbranch(builder.icmp_signed("<", i, I), inner, end)
            builder.position_at_end(inner)
            k, sums = builder.phi(_I64), [builder.phi(_VECTOR) for _ in tile]
            builder.cbranch(builder.icmp_signed("<", k, K), body, step)
            builder.position_at_end(body)
            at = builder.add(builder.mul(b_i, i), builder.mul(b_k, k))
            right = [load_vector(B, builder.add(at, number(WIDTH * v)), v) for v in range(vectors)]
            at = builder.add(builder.mul(a_i, i), builder.mul(a_k, k))
            new = []
            for m in range(rows):
                element = _load(builder, A, builder.add(builder.mul(a_m, number(m)), at), _F32)
                left = _broadcast(builder, element)
                row = sums[m * vectors : (m + 1) * vectors]
                new += [
                    _call(builder, "llvm.fma.v16f32", _VECTOR, [left, *two]) for two in zip(right, row, strict=True)
                ]
            k_next = builder.add(k, number(1))
            builder.branch(inner)
            builder.position_at_end(step)
            i_next = builder.add(i, number(1))
            builder.branch(outer)
            phi: Any
            for phi, *incoming in (
                (i, (number(0), start), (number(0), read), (i_next, step)),
                (k, (number(0), outer), (k_next, body)),
                *((s, (zero, start), (o, read), (t, step)) for s, o, t in zip(sums_i, old, sums, strict=True)),
                *((s, (t, outer), (n, body)) for s, t, n in zip(sums, sums_i, new, strict=True)),
            ):
                for value, block in incoming:
                    phi.add_incoming(value, block)
            builder.position_at_end(end)
            builder.cbranch(builder.icmp_signed("==", add, number(2)), plus, write)
            builder.position_at_end(plus)
            totals = [builder.fadd(load_vector(C, place, v), s) for (place, v), s in zip(tile, sums_i, strict=True)]
            builder.branch(write)
            builder.position_at_end(write)
            results = []
            for (place, v), only, total in zip(tile, sums_i, totals, strict=True):
                value = builder.phi(_VECTOR)
                value.add_incoming(only, end)
                value.add_incoming(total, plus)
                results.append((place, v, value))
            for place, v, value in results:
                if masked and v == last:
                    _masked_store(builder, C, place, value, mask)
                else:
                    _store(builder, C, place, value)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 13), generate

    return product


@intrinsic
def transpose_tile(typing: Any, x: Any, x_row: Any, y: Any, y_row: Any) -> Any:
    """Write the transpose of 16 rows of 16 numbers at x, which are `x_row` apart, to 16 rows at y, `y_row` apart."""

    def generate(context: Any, builder: Any, kind: Any, given: Any) -> Any:
        x, x_row, y, y_row = given
        rows = [_load(builder, x, builder.mul(x_row, ir.Constant(_I64, i))) for i in range(WIDTH)]
        step = WIDTH // 2
        while step:  # exchange the blocks of this size that are not on the diagonal
            low = [i if not i & step else WIDTH + i - step for i in range(WIDTH)]
            high = [i + step if not i & step else WIDTH + i for i in range(WIDTH)]
            for i in range(WIDTH):
                if not i & step:
                    pair = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (
                        builder.shuffle_vector(*pair, ir.Constant(_INDICES, lanes)) for lanes in (low, high)
                    )
            step //= 2
        for i, row in enumerate(rows):
            _store(builder, y, builder.mul(y_row, ir.Constant(_I64, i)), row)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate
