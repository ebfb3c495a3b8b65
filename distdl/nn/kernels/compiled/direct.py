"""Direct convolution: any kernel, stride and padding, without patches in memory, and its gradients.

N images, H and W their height and width, C channels, F filters, OH and OW the size of the output; FH and FW the kernel,
SH and SW the stride, PH and PW the padding. The order of operations:

- ``y[n, oh, ow, f]``: one chain of fused multiply-adds (see `products`) over the kernel's elements (i, j, c) in
  ascending order. It skips those that lie outside of the image. Then the maximum of 2x2 pixels, the bias and the ReLU.
- ``dx[n, h, w, c]``: one chain over (oh, ow, f) in ascending order, of the outputs that use this pixel.
- ``dW[i, j, c, f]``: one chain over (n, oh, ow) in ascending order. It skips pixels outside of the image; they count as
  zeros if the image has few channels (`FEW`).
- ``db[f]``: a sum over (n, oh, ow) in ascending order; after pooling, over its windows.

So no size of a block changes the bits. A block of samples has the same pixel of all its images as the rows of a
product, or all pixels of a row of one image, whichever is faster.
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

#: Floats of the images of a block that the second-level cache holds, as a guide.
CACHE = 2**18
#: Below this number of channels, the gradient of the weights counts zeros outside of the image.
FEW = 16
#: From this number of output pixels on, it takes one image at a time.
MANY_PIXELS = 128
#: From this number of channels on, it copies the pixels: PANEL channels of COPIES pixels lie together.
MANY_CHANNELS = 64
PANEL, COPIES = 48, 128
#: Floats of the stripes of one product, or more for a large image.
STRIPES = 8192

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


@kernel
def _rows(x, count, H, W, C, weights, F, window, y, y_n, y_h, y_w, h0, h1, OW, by_pixels):
    """Write rows h0 to h1 of the convolution of `count` images x, the first OW pixels of each, to y."""
    FH, FW, SH, SW, PH, PW = window
    all_rows = FH * FW * C
    if not by_pixels:
        for h in range(h0, h1):
            i0, i1 = _range(h, SH, PH, FH, H)
            for w in range(OW):
                j0, j1 = _range(w, SW, PW, FW, W)
                at = x + 4 * ((h * SH - PH + i0) * W + w * SW - PW + j0) * C
                to = y + 4 * ((h - h0) * y_h + w * y_w)
                row, K = (i0 * FW + j0) * C, (j1 - j0) * C
                packed_product(
                    at, H * W * C, W * C, 1, weights, all_rows, row, FW * C, 1, to, y_n, i1 - i0, count, K, F, 0
                )
        return
    w_in, w_out = _inner(OW, SW, PW, FW, W)
    h_in, h_out = _inner(h1, SH, PH, FH, H)
    h_in = max(h0, h_in)
    h_out = max(h_in, h_out)
    for n in range(count):
        image, out = x + 4 * n * H * W * C, y + 4 * n * y_n
        for h in range(h0, h1):
            i0, i1 = _range(h, SH, PH, FH, H)
            M = w_out - w_in
            if M > 0:
                at = image + 4 * ((h * SH - PH + i0) * W + w_in * SW - PW) * C
                to, row = out + 4 * ((h - h0) * y_h + w_in * y_w), i0 * FW * C
                packed_product(
                    at, SW * C, W * C, 1, weights, all_rows, row, FW * C, 1, to, y_w, i1 - i0, M, FW * C, F, 0
                )
            step = 1
            if h_in <= h < h_out:  # the pixels at the sides of all inner rows together
                step = h_out - h_in
                if h > h_in:
                    continue
            for side in range(OW - w_out + w_in):
                w = side if side < w_in else side - w_in + w_out
                j0, j1 = _range(w, SW, PW, FW, W)
                at = image + 4 * ((h * SH - PH + i0) * W + w * SW - PW + j0) * C
                to = out + 4 * ((h - h0) * y_h + w * y_w)
                row, K = (i0 * FW + j0) * C, (j1 - j0) * C
                packed_product(
                    at, SH * W * C, W * C, 1, weights, all_rows, row, FW * C, 1, to, y_h, i1 - i0, step, K, F, 0
                )


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
def _finish_pooled(rows, OW, y, windows, PW, F, bias, has_bias, relu, winners_, first):
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


def block_of(image, output, N):
    """Return the number of images of a block, and whether the rows of products are pixels of one image."""
    H, W, C = image
    OH, OW, F = output
    by_pixels = OW > 1 and (N < 6 or OW >= 16)
    images = CACHE // (H * W * C + OH * OW * F)
    if H == W == 1:
        images = 96
    elif not by_pixels:
        images = max(24, images // 24 * 24)
    return max(1, min(images, N)), by_pixels


def rows_of_block(output, block):
    """Return the number of rows of images that `forward` computes at a time, an even one."""
    return max(2, CACHE // 4 // (output[1] * output[2] * block) // 2 * 2)


@kernel
def forward(x_, weights_, bias_, y_, winners_, scratch_, window, size, block, rows, by_pixels, has_bias, relu, pool):
    """Write the convolution of x (N, H, W, C), with its bias, ReLU and 2x2 max-pooling if wanted, to y (N, ..., F).

    `weights` is the packed matrix (FH FW C, F), `window` the kernel, stride and padding, `size` (OH, OW). A block has
    `block` images and `rows` rows, an even number. `winners` is as in `winograd`. The scratch has
    ``block rows OW F`` floats, for pooling only.
    """
    N, H, W, C = x_.shape
    F = y_.shape[3]
    OH, OW = size
    x, weights, bias, y, scratch = (
        x_.ctypes.data, weights_.ctypes.data, bias_.ctypes.data, y_.ctypes.data, scratch_.ctypes.data,
    )  # fmt: skip
    PH, PW = OH // 2, OW // 2
    for n0 in range(0, N, block):
        count = min(block, N - n0)
        images = x + 4 * n0 * H * W * C
        for h in range(0, 2 * PH if pool else OH, rows):
            if pool:
                end = min(h + rows, 2 * PH)
                y_h = 2 * PW * F
                y_n = rows * y_h
                _rows(images, count, H, W, C, weights, F, window, scratch, y_n, y_h, F, h, end, 2 * PW, by_pixels)
                for n in range(count):
                    for r in range(0, end - h, 2):
                        first = ((n0 + n) * PH + (h + r) // 2) * PW
                        at, to = scratch + 4 * (n * y_n + r * y_h), y + 4 * first * F
                        _finish_pooled(at, 2 * PW, to, 0, PW, F, bias, has_bias, relu, winners_, first)
            else:
                end = min(h + rows, OH)
                y_n = OH * OW * F
                to = y + 4 * (n0 * y_n + h * OW * F)
                _rows(images, count, H, W, C, weights, F, window, to, y_n, OW * F, F, h, end, OW, by_pixels)
                if has_bias or relu:
                    for n in range(count):
                        _finish(to + 4 * n * y_n, (end - h) * OW, F, bias, has_bias, relu)


# -------------------------------------------------------------------------------------------------------- gradients


@kernel
def _output_gradient(dy, y, winners_, n0, count, OH, OW, F, relu, pool, d, d_bias):
    """Write the gradient before pooling and ReLU to d (count, OH, OW, F); add it to d_bias."""
    zero, vectors = splat(f4(0)), (F + 15) // 16
    PH, PW = OH // 2, OW // 2
    for n in range(count):
        image = d + 4 * n * OH * OW * F
        for f in range(0, F, 16):
            lanes = F - f
            total = load_lanes(d_bias, f, lanes)
            if pool:
                for h in range(PH):
                    for w in range(PW):
                        pixel = ((n0 + n) * PH + h) * PW + w
                        v = load_lanes(dy, pixel * F + f, lanes)
                        if relu:
                            v = select(greater(load_lanes(y, pixel * F + f, lanes), zero), v, zero)
                        total = total + v
                        k, o = pixel * vectors + f // 16, (2 * h * OW + 2 * w) * F + f
                        above, below = select(winners_[k, 0], v, zero), select(winners_[k, 0], zero, v)
                        store_lanes(image, o, select(winners_[k, 1], above, zero), lanes)
                        store_lanes(image, o + F, select(winners_[k, 1], zero, above), lanes)
                        store_lanes(image, o + OW * F, select(winners_[k, 2], below, zero), lanes)
                        store_lanes(image, o + OW * F + F, select(winners_[k, 2], zero, below), lanes)
                    if OW > 2 * PW:
                        o = (2 * h * OW + 2 * PW) * F + f
                        store_lanes(image, o, zero, lanes)
                        store_lanes(image, o + OW * F, zero, lanes)
                if OH > 2 * PH:
                    for w in range(OW):
                        store_lanes(image, (2 * PH * OW + w) * F + f, zero, lanes)
            else:
                first = (n0 + n) * OH * OW * F + f
                for p in range(OH * OW):
                    v = load_lanes(dy, first + p * F, lanes)
                    if relu:
                        v = select(greater(load_lanes(y, first + p * F, lanes), zero), v, zero)
                        store_lanes(image, p * F + f, v, lanes)
                    total = total + v
            store_lanes(d_bias, f, total, lanes)


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
def _weight_gradient(x, count, H, W, C, d, OH, OW, F, window, d_weights, scratch, add):
    """Set (or with `add`, add to) the gradient of the weights that of `count` images x, given d (count, OH, OW, F)."""
    FH, FW, SH, SW, PH, PW = window
    if C < FEW:
        _weight_gradient_of_few(x, count, H, W, C, d, OH, OW, F, window, d_weights, scratch, add)
        return
    one_by_one = OH * OW >= MANY_PIXELS and C < MANY_CHANNELS
    for first in range(0, count, 1 if one_by_one else count):
        for i in range(FH):
            h0, h1 = _outputs(i, SH, PH, H, OH)
            for j in range(FW):
                w0, w1 = _outputs(j, SW, PW, W, OW)
                A = x + 4 * ((first * H + h0 * SH - PH + i) * W + w0 * SW - PW + j) * C
                B, to = d + 4 * ((first * OH + h0) * OW + w0) * F, d_weights + 4 * (i * FW + j) * C * F
                again = 1 if add or first > 0 else 0
                if one_by_one:
                    product(A, 1, SH * W * C, SW * C, B, OW * F, F, to, F, h1 - h0, C, w1 - w0, F, again)
                else:
                    strides = (H * W * C, SH * W * C, SW * C, OH * OW * F, OW * F, F)
                    _product_of_copies(A, B, strides, count, h1 - h0, w1 - w0, C, F, to, scratch, again)


@kernel
def _product_of_copies(A, B, strides, N, H, W, C, F, to, scratch, add):
    """Set C (+)= A' B, both with N H W rows, at these strides of n, h and w; copies lie close together in the cache."""
    a_n, a_h, a_w, b_n, b_h, b_w = strides
    columns = scratch + 4 * COPIES * C
    total = N * H * W
    if total == 0 and not add:
        product(A, 0, 0, 0, B, 0, 0, to, F, 0, C, 0, F, 0)
    n = h = w = 0
    for first in range(0, total, COPIES):
        K = min(COPIES, total - first)
        for k in range(K):
            source = A + 4 * (n * a_n + h * a_h + w * a_w)
            for c in range(0, C, PANEL):
                width = min(PANEL, C - c)
                _copy(source, c, scratch, c * COPIES + k * width, width)
            source = B + 4 * (n * b_n + h * b_h + w * b_w)
            f = 0
            while f < F:
                width = block_width(f, F)
                _copy(source, f, columns, f * COPIES + k * width, width)
                f += width
            w += 1
            if w == W:
                w, h = 0, h + 1
                if h == H:
                    h, n = 0, n + 1
        for c in range(0, C, PANEL):
            M = min(PANEL, C - c)
            left, rows = scratch + 4 * c * COPIES, to + 4 * c * F
            packed_product(left, 1, 0, M, columns, COPIES, 0, 0, 1, rows, F, 1, M, K, F, 1 if add or first > 0 else 0)


@njit(inline="always")
def _padded_rows(rows, F):
    """Return this number of rows or a few more, so that they are cut into large tiles."""
    step = 16 if F <= 16 else 4 if F <= 32 else 2
    return -(-rows // step) * step


@kernel
def _weight_gradient_of_few(x, count, H, W, C, d, OH, OW, F, window, d_weights, scratch, add):
    """Do the same for few channels.

    The FH rows of an image under a row of the output are stored as (w, i, c), with zeros outside of the image. So a
    patch (j, i, c) is contiguous, and it overlaps with the next one.
    """
    FH, FW, SH, SW, PH, PW = window
    size, pixel = FH * FW * C, FH * C
    M, columns = _padded_rows(size, F), (OW - 1) * SW + FW
    stripe = columns * pixel
    sums, stripes = scratch, scratch + 4 * M * F
    block, rows = max(1, STRIPES // stripe), count * OH
    for first in range(0, rows, block):
        some = min(block, rows - first)
        for row in range(first, first + some):
            n, h = row // OH, row % OH * SH - PH
            for i in range(FH):
                source = x + 4 * ((n * H + h + i) * W - PW) * C
                to = stripes + 4 * ((row - first) * stripe + i * C)
                inside = 0 <= h + i < H
                w_in, w_out = min(columns, PW) if inside else columns, min(columns, W + PW)
                for c in range(C):
                    for w in range(w_in):
                        store_number(to, w * pixel + c, f4(0))
                    for w in range(w_in, w_out):
                        store_number(to, w * pixel + c, load_number(source, w * C + c))
                    for w in range(max(w_in, w_out), columns):
                        store_number(to, w * pixel + c, f4(0))
        again = 1 if add or first > 0 else 0
        at = d + 4 * first * OW * F
        product(stripes, 1, stripe, SW * pixel, at, OW * F, F, sums, F, some, M, OW, F, again)
    for i in range(FH):
        for j in range(FW):
            _copy(sums, (j * FH + i) * C * F, d_weights, (i * FW + j) * C * F, C * F)


@kernel
def pack_for_input_gradient(weights_, window, packed_):
    """Write the matrices of `_input_gradient` to `packed`, one for each of the SH SW classes of pixels.

    The pixels of class (a, b) are ``h % SH = a``, ``w % SW = b``. They use the elements i of the kernel for which SH
    divides ``a + PH - i``, in descending order, and j alike: the matrix is (elements, F) times (C).
    """
    _, _, C, F = weights_.shape
    FH, FW, SH, SW, PH, PW = window
    weights, to = weights_.ctypes.data, packed_.ctypes.data
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


@kernel
def _input_gradient(d, count, OH, OW, F, packed, C, window, dx, H, W, by_pixels):
    """Write the gradient of `count` images dx (H, W, C): for each class of pixels a convolution of d with stride 1."""
    FH, FW, SH, SW, PH, PW = window
    at = packed
    for a in range(SH):
        ia, rows = (a + PH) % SH, (H - a + SH - 1) // SH
        FA = max(0, (FH - ia + SH - 1) // SH)
        for b in range(SW):
            jb, columns = (b + PW) % SW, (W - b + SW - 1) // SW
            FB = max(0, (FW - jb + SW - 1) // SW)
            part = (FA, FB, 1, 1, FA - 1 - (a + PH) // SH, FB - 1 - (b + PW) // SW)
            to = dx + 4 * (a * W + b) * C
            if rows > 0 and columns > 0:
                _rows(d, count, OH, OW, F, at, C, part, to, H * W * C, SH * W * C, SW * C, 0, rows, columns, by_pixels)
            at += 4 * FA * FB * F * C


def backward_scratch(window, image, output, block, masked):
    """Return the number of floats that `backward` needs; `masked` with ReLU or pooling."""
    FH, FW, _, SW, _, _ = window
    C, (OH, OW, F) = image[2], output
    if C < FEW:
        stripe = ((OW - 1) * SW + FW) * FH * C
        rest = _padded_rows.py_func(FH * FW * C, F) * F + max(STRIPES, stripe) + 16
    else:
        rest = COPIES * (C + F)
    return rest + (block * OH * OW * F if masked else 0)


@kernel
def backward(
    x_,
    packed_,
    dy_,
    y_,
    winners_,
    d_weights_,
    d_bias_,
    dx_,
    scratch_,
    window,
    size,
    block,
    by_pixels,
    relu,
    pool,
    wanted,
):
    """Write the gradients of the weights and the bias and, if `wanted`, that of x.

    `packed` is from `pack_for_input_gradient`; dy, y and `winners` are those of `forward`. The scratch has
    `backward_scratch` floats.
    """
    N, H, W, C = x_.shape
    F = dy_.shape[3]
    OH, OW = size
    x, packed, dy, y, dx, scratch = (
        x_.ctypes.data, packed_.ctypes.data, dy_.ctypes.data, y_.ctypes.data, dx_.ctypes.data, scratch_.ctypes.data,
    )  # fmt: skip
    d_weights, d_bias = d_weights_.ctypes.data, d_bias_.ctypes.data
    d_bias_[:] = 0
    for n0 in range(0, N, block):
        count = min(block, N - n0)
        d, rest = dy + 4 * n0 * OH * OW * F, scratch
        if relu or pool:
            d, rest = scratch, scratch + 4 * block * OH * OW * F
        _output_gradient(dy, y, winners_, n0, count, OH, OW, F, relu, pool, d, d_bias)
        images = x + 4 * n0 * H * W * C
        _weight_gradient(images, count, H, W, C, d, OH, OW, F, window, d_weights, rest, 1 if n0 else 0)
        if wanted:
            to = dx + 4 * n0 * H * W * C
            _input_gradient(d, count, OH, OW, F, packed, C, window, to, H, W, by_pixels)
