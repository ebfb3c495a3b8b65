"""3x3 convolution with stride 1 by Winograd's F(4x4, 3x3): 36 products for 16 outputs, where the sum has 144.

An output tile of 4x4 pixels comes from an input tile of 6x6. With the matrices B (6, 6), G (6, 3) and A (6, 4) for the
points 0, ±1, ±2 and infinity: ``y = A' ((G g G') * (B' x B)) A`` for a kernel g and an input tile x, summed over the
channels before the last transform. Source: Lavin and Gray, *Fast algorithms for convolutional neural networks*, 2016.

The gradients are the adjoint of each stage, with ``D = A dy A'`` and V the transformed input:
``dg = G' (V D) G`` summed over the tiles, and ``dx = B (D (G g G')) B'`` summed over the filters and over the tiles
that share a pixel. So one transform of the output gradient serves both.

A kernel takes P tiles at a time, so the transformed tiles stay in the second-level cache. Tiles are numbered by image,
row and column. The order of operations:

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
from distdl.nn.kernels.compiled.products import block_width, packed_product, product
from distdl.nn.kernels.compiled.simd import (
    greater,
    greater_equal,
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


@njit(inline="always")
def _input_transform(x0, x1, x2, x3, x4, x5):
    """Return B' x: six values become six."""
    two, four, five = splat(f4(2)), splat(f4(4)), splat(f4(5))
    a, b, c, e = x4 - four * x2, x3 - four * x1, x4 - x2, two * (x3 - x1)
    return four * x0 - five * x2 + x4, a + b, a - b, c + e, c - e, four * x1 - five * x3 + x5


@njit(inline="always")
def _input_adjoint(e0, e1, e2, e3, e4, e5):
    """Return B e: six values become six."""
    two, four, five = splat(f4(2)), splat(f4(4)), splat(f4(5))
    a, b, c, d = e1 + e2, four * (e1 - e2), e3 + e4, two * (e3 - e4)
    x2 = splat(f4(0)) - five * e0 - four * a - c
    return four * e0, four * e5 - b - d, x2, e1 - e2 + d - five * e5, e0 + a + c, e5


@njit(inline="always")
def _output_transform(m0, m1, m2, m3, m4, m5):
    """Return A' m: six values become four."""
    two, four, eight = splat(f4(2)), splat(f4(4)), splat(f4(8))
    a, b, c, d = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    return m0 + a + c, b + two * d, a + four * c, b + eight * d + m5


@njit(inline="always")
def _output_adjoint(d0, d1, d2, d3):
    """Return A d: four values become six."""
    two, four = splat(f4(2)), splat(f4(4))
    s, t, u, v = d0 + d2, d1 + d3, d0 + four * d2, two * (d1 + four * d3)
    return d0, s + t, s - t, u + v, u - v, d3


@njit(inline="always")
def _kernel_transform(g0, g1, g2):
    """Return G g: three values become six."""
    a, b, c = (g0 + g2) * splat(f4(-1 / 6)), g1 * splat(f4(1 / 6)), g1 * splat(f4(1 / 12))
    d = g0 * splat(f4(1 / 24)) + g2 * splat(f4(1 / 6))
    return g0 * splat(f4(1 / 4)), a - b, a + b, d + c, d - c, g2


@njit(inline="always")
def _kernel_adjoint(u0, u1, u2, u3, u4, u5):
    """Return G' u: six values become three."""
    sixth = splat(f4(1 / 6))
    a, b, c, d = (u1 + u2) * sixth, (u2 - u1) * sixth, u3 + u4, u3 - u4
    g0 = u0 * splat(f4(1 / 4)) - a + c * splat(f4(1 / 24))
    return g0, b + d * splat(f4(1 / 12)), c * sixth - a + u5


# --------------------------------------------------------------------------------------------- weights and gradient


@kernel
def transform_weights(weights_, U_):
    """Write G g G' of weights (3, 3, C, F) to U: 36 packed matrices (C, F), one after another."""
    _, _, C, F = weights_.shape
    g, U, CF = weights_.ctypes.data, U_.ctypes.data, C * F
    scratch_ = np.empty(POINTS * 16, np.float32)
    T = scratch_.ctypes.data
    n = 0
    while n < F:
        width = block_width(n, F)
        for c in range(C):
            for f in range(0, width, 16):
                lanes, o = width - f, c * F + n + f
                for j in range(3):
                    g0 = load_lanes(g, o + j * CF, lanes)
                    g1 = load_lanes(g, o + (3 + j) * CF, lanes)
                    g2 = load_lanes(g, o + (6 + j) * CF, lanes)
                    u0, u1, u2, u3, u4, u5 = _kernel_transform(g0, g1, g2)
                    _store_six(T, 16 * j, 96, u0, u1, u2, u3, u4, u5, 16)
                to = n * C + c * width + f
                for i in range(6):
                    o = 96 * i
                    u0, u1, u2, u3, u4, u5 = _kernel_transform(load(T, o), load(T, o + 16), load(T, o + 32))
                    _store_six(U, to + 6 * i * CF, CF, u0, u1, u2, u3, u4, u5, lanes)
        n += width


@kernel
def weight_gradient(dU_, d_weights_):
    """Write G' dU G of dU (36, C, F) to the gradient of the weights (3, 3, C, F)."""
    _, _, C, F = d_weights_.shape
    dU, d, CF = dU_.ctypes.data, d_weights_.ctypes.data, C * F
    scratch_ = np.empty(POINTS * 16, np.float32)
    T = scratch_.ctypes.data
    for o in range(0, CF, 16):
        lanes = CF - o
        for j in range(6):
            u0, u1, u2, u3, u4, u5 = _load_six(dU, o + j * CF, 6 * CF, lanes)
            g0, g1, g2 = _kernel_adjoint(u0, u1, u2, u3, u4, u5)
            store(T, 16 * j, g0)
            store(T, 16 * j + 96, g1)
            store(T, 16 * j + 192, g2)
        for i in range(3):
            u0, u1, u2, u3, u4, u5 = _load_six(T, 96 * i, 16, 16)
            g0, g1, g2 = _kernel_adjoint(u0, u1, u2, u3, u4, u5)
            store_lanes(d, o + 3 * i * CF, g0, lanes)
            store_lanes(d, o + (3 * i + 1) * CF, g1, lanes)
            store_lanes(d, o + (3 * i + 2) * CF, g2, lanes)


@njit(inline="always")
def _load_six(source, o, step, lanes):
    return (
        load_lanes(source, o, lanes),
        load_lanes(source, o + step, lanes),
        load_lanes(source, o + 2 * step, lanes),
        load_lanes(source, o + 3 * step, lanes),
        load_lanes(source, o + 4 * step, lanes),
        load_lanes(source, o + 5 * step, lanes),
    )


@njit(inline="always")
def _store_six(to, at, step, v0, v1, v2, v3, v4, v5, lanes):
    store_lanes(to, at, v0, lanes)
    store_lanes(to, at + step, v1, lanes)
    store_lanes(to, at + 2 * step, v2, lanes)
    store_lanes(to, at + 3 * step, v3, lanes)
    store_lanes(to, at + 4 * step, v4, lanes)
    store_lanes(to, at + 5 * step, v5, lanes)


# ----------------------------------------------------------------------------------------------------- input tiles


@njit(inline="always")
def _gather(x, n, h0, w0, H, W, C, V, at, step, T):
    """Write B' x B of the tile whose first pixel is (h0, w0) to V: 36 vectors of C, `step` floats apart."""
    inside = h0 >= 0 and w0 >= 0 and h0 + WINDOW <= H and w0 + WINDOW <= W
    first = ((n * H + h0) * W + w0) * C
    for c in range(0, C, 16):
        lanes = C - c
        if inside:
            for j in range(6):
                x0, x1, x2, x3, x4, x5 = _load_six(x, first + j * C + c, W * C, lanes)
                y0, y1, y2, y3, y4, y5 = _input_transform(x0, x1, x2, x3, x4, x5)
                _store_six(T, 16 * j, 96, y0, y1, y2, y3, y4, y5, 16)
        else:
            E = T + 4 * POINTS * 16
            for i in range(6):
                for j in range(6):
                    v = splat(f4(0))
                    if 0 <= h0 + i < H and 0 <= w0 + j < W:
                        v = load_lanes(x, first + (i * W + j) * C + c, lanes)
                    store(E, 96 * i + 16 * j, v)
            for j in range(6):
                x0, x1, x2, x3, x4, x5 = _load_six(E, 16 * j, 96, 16)
                y0, y1, y2, y3, y4, y5 = _input_transform(x0, x1, x2, x3, x4, x5)
                _store_six(T, 16 * j, 96, y0, y1, y2, y3, y4, y5, 16)
        for i in range(6):
            x0, x1, x2, x3, x4, x5 = _load_six(T, 96 * i, 16, 16)
            y0, y1, y2, y3, y4, y5 = _input_transform(x0, x1, x2, x3, x4, x5)
            _store_six(V, at + 6 * i * step + c, step, y0, y1, y2, y3, y4, y5, lanes)


@njit(inline="always")
def _scatter(E, at, step, dx, n, h0, w0, H, W, C, T):
    """Add B e B' of 36 vectors of C, `step` floats apart, to the tile of dx whose first pixel is (h0, w0)."""
    first = ((n * H + h0) * W + w0) * C
    i0, i1, j0, j1 = max(0, -h0), min(6, H - h0), max(0, -w0), min(6, W - w0)
    for c in range(0, C, 16):
        lanes = C - c
        for j in range(6):
            e0, e1, e2, e3, e4, e5 = _load_six(E, at + j * step + c, 6 * step, lanes)
            y0, y1, y2, y3, y4, y5 = _input_adjoint(e0, e1, e2, e3, e4, e5)
            _store_six(T, 16 * j, 96, y0, y1, y2, y3, y4, y5, 16)
        for i in range(i0, i1):
            e0, e1, e2, e3, e4, e5 = _load_six(T, 96 * i, 16, 16)
            y0, y1, y2, y3, y4, y5 = _input_adjoint(e0, e1, e2, e3, e4, e5)
            _store_six(T, 96 * i, 16, y0, y1, y2, y3, y4, y5, 16)
            for j in range(j0, j1):
                o = first + (i * W + j) * C + c
                store_lanes(dx, o, load_lanes(dx, o, lanes) + load(T, 96 * i + 16 * j), lanes)


# ------------------------------------------------------------------------------------------------------ the passes


@kernel
def forward(x_, U_, bias_, y_, winners_, scratch_, P, OH, OW, ph, pw, has_bias, relu, pool):
    """Write the convolution of x (N, H, W, C), with its bias, ReLU and 2x2 max-pooling if wanted, to y (N, ..., F).

    U has the transformed weights, `winners` (y.size / F, vectors, 3) receives the comparisons of each window: its rows,
    its upper pixels, its lower pixels. The scratch has ``SMALL_SCRATCH + 36 P (C + F)`` floats.
    """
    N, H, W, C = x_.shape
    F = y_.shape[3]
    TH, TW, PH, PW = (OH + 3) // 4, (OW + 3) // 4, OH // 2, OW // 2
    x, U, bias, y, T = x_.ctypes.data, U_.ctypes.data, bias_.ctypes.data, y_.ctypes.data, scratch_.ctypes.data
    V = T + 4 * SMALL_SCRATCH
    v_step, m_step, CF = P * C, P * F, C * F
    M = V + 4 * POINTS * v_step
    vectors = (F + 15) // 16
    zero = splat(f4(0))
    tiles = N * TH * TW
    for t0 in range(0, tiles, P):
        count = min(P, tiles - t0)
        for q in range(count):
            t = t0 + q
            _gather(x, t // (TH * TW), 4 * (t // TW % TH) - ph, 4 * (t % TW) - pw, H, W, C, V, q * C, v_step, T)
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
                    m0, m1, m2, m3, m4, m5 = _load_six(M, j * m_step + q * F + f, 6 * m_step, lanes)
                    y0, y1, y2, y3 = _output_transform(m0, m1, m2, m3, m4, m5)
                    store(T, 16 * j, y0)
                    store(T, 16 * j + 96, y1)
                    store(T, 16 * j + 192, y2)
                    store(T, 16 * j + 288, y3)
                for i in range(4):
                    m0, m1, m2, m3, m4, m5 = _load_six(T, 96 * i, 16, 16)
                    y0, y1, y2, y3 = _output_transform(m0, m1, m2, m3, m4, m5)
                    store(T, 96 * i, y0)
                    store(T, 96 * i + 16, y1)
                    store(T, 96 * i + 32, y2)
                    store(T, 96 * i + 48, y3)
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
def backward(x_, UT_, dy_, y_, winners_, dU_, d_bias_, dx_, scratch_, P, OH, OW, ph, pw, relu, pool, wanted):
    """Write the gradients dU (36, C, F) and d_bias (F,) and, if `wanted`, that of x.

    UT has the transformed weights with C and F exchanged; dy, y and `winners` are those of `forward`.
    """
    N, H, W, C = x_.shape
    F = dy_.shape[3]
    TH, TW = (OH + 3) // 4, (OW + 3) // 4
    x, UT, dy, y, dU, dx = (
        x_.ctypes.data,
        UT_.ctypes.data,
        dy_.ctypes.data,
        y_.ctypes.data,
        dU_.ctypes.data,
        dx_.ctypes.data,
    )
    d_bias, T = d_bias_.ctypes.data, scratch_.ctypes.data
    V = T + 4 * SMALL_SCRATCH
    v_step, d_step, CF = P * C, P * F, C * F
    D = V + 4 * POINTS * v_step
    d_bias_[:] = 0
    if wanted:
        dx_[...] = 0
    tiles = N * TH * TW
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
                    o = 16 * j
                    e0, e1, e2, e3, e4, e5 = _output_adjoint(
                        load(T, o), load(T, o + 96), load(T, o + 192), load(T, o + 288)
                    )
                    _store_six(T, o, 96, e0, e1, e2, e3, e4, e5, 16)
                for i in range(6):
                    o = 96 * i
                    e0, e1, e2, e3, e4, e5 = _output_adjoint(
                        load(T, o), load(T, o + 16), load(T, o + 32), load(T, o + 48)
                    )
                    _store_six(D, 6 * i * d_step + q * F + f, d_step, e0, e1, e2, e3, e4, e5, lanes)
                # Point (1, 1) is the sum over the 16 outputs.
                total = load_lanes(d_bias, f, lanes) + load_lanes(D, 7 * d_step + q * F + f, lanes)
                store_lanes(d_bias, f, total, lanes)
        for k in range(POINTS):
            at = D + 4 * k * d_step
            product(V + 4 * k * v_step, 1, 0, C, at, 0, F, dU + 4 * k * CF, F, 1, C, count, F, 1 if t0 else 0)
            if wanted:
                packed_product(at, F, 0, 1, UT + 4 * k * CF, F, 0, 0, 1, V + 4 * k * v_step, C, 1, count, F, C, 0)
        if wanted:
            for q in range(count):
                t = t0 + q
                n, h0, w0 = t // (TH * TW), 4 * (t // TW % TH) - ph, 4 * (t % TW) - pw
                _scatter(V, q * C, v_step, dx, n, h0, w0, H, W, C, T)
