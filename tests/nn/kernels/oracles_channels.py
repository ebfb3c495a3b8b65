"""Oracles of compiled sums over pixels and of BatchNorm: the order of operations of `sums` and `batch_norm`."""

import math

import numpy as np

from tests.nn.kernels.exact import fma

f4, f8 = np.float32, np.float64


def _sums(group_values, single_values, C):
    """Return the float64 sums of channels of values (M, C).

    `group_values` maps a group (8, L) to float64 (L,), `single_values` a line to float64.
    """

    def sums(*arrays):
        least = math.lcm(C, 16)
        L = least * max(1, 512 // least)
        runs = [a.reshape(-1) for a in arrays]
        groups = runs[0].size // (8 * L)
        totals = np.zeros(L)
        for g in range(groups):
            totals += group_values(*(run[8 * L * g : 8 * L * (g + 1)].reshape(8, L) for run in runs))
        for start in range(8 * L * groups, runs[0].size, L):
            line = [run[start : start + L] for run in runs]
            totals[: line[0].size] += single_values(*line)
        result = np.zeros(C)
        for position in totals.reshape(-1, C):
            result += position
        return result

    return sums


def _sum8(v):
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))


def _products8(v, w):
    a, b, c, d = (fma(v[i + 1], w[i + 1], v[i] * w[i]) for i in (0, 2, 4, 6))
    return (a + b) + (c + d)


def _squares8(v):
    total = _sum8(v)
    m = v - total * f4(0.125)
    return _products8(m, m).astype(f8) + total.astype(f8) ** 2 * 0.125


def channel_sums(x):
    return _sums(lambda v: _sum8(v).astype(f8), lambda v: v.astype(f8), x.shape[-1])(x)


def channel_squares(x):
    return _sums(_squares8, lambda v: v.astype(f8) ** 2, x.shape[-1])(x)


def channel_products(x, y):
    return _sums(lambda v, w: _products8(v, w).astype(f8), lambda v, w: (v * w).astype(f8), x.shape[-1])(x, y)


class BatchNormOracle:
    """y and the gradients of a BatchNorm with the addend and ReLU that follow it."""

    def __init__(self, gamma, beta, epsilon=1e-5, *, relu=False):
        self.gamma, self.beta, self.epsilon, self.relu = gamma, beta, f4(epsilon), relu

    def forward(self, x, addend=None):
        M = float(x.size // x.shape[-1])
        self.sums, self.squares = channel_sums(x), channel_squares(x)
        variance = (self.squares - self.sums * self.sums / M) / M
        variance = np.where(variance < 0, 0, variance).astype(f4)
        return self.evaluate(x, (self.sums / M).astype(f4), variance, addend)

    def evaluate(self, x, mean, variance, addend=None):
        self.x, self.mean = x, mean
        self.inverse = f4(1) / np.sqrt(variance + self.epsilon)
        self.scale = self.inverse * self.gamma
        y = fma(x - mean, self.scale, self.beta)
        if addend is not None:
            y = y + addend
        self.y = np.where(y > 0, y, np.where(np.isnan(y), y, f4(0))) if self.relu else y
        return self.y

    def backward(self, dy):
        M = float(dy.size // dy.shape[-1])
        self.masked = g = np.where(self.y > 0, dy, f4(0)) if self.relu else dy
        centred = self.x - self.mean
        total, products = channel_sums(g), channel_products(g, centred)
        inverse, scale = self.inverse.astype(f8), self.scale.astype(f8)
        self.d_beta, self.d_gamma = total.astype(f4), (products * inverse).astype(f4)
        a, b = (-scale * inverse * products * inverse / M).astype(f4), (-scale * total / M).astype(f4)
        return fma(g, self.scale, fma(centred, a, b))
