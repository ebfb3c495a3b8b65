"""3x3 convolution with stride 1 by Winograd's F(4x4, 3x3): 36 products for 16 outputs, where the sum has 144.

An output tile of 4x4 pixels comes from an input tile of 6x6. With the matrices B (6, 6), G (6, 3) and A (6, 4) for the
points 0, ±1, ±2 and infinity: ``y = A' ((G g G') * (B' x B)) A`` for a kernel g and an input tile x, summed over the
channels before the last transform. Source: Lavin and Gray, *Fast algorithms for convolutional neural networks*, 2016.

The gradients are the adjoint of each stage, with ``D = A dy A'`` and V the transformed input:
``dg = G' (V D) G`` summed over the tiles, and ``dx = B (D (G g G')) B'`` summed over the filters and over the tiles
that share a pixel. So one transform of the output gradient serves both.

A kernel takes P tiles at a time, so the transformed tiles stay in the second-level cache. If the weights are many, it
takes more tiles, and transforms 64 columns of the weights at a time. So these stay in the cache, and are never kept.
Tiles are numbered by image, row and column. The order of operations:

- Transforms: along the rows of a tile (index i) first, then along its columns; each as written below, without fused
  multiply-adds.
- Products over C or F: one chain each (see `products`).
- ``dg`` (before G') and the gradient of the bias: one chain over all tiles in ascending order.
- ``dx``: begins with 0; tiles are added in ascending order.

N images, H and W their height and width, C channels, F filters, OH and OW the size of the convolution's output, TH and
TW its tiles, P tiles of a block, ph and pw the padding. Pixels outside of the image are zeros.
"""

import numpy as np
from numba import njit

from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.products import block_width, packed_product, product, transpose
from distdl.nn.kernels.compiled.simd import (
    greater,
    greater_equal,
    linear_transform,
    load,
    load_lanes,
    maximum,
    select,
    splat,
    store,
    store_lanes,
)

TILE, WINDOW, POINTS = 4, 6, 36
#: Floats of scratch for one tile of one vector of channels: three arrays of 6x6 vectors.
SMALL_SCRATCH = 3 * POINTS * 16

f4 = np.float32


# ---------------------------------------------------------------------------------------------------- transforms


def input_transform(x0, x1, x2, x3, x4, x5):
    """Return B' x: six values become six."""
    a, b, c, e = x4 - 4 * x2, x3 - 4 * x1, x4 - x2, 2 * (x3 - x1)
    return 4 * x0 - 5 * x2 + x4, a + b, a - b, c + e, c - e, 4 * x1 - 5 * x3 + x5


def input_adjoint(e0, e1, e2, e3, e4, e5):
    """Return B e: six values become six."""
    a, b, c, d = 4 * (e1 + e2), 4 * (e1 - e2), e3 + e4, 2 * (e3 - e4)
    return 4 * e0, 4 * e5 - b - d, -5 * e0 - a - c, e1 - e2 + d - 5 * e5, e0 + (e1 + e2) + c, e5


def output_transform(m0, m1, m2, m3, m4, m5):
    """Return A' m: six values become four."""
    a, b, c, d = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    return m0 + a + c, b + 2 * d, a + 4 * c, b + 8 * d + m5


def output_adjoint(d0, d1, d2, d3):
    """Return A d: four values become six."""
    s, t, u, v = d0 + d2, d1 + d3, d0 + 4 * d2, 2 * (d1 + 4 * d3)
    return d0, s + t, s - t, u + v, u - v, d3


def kernel_transform(g0, g1, g2):
    """Return G g: three values become six."""
    a, b, c, d = (-1 / 6) * (g0 + g2), (1 / 6) * g1, (1 / 24) * g0 + (1 / 6) * g2, (1 / 12) * g1
    return (1 / 4) * g0, a - b, a + b, c + d, c - d, g2


def kernel_adjoint(u0, u1, u2, u3, u4, u5):
    """Return G' u: six values become three."""
    a, b, c, d = (1 / 6) * (u1 + u2), (1 / 6) * (u2 - u1), u3 + u4, u3 - u4
    return (1 / 4) * u0 - a + (1 / 24) * c, b + (1 / 12) * d, (1 / 6) * c - a + u5


_input = linear_transform(input_transform, 6, 6)
_input_back = linear_transform(input_adjoint, 6, 6)
_output = linear_transform(output_transform, 6, 4)
_output_back = linear_transform(output_adjoint, 4, 6)
_kernel = linear_transform(kernel_transform, 3, 6)
_kernel_back = linear_transform(kernel_adjoint, 6, 3)


# --------------------------------------------------------------------------------------------- weights and gradient


@njit
def _transform_columns(g, element, row, rows, width, U, point, T):
    """Write G g G' of `width` columns of `rows` rows to U: packed blocks (rows, width), `point` floats apart.

    The elements of g's kernels are `element` floats apart, its rows `row`. T has room for 36 vectors.
    """
    for r in range(rows):
        for f in range(0, width, 16):
            lanes = width - f
            for j in range(3):
                _kernel(g, j * element + r * row + f, 3 * element, lanes, T, 16 * j, 96, 16)
            for i in range(6):
                _kernel(T, 96 * i, 16, 16, U, 6 * i * point + r * width + f, point, lanes)


@kernel
def transform_weights(weights_, U_):
    """Write G g G' of weights (3, 3, C, F) to U: 36 packed matrices (C, F), one after another."""
    _, _, C, F = weights_.shape
    scratch_ = np.empty(POINTS * 16, np.float32)
    n = 0
    while n < F:
        width = block_width(n, F)
        weights, U = weights_.ctypes.data + 4 * n, U_.ctypes.data + 4 * n * C
        _transform_columns(weights, C * F, F, C, width, U, C * F, scratch_.ctypes.data)
        n += width


@njit
def _transform_back(dU, point, row, C, width, d_weights, F, T):
    """Write G' dU G to `width` columns of the gradient of the weights (3, 3, C, F).

    The matrices of dU are `point` floats apart, their rows `row`. T has room for 36 vectors.
    """
    for c in range(C):
        for f in range(0, width, 16):
            lanes = width - f
            for j in range(6):
                _kernel_back(dU, j * point + c * row + f, 6 * point, lanes, T, 16 * j, 96, 16)
            for i in range(3):
                _kernel_back(T, 96 * i, 16, 16, d_weights, (3 * i * C + c) * F + f, C * F, lanes)


@njit
def _multiply_by_columns(A, a_point, weights, C, F, transposed, y, y_point, count, U, T):
    """Write the 36 products of A (count, K) and the transformed weights (K, N) to y (count, N).

    The weights (3, 3, C, F) are transformed for 64 columns at a time, so they stay in the cache. K is C and N is F, or
    with `transposed` the other way around. U has room for 45 K 64 floats.
    """
    K, N = C, F
    if transposed:
        K, N = F, C
    n = 0
    while n < N:
        width = block_width(n, N)
        g, element, row = weights + 4 * n, C * F, F
        if transposed:
            g, element, row = U + 4 * POINTS * K * width, K * width, width
            for e in range(9):
                transpose(weights + 4 * (e * C * F + n * F), F, width, F, g + 4 * e * element, width)
        _transform_columns(g, element, row, K, width, U, K * width, T)
        for k in range(POINTS):
            at = U + 4 * k * K * width
            packed_product(
                A + 4 * k * a_point, K, 0, 1, at, K, 0, 0, 1, y + 4 * (k * y_point + n), N, 1, count, K, width, 0
            )
        n += width


# ----------------------------------------------------------------------------------------------------- input tiles


@njit(inline="always")
def _gather(x, n, h0, w0, H, W, C, V, at, step, T):
    """Write B' x B of the tile whose first pixel is (h0, w0) to V: 36 vectors of C, `step` floats apart."""
    inside = h0 >= 0 and w0 >= 0 and h0 + WINDOW <= H and w0 + WINDOW <= W
    first = ((n * H + h0) * W + w0) * C
    for c in range(0, C, 16):
        lanes = C - c
        source, o, row, column, source_lanes = x, first + c, W * C, C, lanes
        if not inside:
            source, o, row, column, source_lanes = T + 4 * POINTS * 16, 0, 96, 16, 16
            for i in range(6):
                for j in range(6):
                    v = splat(f4(0))
                    if 0 <= h0 + i < H and 0 <= w0 + j < W:
                        v = load_lanes(x, first + (i * W + j) * C + c, lanes)
                    store(source, 96 * i + 16 * j, v)
        for j in range(6):
            _input(source, o + j * column, row, source_lanes, T, 16 * j, 96, 16)
        for i in range(6):
            _input(T, 96 * i, 16, 16, V, at + 6 * i * step + c, step, lanes)


@njit(inline="always")
def _scatter(E, at, step, dx, n, h0, w0, H, W, C, T):
    """Add B e B' of 36 vectors of C, `step` floats apart, to the tile of dx whose first pixel is (h0, w0)."""
    first = ((n * H + h0) * W + w0) * C
    for c in range(0, C, 16):
        lanes = C - c
        for j in range(6):
            _input_back(E, at + j * step + c, 6 * step, lanes, T, 16 * j, 96, 16)
        for i in range(max(0, -h0), min(6, H - h0)):
            _input_back(T, 96 * i, 16, 16, T, 96 * i, 16, 16)
            for j in range(max(0, -w0), min(6, W - w0)):
                o = first + (i * W + j) * C + c
                store_lanes(dx, o, load_lanes(dx, o, lanes) + load(T, 96 * i + 16 * j), lanes)


# ------------------------------------------------------------------------------------------------------ the passes


def scratch_size(C: int, F: int, P: int, *, by_columns: bool, is_one_block: bool) -> int:
    """Return the number of floats of scratch that `forward` and `backward` need."""
    dU, columns = POINTS * C * F * (not is_one_block), 45 * max(C, F) * 64 * by_columns
    return SMALL_SCRATCH + POINTS * P * (C + F) + dU + columns


@kernel
def forward(x_, U_, bias_, y_, winners_, scratch_, P, OH, OW, ph, pw, has_bias, relu, pool, by_columns):
    """Write the convolution of x (N, H, W, C), with its bias, ReLU and 2x2 max-pooling if wanted, to y (N, ..., F).

    U has the transformed weights; with `by_columns` it has the weights. `winners` (y.size / F, vectors, 3) receives the
    comparisons of each window: its rows, its upper pixels, its lower pixels. `scratch_size` tells the size of scratch.
    """
    N, H, W, C = x_.shape
    F = y_.shape[3]
    TH, TW, PH, PW = (OH + 3) // 4, (OW + 3) // 4, OH // 2, OW // 2
    x, U, bias, y, T = x_.ctypes.data, U_.ctypes.data, bias_.ctypes.data, y_.ctypes.data, scratch_.ctypes.data
    V = T + 4 * SMALL_SCRATCH
    v_step, m_step, CF = P * C, P * F, C * F
    M = V + 4 * POINTS * v_step
    columns = M + 4 * POINTS * m_step
    vectors = (F + 15) // 16
    zero = splat(f4(0))
    tiles = N * TH * TW
    for t0 in range(0, tiles, P):
        count = min(P, tiles - t0)
        for q in range(count):
            t = t0 + q
            _gather(x, t // (TH * TW), 4 * (t // TW % TH) - ph, 4 * (t % TW) - pw, H, W, C, V, q * C, v_step, T)
        if by_columns:
            _multiply_by_columns(V, v_step, U, C, F, False, M, m_step, count, columns, T)
        else:
            for k in range(POINTS):
                packed_product(
                    V + 4 * k * v_step, C, 0, 1, U + 4 * k * CF, C, 0, 0, 1, M + 4 * k * m_step, F, 1, count, C, F, 0
                )
        for q in range(count):
            t = t0 + q
            n, h0, w0 = t // (TH * TW), 4 * (t // TW % TH), 4 * (t % TW)
            for f in range(0, F, 16):
                lanes = F - f
                b = zero
                if has_bias:
                    b = load_lanes(bias, f, lanes)
                for j in range(6):
                    _output(M, j * m_step + q * F + f, 6 * m_step, lanes, T, 16 * j, 96, 16)
                for i in range(4):
                    _output(T, 96 * i, 16, 16, T, 96 * i, 16, 16)
                if pool:
                    for i in range(0, min(4, 2 * PH - h0), 2):
                        for j in range(0, min(4, 2 * PW - w0), 2):
                            o = 96 * i + 16 * j
                            a0, a1, b0, b1 = load(T, o), load(T, o + 16), load(T, o + 96), load(T, o + 112)
                            above, below = maximum(a0, a1), maximum(b0, b1)
                            pixel = (n * PH + (h0 + i) // 2) * PW + (w0 + j) // 2
                            k = pixel * vectors + f // 16
                            winners_[k, 0] = greater_equal(above, below)
                            winners_[k, 1] = greater_equal(a0, a1)
                            winners_[k, 2] = greater_equal(b0, b1)
                            v = maximum(above, below)
                            if has_bias:
                                v = v + b
                            if relu:
                                v = maximum(v, zero)
                            store_lanes(y, pixel * F + f, v, lanes)
                else:
                    for i in range(min(4, OH - h0)):
                        for j in range(min(4, OW - w0)):
                            v = load(T, 96 * i + 16 * j)
                            if has_bias:
                                v = v + b
                            if relu:
                                v = maximum(v, zero)
                            store_lanes(y, ((n * OH + h0 + i) * OW + w0 + j) * F + f, v, lanes)


@njit(inline="always")
def _output_gradient(dy, y, winners_, n, h0, w0, OH, OW, F, f, relu, pool, T):
    """Write the gradient of the 4x4 outputs from pixel (h0, w0) on, before pooling and ReLU, to T: rows 96 apart."""
    lanes, zero = F - f, splat(f4(0))
    for i in range(4):
        for j in range(4):
            store(T, 96 * i + 16 * j, zero)
    if pool:
        PH, PW, vectors = OH // 2, OW // 2, (F + 15) // 16
        for i in range(0, min(4, 2 * PH - h0), 2):
            for j in range(0, min(4, 2 * PW - w0), 2):
                pixel = (n * PH + (h0 + i) // 2) * PW + (w0 + j) // 2
                d = load_lanes(dy, pixel * F + f, lanes)
                if relu:
                    d = select(greater(load_lanes(y, pixel * F + f, lanes), zero), d, zero)
                k, o = pixel * vectors + f // 16, 96 * i + 16 * j
                above, below = select(winners_[k, 0], d, zero), select(winners_[k, 0], zero, d)
                store(T, o, select(winners_[k, 1], above, zero))
                store(T, o + 16, select(winners_[k, 1], zero, above))
                store(T, o + 96, select(winners_[k, 2], below, zero))
                store(T, o + 112, select(winners_[k, 2], zero, below))
    else:
        for i in range(min(4, OH - h0)):
            for j in range(min(4, OW - w0)):
                o = ((n * OH + h0 + i) * OW + w0 + j) * F + f
                d = load_lanes(dy, o, lanes)
                if relu:
                    d = select(greater(load_lanes(y, o, lanes), zero), d, zero)
                store(T, 96 * i + 16 * j, d)


@kernel
def backward(
    x_, UT_, dy_, y_, winners_, d_weights_, d_bias_, dx_, scratch_, P, OH, OW, ph, pw, relu, pool, wanted, by_columns,
    is_one_block,
):  # fmt: skip
    """Write the gradients of the weights and of the bias and, if `wanted`, that of x.

    UT has the transformed weights with C and F exchanged; with `by_columns` it has the weights. dy, y, `winners` and
    the scratch are those of `forward`.
    """
    N, H, W, C = x_.shape
    F = dy_.shape[3]
    TH, TW = (OH + 3) // 4, (OW + 3) // 4
    x, UT, dy, y, dx = x_.ctypes.data, UT_.ctypes.data, dy_.ctypes.data, y_.ctypes.data, dx_.ctypes.data
    d_weights, d_bias, T = d_weights_.ctypes.data, d_bias_.ctypes.data, scratch_.ctypes.data
    V = T + 4 * SMALL_SCRATCH
    v_step, d_step, CF = P * C, P * F, C * F
    D = V + 4 * POINTS * v_step
    d_bias_[:] = 0
    if wanted:
        dx_[...] = 0
    tiles = N * TH * TW
    # dU has 36 matrices (C, F); with one block of tiles it has only the columns in use.
    dU = columns = D + 4 * POINTS * d_step
    if not is_one_block:
        columns = dU + 4 * POINTS * CF
    for t0 in range(0, tiles, P):
        count = min(P, tiles - t0)
        for q in range(count):
            t = t0 + q
            n, h0, w0 = t // (TH * TW), 4 * (t // TW % TH), 4 * (t % TW)
            _gather(x, n, h0 - ph, w0 - pw, H, W, C, V, q * C, v_step, T)
            for f in range(0, F, 16):
                lanes = F - f
                _output_gradient(dy, y, winners_, n, h0, w0, OH, OW, F, f, relu, pool, T)
                for j in range(4):
                    _output_back(T, 16 * j, 96, 16, T, 16 * j, 96, 16)
                for i in range(6):
                    _output_back(T, 96 * i, 16, 16, D, 6 * i * d_step + q * F + f, d_step, lanes)
                # Point (1, 1) is the sum over the 16 outputs.
                total = load_lanes(d_bias, f, lanes) + load_lanes(D, 7 * d_step + q * F + f, lanes)
                store_lanes(d_bias, f, total, lanes)
        last, add, n = t0 + P >= tiles, 1 if t0 else 0, 0
        while n < F:
            width, at, point, row = F, dU, CF, F
            if by_columns:
                width = block_width(n, F)
                at, point, row = (dU, C * width, width) if is_one_block else (dU + 4 * n, CF, F)
            for k in range(POINTS):
                d = D + 4 * (k * d_step + n)
                product(V + 4 * k * v_step, 1, 0, C, d, 0, F, at + 4 * k * point, row, 1, C, count, width, add)
            if last:
                _transform_back(at, point, row, C, width, d_weights + 4 * n, F, T)
            n += width
        if wanted and by_columns:
            _multiply_by_columns(D, d_step, UT, C, F, True, V, v_step, count, columns, T)
        elif wanted:
            for k in range(POINTS):
                at = D + 4 * k * d_step
                packed_product(at, F, 0, 1, UT + 4 * k * CF, F, 0, 0, 1, V + 4 * k * v_step, C, 1, count, F, C, 0)
        if wanted:
            for q in range(count):
                t = t0 + q
                n, h0, w0 = t // (TH * TW), 4 * (t // TW % TH) - ph, 4 * (t % TW) - pw
                _scatter(V, q * C, v_step, dx, n, h0, w0, H, W, C, T)
