"""Matrix products whose bits do not depend on the CPU.

Each element of a product is one chain of fused multiply-adds over k in ascending order, so a block of rows or columns
has the bits that it has in the whole product.

M rows and N columns of the result, K terms of an element. Arrays are addresses; strides are counted in floats.

**Packed** matrices, for weights: the columns are cut into blocks (`block_width`), and each block is stored row by row.
So a product reads them in one contiguous run.
"""

from typing import Any

import numpy as np
from numba import njit

from distdl.nn.kernels.compiled.jit import HAS_WIDE_REGISTERS, kernel
from distdl.nn.kernels.compiled.simd import load, load_lanes, store, store_lanes, tile_product, transpose_tile


def _tiles(vectors: int, *, rows: tuple[int, int, int]) -> tuple[Any, ...]:
    return tuple(tile_product(m, vectors, masked=vectors < 4) for m in rows)


# The tiles fit the registers: 32 of 64 bytes, or 16 of 32 bytes. The sizes do not change the bits.
if HAS_WIDE_REGISTERS:
    LARGE_1, SMALL_1, LARGE_2, SMALL_2, LARGE_4, SMALL_4 = 16, 4, 12, 4, 6, 2
else:
    LARGE_1, SMALL_1, LARGE_2, SMALL_2, LARGE_4, SMALL_4 = 6, 2, 3, 2, 1, 1
_large_1, _small_1, _single_1 = _tiles(1, rows=(LARGE_1, SMALL_1, 1))
_large_2, _small_2, _single_2 = _tiles(2, rows=(LARGE_2, SMALL_2, 1))
_large_4, _small_4, _single_4 = _tiles(4, rows=(LARGE_4, SMALL_4, 1))


@njit(inline="always")
def block_width(n, N):
    """Return the number of columns in the block that begins at column n: 64, or else at most 32 or 16."""
    return 64 if N - n >= 64 else min(N - n, 32 if N - n > 16 else 16)


@kernel
def column_block(A, a_m, a_i, a_k, B, b_i, b_k, C, c_m, I, M, K, width, add):
    """Do the same as `product` for a block of `width` columns."""
    m = 0
    if width == 64:
        while M - m >= LARGE_4:
            _large_4(A + 4 * m * a_m, a_m, a_i, a_k, B, b_i, b_k, C + 4 * m * c_m, c_m, I, K, add, 16)
            m += LARGE_4
        while M - m >= SMALL_4:
            _small_4(A + 4 * m * a_m, a_m, a_i, a_k, B, b_i, b_k, C + 4 * m * c_m, c_m, I, K, add, 16)
            m += SMALL_4
        while m < M:
            _single_4(A + 4 * m * a_m, a_m, a_i, a_k, B, b_i, b_k, C + 4 * m * c_m, c_m, I, K, add, 16)
            m += 1
    elif width > 16:
        while M - m >= LARGE_2:
            _large_2(A + 4 * m * a_m, a_m, a_i, a_k, B, b_i, b_k, C + 4 * m * c_m, c_m, I, K, add, width - 16)
            m += LARGE_2
        while M - m >= SMALL_2:
            _small_2(A + 4 * m * a_m, a_m, a_i, a_k, B, b_i, b_k, C + 4 * m * c_m, c_m, I, K, add, width - 16)
            m += SMALL_2
        while m < M:
            _single_2(A + 4 * m * a_m, a_m, a_i, a_k, B, b_i, b_k, C + 4 * m * c_m, c_m, I, K, add, width - 16)
            m += 1
    else:
        while M - m >= LARGE_1:
            _large_1(A + 4 * m * a_m, a_m, a_i, a_k, B, b_i, b_k, C + 4 * m * c_m, c_m, I, K, add, width)
            m += LARGE_1
        while M - m >= SMALL_1:
            _small_1(A + 4 * m * a_m, a_m, a_i, a_k, B, b_i, b_k, C + 4 * m * c_m, c_m, I, K, add, width)
            m += SMALL_1
        while m < M:
            _single_1(A + 4 * m * a_m, a_m, a_i, a_k, B, b_i, b_k, C + 4 * m * c_m, c_m, I, K, add, width)
            m += 1


@njit(inline="always")
def _whole(a, b, c, d, e, f, g, h, i, j):
    """Return the same numbers; numba would compile `_column_block` again for each set of constants among them."""
    kind = np.int64
    return kind(a), kind(b), kind(c), kind(d), kind(e), kind(f), kind(g), kind(h), kind(i), kind(j)


@njit(inline="always")
def product(A, a_m, a_i, a_k, B, b_i, b_k, C, c_m, I, M, K, N, add):
    """Set ``C[m, n] (+)= sum over i < I and k < K of A[m, i, k] B[i, k, n]``; `add`: see `tile_product`."""
    n = 0
    a_m, a_i, a_k, b_i, b_k, c_m, I, M, K, add = _whole(a_m, a_i, a_k, b_i, b_k, c_m, I, M, K, add)
    while n < N:
        width = block_width(n, N)
        column_block(A, a_m, a_i, a_k, B + 4 * n, b_i, b_k, C + 4 * n, c_m, I, M, K, width, add)
        n += width


@njit(inline="always")
def packed_product(A, a_m, a_i, a_k, B, rows, row, row_i, row_k, C, c_m, I, M, K, N, add):
    """Do the same with a packed matrix B of this number of `rows`: element (i, k) reads ``row + i row_i + k row_k``."""
    n = 0
    a_m, a_i, a_k, row_i, row_k, c_m, I, M, K, add = _whole(a_m, a_i, a_k, row_i, row_k, c_m, I, M, K, add)
    while n < N:
        width = block_width(n, N)
        block = B + 4 * (n * rows + row * width)
        column_block(A, a_m, a_i, a_k, block, row_i * width, row_k * width, C + 4 * n, c_m, I, M, K, width, add)
        n += width


@kernel
def transpose(x, x_row, R, C, y, y_row):
    """Write the transpose (C, R) of R rows of C numbers; rows are `x_row` and `y_row` apart."""
    part_ = np.empty(16 * 16, np.float32)
    part = part_.ctypes.data
    for r in range(0, R, 16):
        for c in range(0, C, 16):
            rows, columns = min(16, R - r), min(16, C - c)
            if rows == 16 and columns == 16:
                transpose_tile(x + 4 * (r * x_row + c), x_row, y + 4 * (c * y_row + r), y_row)
            else:
                for i in range(rows):
                    store(part, 16 * i, load_lanes(x, (r + i) * x_row + c, columns))
                transpose_tile(part, 16, part, 16)
                for j in range(columns):
                    store_lanes(y, (c + j) * y_row + r, load(part, 16 * j), rows)


@njit(inline="always")
def copy_rows(x, x_row, R, C, y, y_row):
    """Copy R rows of C numbers; rows are `x_row` and `y_row` apart."""
    for r in range(R):
        for c in range(0, C, 16):
            store_lanes(y, r * y_row + c, load_lanes(x, r * x_row + c, C - c), C - c)


@njit(inline="always")
def pack_rows(matrix, row, K, N, packed):
    """Copy a matrix (K, N), whose rows are `row` apart, into a packed one, of the same size."""
    n = 0
    while n < N:
        width = block_width(n, N)
        copy_rows(matrix + 4 * n, row, K, width, packed + 4 * n * K, width)
        n += width


@kernel
def pack(matrix_, packed_):
    """Copy a matrix (K, N) into a packed one, of the same size."""
    K, N = matrix_.shape
    pack_rows(matrix_.ctypes.data, N, K, N, packed_.ctypes.data)


@kernel
def pack_transposed(matrix_, packed_):
    """Copy the transpose (K, N) of a matrix (N, K) into a packed one, of the same size."""
    N, K = matrix_.shape
    n = 0
    while n < N:
        width = block_width(n, N)
        transpose(matrix_.ctypes.data + 4 * n * K, K, width, K, packed_.ctypes.data + 4 * n * K, width)
        n += width
