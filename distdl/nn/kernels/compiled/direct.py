"""Direct convolution: any kernel, stride and padding, without patches in memory, and its gradients.

N images, H and W their height and width, C channels, F filters, OH and OW the size of the output; FH and FW the kernel,
SH and SW the stride, PH and PW the padding. The order of operations:

- ``y[n, oh, ow, f]``: one chain of fused multiply-adds (see `products`) over the kernel's elements (i, j, c) in
  ascending order. It skips those that lie outside of the image. Then the maximum of 2x2 pixels, the bias and the ReLU.
- ``dx[n, h, w, c]``: one chain over (oh, ow, f) in ascending order, of the outputs that use this pixel.
- ``dW[i, j, c, f]``: one chain over (n, oh, ow) in ascending order for each chunk of images or rows (see
  `convolution.chunk`), from 0; the first plus the second and so on. A chain skips pixels outside of the image; in
  `weight_gradient_of_few` they count as zeros.
- ``db[f]``: from 0, the sum of each chunk is added; it is a sum over (n, oh, ow) in ascending order, from 0. After
  pooling, a chunk is a row of windows.

Chunks keep the rounding errors of long sums small. No size of a block changes the bits. A block of samples has the same
pixel of all its images as the rows of a product, or all pixels of a row of one image, whichever is faster.
"""

import numpy as np
from numba import njit

from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.products import block_width, packed_product, product, transpose
from distdl.nn.kernels.compiled.simd import (
    greater,
    greater_equal,
    load_lanes,
    load_number,
    maximum,
    select,
    splat,
    store_lanes,
    store_number,
)

#: Channels whose pixels lie together in the copies of `weight_gradient_by_copies`.
PANEL = 48

f4 = np.float32


# ------------------------------------------------------------------------------------------------------ convolution


@njit(inline="always")
def _range(o, stride, padding, kernel, size):
    """Return the first kernel element that lies inside of the image at output o, and that behind the last one."""
    start = o * stride - padding
    first = max(0, -start)
    return first, max(first, min(kernel, size - start))


@njit(inline="always")
def _inner(outputs, stride, padding, kernel, size):
    """Return the outputs for which the whole kernel lies inside of the image: the first, and that behind the last."""
    first = min(outputs, max(0, -(-padding // stride)))
    return first, max(first, min(outputs, (size + padding - kernel) // stride + 1))


@njit
def _rows(x, count, H, W, C, weights, F, window, y, y_n, y_h, y_w, h0, h1, OW, by_pixels):
    """Write rows h0 to h1 of the convolution of `count` images x, the first OW pixels of each, to y.

    Each product has one pixel of all images. Or, with `by_pixels`, the inner pixels of one row of one image; the pixels
    at the sides of all inner rows come together.
    """
    FH, FW, SH, SW, PH, PW = window
    w_in, w_out = _inner(OW, SW, PW, FW, W)
    h_in, h_out = _inner(h1, SH, PH, FH, H)
    h_in = max(h0, h_in)
    for n in range(count if by_pixels else 1):
        for h in range(h0, h1):
            i0, i1 = _range(h, SH, PH, FH, H)
            for run in range(1 + OW - w_out + w_in if by_pixels else OW):
                w, M, a_m, y_m = run, count, H * W * C, y_n
                if by_pixels and run == 0:
                    w, M, a_m, y_m = w_in, w_out - w_in, SW * C, y_w
                elif by_pixels:
                    w, M, a_m, y_m = run - 1, 1, SH * W * C, y_h
                    if w >= w_in:
                        w += w_out - w_in
                    if h_in <= h < h_out:
                        if h > h_in:
                            break
                        M = h_out - h_in
                j0, j1 = _range(w, SW, PW, FW, W)
                at = x + 4 * ((n * H + h * SH - PH + i0) * W + w * SW - PW + j0) * C
                to = y + 4 * (n * y_n + (h - h0) * y_h + w * y_w)
                row, K = (i0 * FW + j0) * C, (j1 - j0) * C
                packed_product(at, a_m, W * C, 1, weights, FH * FW * C, row, FW * C, 1, to, y_m, i1 - i0, M, K, F, 0)


@njit(inline="always")
def _finish(y, pixels, F, bias, has_bias, relu):
    """Add the bias to these pixels, and set negative values to zero, if wanted."""
    zero = splat(f4(0))
    for f in range(0, F, 16):
        lanes, b = F - f, zero
        if has_bias:
            b = load_lanes(bias, f, lanes)
        for p in range(pixels):
            v = load_lanes(y, p * F + f, lanes)
            if has_bias:
                v = v + b
            if relu:
                v = maximum(v, zero)
            store_lanes(y, p * F + f, v, lanes)


@njit(inline="always")
def _finish_pooled(rows, OW, y, PW, F, bias, has_bias, relu, winners_, first):
    """Write the maxima of 2x2 pixels of these two rows (2, OW, F) to y, and the winners from index `first` on."""
    zero, vectors = splat(f4(0)), (F + 15) // 16
    for f in range(0, F, 16):
        lanes, b = F - f, zero
        if has_bias:
            b = load_lanes(bias, f, lanes)
        for w in range(PW):
            o = 2 * w * F + f
            a0, a1 = load_lanes(rows, o, lanes), load_lanes(rows, o + F, lanes)
            b0, b1 = load_lanes(rows, o + OW * F, lanes), load_lanes(rows, o + OW * F + F, lanes)
            above, below = maximum(a0, a1), maximum(b0, b1)
            k = (first + w) * vectors + f // 16
            winners_[k, 0] = greater_equal(above, below)
            winners_[k, 1] = greater_equal(a0, a1)
            winners_[k, 2] = greater_equal(b0, b1)
            v = maximum(above, below)
            if has_bias:
                v = v + b
            if relu:
                v = maximum(v, zero)
            store_lanes(y, w * F + f, v, lanes)


@kernel
def convolve(
    x_, x_first, count, weights_, weights_first, bias_, y_, y_first, winners_, scratch_, FH, FW, SH, SW, PH, PW, OH, OW,
    top, left, down, right, block, rows, by_pixels, has_bias, relu, pool,
):  # fmt: skip
    """Convolve `count` images of x (N, H, W, C), from `x_first` on; write to y (N, ..., F), from `y_first` on.

    Bias, ReLU and 2x2 max-pooling follow if wanted. Without pooling, output (h, w) is pixel ``(top + h down, left + w
    right)`` of y. The matrix (FH FW C, F) of the weights is packed, and begins at `weights_first`. A block has `block`
    images and `rows` rows, an even number. `winners` is as in `winograd`. With pooling, the scratch has
    ``block rows OW F`` floats.
    """
    _, H, W, C = x_.shape
    _, YH, YW, F = y_.shape
    x, weights = np.int64(x_.ctypes.data), np.int64(weights_.ctypes.data) + 4 * weights_first
    bias, y, scratch = np.int64(bias_.ctypes.data), np.int64(y_.ctypes.data), np.int64(scratch_.ctypes.data)
    window = (FH, FW, SH, SW, PH, PW)
    for n0 in range(0, count, block):
        some = min(block, count - n0)
        images, out = x + 4 * (x_first + n0) * H * W * C, y + 4 * (y_first + n0) * YH * YW * F
        columns = 2 * YW if pool else OW
        for h in range(0, 2 * YH if pool else OH, rows):
            end = min(h + rows, 2 * YH if pool else OH)
            to, y_n, y_h, y_w = out + 4 * ((top + h * down) * YW + left) * F, YH * YW * F, down * YW * F, right * F
            if pool:
                to, y_n, y_h = scratch, rows * columns * F, columns * F
            _rows(images, some, H, W, C, weights, F, window, to, y_n, y_h, y_w, h, end, columns, by_pixels)
            for n in range(some):
                if pool:
                    for r in range(0, end - h, 2):
                        first = ((y_first + n0 + n) * YH + (h + r) // 2) * YW
                        at = scratch + 4 * (n * y_n + r * y_h)
                        _finish_pooled(at, columns, y + 4 * first * F, YW, F, bias, has_bias, relu, winners_, first)
                elif has_bias or relu:
                    _finish(to + 4 * n * y_n, (end - h) * OW, F, bias, has_bias, relu)


# -------------------------------------------------------------------------------------------------------- gradients


@njit(inline="always")
def _fill(to, offset, count):
    for c in range(0, count, 16):
        store_lanes(to, offset + c, splat(f4(0)), count - c)


@kernel
def output_gradient(dy_, y_, winners_, first, count, d_, d_bias_, OH, OW, group, rows, relu, pool):
    """Write the gradient before pooling and ReLU of `count` images, from `first` on, to d (N, OH, OW, F).

    Without ReLU and pooling it is dy, and nothing is written. Add it to d_bias, which begins with 0. A
    chunk has `rows` rows of `group` images.
    """
    F = d_bias_.size
    dy, y, d, d_bias = (
        np.int64(dy_.ctypes.data), np.int64(y_.ctypes.data), np.int64(d_.ctypes.data), np.int64(d_bias_.ctypes.data)
    )  # fmt: skip
    if first == 0:
        d_bias_[:] = 0
    zero, vectors = splat(f4(0)), (F + 15) // 16
    PH, PW = OH // 2, OW // 2
    height, width = (PH, PW) if pool else (OH, OW)  # in windows or pixels
    if pool:
        group, rows = 1, 1
    for n in range(0, count, group):
        for h in range(0, height, rows):
            some = (min(n + group, count) - n) * (min(h + rows, height) - h) * width
            start = ((first + n) * height + h) * width
            image = d + 4 * (n * OH + (2 * h if pool else h)) * OW * F
            for f in range(0, F, 16):
                lanes, total = F - f, zero
                for p in range(some):
                    at = (start + p) * F + f
                    v = load_lanes(dy, at, lanes)
                    if relu:
                        v = select(greater(load_lanes(y, at, lanes), zero), v, zero)
                    total = total + v
                    if pool:
                        k, o = (start + p) * vectors + f // 16, 2 * p * F + f
                        above, below = select(winners_[k, 0], v, zero), select(winners_[k, 0], zero, v)
                        store_lanes(image, o, select(winners_[k, 1], above, zero), lanes)
                        store_lanes(image, o + F, select(winners_[k, 1], zero, above), lanes)
                        store_lanes(image, o + OW * F, select(winners_[k, 2], below, zero), lanes)
                        store_lanes(image, o + OW * F + F, select(winners_[k, 2], zero, below), lanes)
                    elif relu:
                        store_lanes(image, p * F + f, v, lanes)
                store_lanes(d_bias, f, load_lanes(d_bias, f, lanes) + total, lanes)
            if pool and OW > 2 * PW:
                _fill(image, 2 * PW * F, F)
                _fill(image, (OW + 2 * PW) * F, F)
            if pool and OH > 2 * PH and h == PH - 1:
                _fill(image, 2 * OW * F, OW * F)


@njit(inline="always")
def _outputs(k, stride, padding, size, outputs):
    """Return the outputs at which element k of the kernel lies inside of the image: first, and behind the last."""
    first = min(outputs, max(0, -((k - padding) // stride)))
    return first, max(first, min(outputs, (size - 1 + padding - k) // stride + 1))


@njit(inline="always")
def _copy(source, at, to, offset, count):
    for c in range(0, count, 16):
        store_lanes(to, offset + c, load_lanes(source, at + c, count - c), count - c)


@kernel
def weight_gradient_by_rows(x_, x_first, d_, d_first, count, d_weights_, FH, FW, SH, SW, PH, PW, rows, add):
    """Set the gradient of the weights to that of `count` images, or with `add` add it. A chunk has `rows` rows."""
    _, H, W, C = x_.shape
    _, OH, OW, F = d_.shape
    x, d, d_weights = np.int64(x_.ctypes.data), np.int64(d_.ctypes.data), np.int64(d_weights_.ctypes.data)
    for n in range(count):
        for i in range(FH):
            h_in, h_out = _outputs(i, SH, PH, H, OH)
            for j in range(FW):
                w0, w1 = _outputs(j, SW, PW, W, OW)
                to = d_weights + 4 * (i * FW + j) * C * F
                for row in range(0, OH, rows):
                    h0 = max(h_in, row)
                    h1 = max(h0, min(h_out, row + rows))
                    A = x + 4 * (((x_first + n) * H + h0 * SH - PH + i) * W + w0 * SW - PW + j) * C
                    B = d + 4 * (((d_first + n) * OH + h0) * OW + w0) * F
                    again = 2 if add or n > 0 or row > 0 else 0
                    product(A, 1, SH * W * C, SW * C, B, OW * F, F, to, F, h1 - h0, C, w1 - w0, F, again)


@kernel
def weight_gradient_by_copies(
    x_, x_first, d_, d_first, count, d_weights_, scratch_, FH, FW, SH, SW, PH, PW, group, rows, add
):  # fmt: skip
    """Do the same with copies of the pixels of a chunk, which lie close together in the cache.

    A chunk has `rows` rows of `group` images. The scratch has ``group rows OW (C + F)`` floats.
    """
    _, H, W, C = x_.shape
    _, OH, OW, F = d_.shape
    d_weights, left = np.int64(d_weights_.ctypes.data), np.int64(scratch_.ctypes.data)
    x = np.int64(x_.ctypes.data) + 4 * x_first * H * W * C
    d = np.int64(d_.ctypes.data) + 4 * d_first * OH * OW * F
    copies = group * rows * OW
    right = left + 4 * copies * C
    for i in range(FH):
        h_in, h_out = _outputs(i, SH, PH, H, OH)
        for j in range(FW):
            w0, w1 = _outputs(j, SW, PW, W, OW)
            for n0 in range(0, count, group):
                for row in range(0, OH, rows):
                    K = 0
                    for n in range(n0, min(n0 + group, count)):
                        for h in range(max(h_in, row), min(h_out, row + rows)):
                            for w in range(w0, w1):
                                source = x + 4 * ((n * H + h * SH - PH + i) * W + w * SW - PW + j) * C
                                for c in range(0, C, PANEL):
                                    width = min(PANEL, C - c)
                                    _copy(source, c, left, c * copies + K * width, width)
                                source = d + 4 * ((n * OH + h) * OW + w) * F
                                f = 0
                                while f < F:
                                    width = block_width(f, F)
                                    _copy(source, f, right, f * copies + K * width, width)
                                    f += width
                                K += 1
                    again = 2 if add or n0 > 0 or row > 0 else 0
                    for c in range(0, C, PANEL):
                        M = min(PANEL, C - c)
                        at, to = left + 4 * c * copies, d_weights + 4 * ((i * FW + j) * C + c) * F
                        packed_product(at, 1, 0, M, right, copies, 0, 0, 1, to, F, 1, M, K, F, again)


@kernel
def weight_gradient_of_few(
    x_, x_first, d_, d_first, count, d_weights_, scratch_, FH, FW, SH, SW, PH, PW, M, group, rows, add
):  # fmt: skip
    """Do the same for few channels.

    The FH rows of an image under a row of the output are stored as (w, i, c), with zeros outside of the image. So a
    patch (j, i, c) is contiguous, and it overlaps with the next one. A product has M rows, at least FH FW C, so that
    they are cut into large tiles. The scratch has ``M F`` floats, which the calls for the next images need, ``group
    rows ((OW - 1) SW + FW) FH C`` floats, and M more.
    """
    _, H, W, C = x_.shape
    _, OH, OW, F = d_.shape
    x, d = np.int64(x_.ctypes.data), np.int64(d_.ctypes.data) + 4 * d_first * OH * OW * F
    d_weights, sums = np.int64(d_weights_.ctypes.data), np.int64(scratch_.ctypes.data)
    pixel, columns = FH * C, (OW - 1) * SW + FW
    stripe, stripes = columns * pixel, sums + 4 * M * F
    for n0 in range(0, count, group):
        for row in range(0, OH, rows):
            some = 0
            for n in range(n0, min(n0 + group, count)):
                for oh in range(row, min(row + rows, OH)):
                    for i in range(FH):
                        h = oh * SH - PH + i
                        source = x + 4 * (((x_first + n) * H + h) * W - PW) * C
                        to = stripes + 4 * (some * stripe + i * C)
                        inside = 0 <= h < H
                        w_in, w_out = min(columns, PW) if inside else columns, min(columns, W + PW)
                        for c in range(C):
                            for w in range(w_in):
                                store_number(to, w * pixel + c, f4(0))
                            for w in range(w_in, w_out):
                                store_number(to, w * pixel + c, load_number(source, w * C + c))
                            for w in range(max(w_in, w_out), columns):
                                store_number(to, w * pixel + c, f4(0))
                    some += 1
            again = 2 if add or n0 > 0 or row > 0 else 0
            at = d + 4 * (n0 * OH + row) * OW * F
            product(stripes, 1, stripe, SW * pixel, at, OW * F, F, sums, F, some, M, OW, F, again)
    for i in range(FH):
        for j in range(FW):
            _copy(sums, (j * FH + i) * C * F, d_weights, (i * FW + j) * C * F, C * F)


@kernel
def pack_for_input_gradient(weights_, packed_, SH, SW, PH, PW):
    """Write the matrices of the input gradient to `packed`, one for each of the SH SW classes of pixels.

    The pixels of class (a, b) are ``h % SH = a``, ``w % SW = b``. They use the elements i of the kernel for which SH
    divides ``a + PH - i``, in descending order, and j alike: the matrix is (elements, F) times (C). So the gradient of
    a class is a convolution of the output gradient with stride 1.
    """
    FH, FW, C, F = weights_.shape
    weights, to = np.int64(weights_.ctypes.data), np.int64(packed_.ctypes.data)
    for a in range(SH):
        ia = (a + PH) % SH
        for b in range(SW):
            jb = (b + PW) % SW
            n = 0
            while n < C:
                width = block_width(n, C)
                for i in range(ia + (FH - 1 - ia) // SH * SH, -1, -SH):
                    for j in range(jb + (FW - 1 - jb) // SW * SW, -1, -SW):
                        transpose(weights + 4 * ((i * FW + j) * C + n) * F, F, width, F, to, width)
                        to += 4 * F * width
                n += width
