"""The layers in plain loops and float64: slow, and too simple to be wrong.

The loops visit every sample, output position and kernel element, and skip the padding.
"""

from __future__ import annotations

import numpy as np

from distdl.nn import Sequential
from distdl.rng import Key


def normal(shape, name="x", dtype=np.float64):
    """Return normal numbers that depend only on the shape and a name."""
    return Key(7).of(name).normal(int(np.prod(shape))).reshape(shape).astype(dtype)


def built(layer, input_shape, dtype=np.float64):
    """Return the layer, bound to return its input gradient, with normal numbers as parameters."""
    Sequential([layer], input_shape, dtype=dtype).bind(needs_input_gradient=True)
    for name, view in layer.parameters.items():
        view[...] = normal(view.shape, name)
    return layer


def relative_error(actual, expected):
    """Return the largest difference, relative to the largest expected entry."""
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-300)


def pixels_under_kernel(input_shape, kernel, stride, padding):
    """Yield (n, i, j, h, w, row, column): output position, kernel element, and the pixel there."""
    N, H, W, _ = input_shape
    OH = (H + 2 * padding[0] - kernel[0]) // stride[0] + 1
    OW = (W + 2 * padding[1] - kernel[1]) // stride[1] + 1
    for n, i, j in np.ndindex(N, OH, OW):
        for h, w in np.ndindex(*kernel):
            row, column = i * stride[0] + h - padding[0], j * stride[1] + w - padding[1]
            if 0 <= row < H and 0 <= column < W:
                yield n, i, j, h, w, row, column


def output_shape(input_shape, kernel, stride, padding, channels):
    N, H, W, _ = input_shape
    OH = (H + 2 * padding[0] - kernel[0]) // stride[0] + 1
    OW = (W + 2 * padding[1] - kernel[1]) // stride[1] + 1
    return (N, OH, OW, channels)


def convolution(x, weight, bias, stride, padding):
    kernel, filters = weight.shape[:2], weight.shape[3]
    y = np.zeros(output_shape(x.shape, kernel, stride, padding, filters)) + bias
    for n, i, j, h, w, row, column in pixels_under_kernel(x.shape, kernel, stride, padding):
        y[n, i, j] += x[n, row, column] @ weight[h, w]
    return y


def convolution_gradients(x, weight, dy, stride, padding):
    """Return the gradients with respect to input, weight and bias."""
    dx, d_weight, d_bias = np.zeros(x.shape), np.zeros(weight.shape), np.zeros(weight.shape[3])
    for n, i, j, h, w, row, column in pixels_under_kernel(x.shape, weight.shape[:2], stride, padding):
        dx[n, row, column] += weight[h, w] @ dy[n, i, j]
        d_weight[h, w] += np.outer(x[n, row, column], dy[n, i, j])
    for position in np.ndindex(dy.shape[:3]):
        d_bias += dy[position]
    return dx, d_weight, d_bias


def max_pooling(x, size, stride, padding):
    """Return the maxima and the (row, column) of each, the first in row-major order."""
    shape = output_shape(x.shape, size, stride, padding, x.shape[3])
    y, winners = np.full(shape, -np.inf), np.zeros((*shape, 2), int)
    for n, i, j, _, _, row, column in pixels_under_kernel(x.shape, size, stride, padding):
        for c in range(x.shape[3]):
            if x[n, row, column, c] > y[n, i, j, c]:
                y[n, i, j, c] = x[n, row, column, c]
                winners[n, i, j, c] = row, column
    return y, winners


def max_pooling_gradient(x, winners, dy):
    dx = np.zeros(x.shape)
    for n, i, j, c in np.ndindex(dy.shape):
        row, column = winners[n, i, j, c]
        dx[n, row, column, c] += dy[n, i, j, c]
    return dx


def affine(x, weight, bias):
    y = np.zeros((len(x), len(bias)))
    for n, k in np.ndindex(y.shape):
        y[n, k] = sum(x[n, d] * weight[d, k] for d in range(x.shape[1])) + bias[k]
    return y


def affine_gradients(x, weight, dy):
    dx, d_weight, d_bias = np.zeros(x.shape), np.zeros(weight.shape), np.zeros(weight.shape[1])
    for n, k in np.ndindex(dy.shape):
        d_bias[k] += dy[n, k]
        for d in range(x.shape[1]):
            dx[n, d] += dy[n, k] * weight[d, k]
            d_weight[d, k] += x[n, d] * dy[n, k]
    return dx, d_weight, d_bias


def softmax_cross_entropy(logits, labels):
    """Return the summed loss and its gradient, computed in the widest floats."""
    loss, gradient = 0.0, np.zeros(logits.shape)
    for n, label in enumerate(labels):
        z = logits[n].astype(np.longdouble)
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        loss -= float(z[label] - z.max() - np.log(np.exp(z - z.max()).sum()))
        gradient[n] = p
        gradient[n, label] -= 1
    return loss, gradient
