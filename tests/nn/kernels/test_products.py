"""Each element of a compiled product is one chain of fused multiply-adds, whatever the tile."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("numba")
from distdl.nn.kernels.compiled import products
from distdl.nn.kernels.compiled.jit import kernel

from .exact import assert_same_bits, chain, numbers

ROWS = range(1, products.LARGE_1 + products.SMALL_1 + 3)
COLUMNS = (1, 7, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 80, 96, 100, 128, 145)
TERMS, MARGIN = 2, 20


@kernel
def _product(A_, a_m, a_i, a_k, B_, C_, M, K, N, add):
    A, C = A_.ctypes.data, C_.ctypes.data + 4 * (N + MARGIN)  # its second row
    products.product(A, a_m, a_i, a_k, B_.ctypes.data, K * N, N, C, N + MARGIN, TERMS, M, K, N, add)


@kernel
def _packed_product(A_, a_m, a_i, a_k, B_, C_, M, K, N, add):
    A, C, rows = A_.ctypes.data, C_.ctypes.data + 4 * (N + MARGIN), (TERMS + 1) * K
    products.packed_product(A, a_m, a_i, a_k, B_.ctypes.data, rows, K, K, 1, C, N + MARGIN, TERMS, M, K, N, add)


def _packed(B):
    """Return the packed form of a matrix (TERMS, K, N), below K rows that no product may read."""
    _, K, N = B.shape
    packed = np.empty((TERMS + 1) * K * N, np.float32)
    products.pack(np.concatenate([np.full((K, N), np.nan, np.float32), B.reshape(-1, N)]), packed)
    return packed


@pytest.mark.parametrize("special", [0, 0.02], ids=["normal", "special"])
@pytest.mark.parametrize("add", [0, 1, 2])
def test_products_have_the_bits_of_their_formula_for_all_tiles(add, special):
    M, K, N = max(ROWS), 5, max(COLUMNS)
    A, B = numbers((M, TERMS, K), 1, special), numbers((TERMS, K, N), 2, special)
    start = numbers((M, N), 3, special)
    expected = chain(A.reshape(M, -1), B.reshape(-1, N), start if add == 1 else 0)
    if add == 2:
        expected = start + expected
    by_rows = (A, TERMS * K, K, 1)
    by_columns = (np.ascontiguousarray(A.transpose(1, 2, 0)), 1, K * M, M)
    for n in COLUMNS:
        right = np.ascontiguousarray(B[:, :, :n])
        packed = _packed(right)
        for m, (multiply, left, matrix) in itertools.product(
            ROWS, ((_product, by_rows, right), (_product, by_columns, right), (_packed_product, by_rows, packed))
        ):
            C = np.full((m + 2, n + MARGIN), np.float32(7))
            C[1:-1, :n] = start[:m, :n]
            multiply(*left, matrix, C, m, K, n, add)
            assert_same_bits(C[1:-1, :n], expected[:m, :n])
            C[1:-1, :n] = 7
            assert (C == 7).all()  # nothing else was written


@pytest.mark.parametrize("N", COLUMNS)
def test_packing_keeps_every_element_once(N):
    matrix = np.arange(3 * N, dtype=np.float32).reshape(3, N)
    packed, transposed = np.empty(3 * N, np.float32), np.empty(3 * N, np.float32)
    products.pack(matrix, packed)
    products.pack_transposed(np.ascontiguousarray(matrix.T), transposed)
    expected, n = [], 0
    while n < N:
        width = products.block_width.py_func(n, N)
        expected.append(matrix[:, n : n + width].ravel())
        n += width
    np.testing.assert_array_equal(packed, np.concatenate(expected))
    np.testing.assert_array_equal(transposed, packed)
