"""The compiled convolutions in plain NumPy: the formulas of `direct` and `winograd`, with their order of operations."""

from __future__ import annotations

import itertools

import numpy as np

from distdl.nn.kernels.compiled import winograd

from .exact import chain, fma

f4 = np.float32


def _inside(k, stride, padding, size, outputs):
    """Return the outputs at which kernel element k lies inside of the image, as a list."""
    return [o for o in range(outputs) if 0 <= o * stride + k - padding < size]


def _pairs(window, size, outputs):
    """Yield for each kernel element (i, j): the outputs that use it, and its pixels, as indices of two axes."""
    FH, FW, SH, SW, PH, PW = window
    for i in range(FH):
        for j in range(FW):
            h = np.array(_inside(i, SH, PH, size[0], outputs[0]), int)
            w = np.array(_inside(j, SW, PW, size[1], outputs[1]), int)
            yield i, j, np.ix_(h, w), np.ix_(h * SH + i - PH, w * SW + j - PW)


def convolution(x, weight, window, outputs):
    """Return one chain over (i, j, c) for each element."""
    y = np.zeros((len(x), *outputs, weight.shape[3]), f4)
    for i, j, (h, w), (row, column) in _pairs(window, x.shape[1:3], outputs):
        for c in range(weight.shape[2]):
            y[:, h, w] = fma(x[:, row, column, c, None], weight[i, j, c], y[:, h, w])
    return y


def input_gradient(d, weight, window, size):
    """Return one chain over (oh, ow, f) for each element: a higher output uses a lower element of the kernel."""
    dx = np.zeros((len(d), *size, weight.shape[2]), f4)
    for i, j, (h, w), (row, column) in reversed(list(_pairs(window, size, d.shape[1:3]))):
        for f in range(weight.shape[3]):
            dx[:, row, column] = fma(d[:, h, w, f, None], weight[i, j, :, f], dx[:, row, column])
    return dx


def as_points(window, *images):
    """Return the pixels of images as images of their own, if this is a 1x1 convolution."""
    if window != (1, 1, 1, 1, 0, 0):
        return images
    return tuple(x.reshape(-1, 1, 1, x.shape[3]) for x in images)


def chunks(shape, limit):
    """Yield the indices of the chunks of pixels (N, H, W): all rows of 1, 2, 4 ... images, or rows of one image."""
    N, H, W = shape
    images, rows = 1, max(1, limit // W)
    while 2 * images * H * W <= limit:
        images *= 2
    for n in range(0, N, images):
        for row in range(0, H, H if limit >= H * W else rows):
            yield slice(n, n + images), slice(row, row + (H if limit >= H * W else rows))


def weight_gradient(x, d, window, *, zeros_outside):
    """Return the sum of the chunks; each is one chain over (n, oh, ow)."""
    FH, FW, SH, SW, PH, PW = window
    _, H, W, C = x.shape
    if zeros_outside:
        x = np.pad(x, ((0, 0), (PH, PH + FH), (PW, PW + FW), (0, 0)))
        H, W, PH, PW = x.shape[1], x.shape[2], 0, 0
    total = None
    for images, rows in chunks(d.shape[:3], 128):
        part = np.zeros((FH, FW, C, d.shape[3]), f4)
        for n in range(len(d))[images]:
            for oh, ow in itertools.product(range(d.shape[1])[rows], range(d.shape[2])):
                h, w = oh * SH - PH, ow * SW - PW
                i, j = slice(max(0, -h), max(0, min(FH, H - h))), slice(max(0, -w), max(0, min(FW, W - w)))
                pixels = x[n, max(0, h) : max(0, h + FH), max(0, w) : max(0, w + FW)]
                part[i, j] = fma(pixels[..., None], d[n, oh, ow], part[i, j])
        total = part if total is None else total + part
    return total


def sum_of_chunks(d, limit):
    """Return the sum of the chunks over all axes but the last, each in row-major order."""
    return sum_in_order(np.array([sum_in_order(d[chunk]) for chunk in chunks(d.shape[:3], limit)], f4))


def sum_in_order(d):
    """Return the sum over all axes but the last, in row-major order, from 0."""
    total = np.zeros(d.shape[-1], f4)
    for row in d.reshape(-1, d.shape[-1]):
        total += row
    return total


def _maximum(x, y):
    """Return the greater one: NaN wins, and of equal ones y."""
    return np.where(np.isnan(x) | (x > y), x, y)


def finish(sums, bias, *, relu, pool):
    """Return the output for the sums of a convolution, and the comparisons of each 2x2 window."""
    winners = None
    if pool:
        H, W = sums.shape[1] // 2 * 2, sums.shape[2] // 2 * 2
        a0, a1 = sums[:, :H:2, :W:2], sums[:, :H:2, 1:W:2]
        b0, b1 = sums[:, 1:H:2, :W:2], sums[:, 1:H:2, 1:W:2]
        above, below = _maximum(a0, a1), _maximum(b0, b1)
        winners = above >= below, a0 >= a1, b0 >= b1
        sums = _maximum(above, below)
    y = sums if bias is None else sums + bias
    return _maximum(y, np.zeros_like(y)) if relu else y, winners


def masked(dy, y, winners, outputs, *, relu):
    """Return the gradient before ReLU, and that before pooling."""
    zero = f4(0)
    if relu:
        dy = np.where(y > 0, dy, zero)
    if winners is None:
        return dy, dy
    upper, left, lower_left = winners
    d = np.zeros((len(dy), *outputs, dy.shape[3]), f4)
    H, W = 2 * dy.shape[1], 2 * dy.shape[2]
    d[:, :H:2, :W:2] = np.where(upper & left, dy, zero)
    d[:, :H:2, 1:W:2] = np.where(upper & ~left, dy, zero)
    d[:, 1:H:2, :W:2] = np.where(~upper & lower_left, dy, zero)
    d[:, 1:H:2, 1:W:2] = np.where(~upper & ~lower_left, dy, zero)
    return dy, d


# ------------------------------------------------------------------------------------------------------- winograd


def _both(transform, tiles):
    """Apply a transform along the rows of tiles (i, j, ...), then along their columns."""
    rows = np.stack(transform(*tiles))
    return np.stack(transform(*rows.swapaxes(0, 1))).swapaxes(0, 1)


def _tiles(x, first, size, counts):
    """Return the tiles of images, with zeros outside: (size, size, N TH TW, C), every four pixels."""
    TH, TW = counts
    N, H, W, C = x.shape
    tiles = np.zeros((size, size, N, TH, TW, C), f4)
    for i, j, th, tw in np.ndindex(size, size, TH, TW):
        h, w = 4 * th + i + first[0], 4 * tw + j + first[1]
        if 0 <= h < H and 0 <= w < W:
            tiles[i, j, :, th, tw] = x[:, h, w]
    return tiles.reshape(size, size, -1, C)


def winograd_convolution(x, weight, padding, outputs):
    """Return F(4x4, 3x3) for the images: one chain over the channels for each of the 36 points."""
    counts = -(-outputs[0] // 4), -(-outputs[1] // 4)
    V = _both(winograd.input_transform, _tiles(x, (-padding[0], -padding[1]), 6, counts))
    y = _both(winograd.output_transform, chain(V, _both(winograd.kernel_transform, weight)))
    y = y.reshape(4, 4, len(x), *counts, -1).transpose(2, 3, 0, 4, 1, 5)
    return y.reshape(len(x), 4 * counts[0], 4 * counts[1], -1)[:, : outputs[0], : outputs[1]]


def winograd_gradients(x, weight, d, padding):
    """Return the gradients of the weights, the bias and the input."""
    N, OH, OW, _ = d.shape
    counts = -(-OH // 4), -(-OW // 4)
    V = _both(winograd.input_transform, _tiles(x, (-padding[0], -padding[1]), 6, counts))
    D = _both(winograd.output_adjoint, _tiles(d, (0, 0), 4, counts))
    dW = _both(winograd.kernel_adjoint, chain(V.swapaxes(2, 3), D))
    U = _both(winograd.kernel_transform, np.ascontiguousarray(weight.swapaxes(2, 3)))
    E = _both(winograd.input_adjoint, chain(D, U)).reshape(6, 6, N, *counts, -1)
    dx = np.zeros(x.shape, f4)
    for th, tw in np.ndindex(counts):
        for i, j in np.ndindex(6, 6):
            h, w = 4 * th + i - padding[0], 4 * tw + j - padding[1]
            if 0 <= h < x.shape[1] and 0 <= w < x.shape[2]:
                dx[:, h, w] += E[i, j, :, th, tw]
    return dW, sum_in_order(D[1, 1]), dx
