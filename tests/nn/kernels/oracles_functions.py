"""Plain forms of the compiled functions, losses, affine layers and interpolation: same operations, same bits."""

import numpy as np

from distdl.nn.kernels.compiled import double_functions as double
from distdl.nn.kernels.compiled import functions as single

from .exact import chain, fma

f4 = np.float32


def quiet(function):
    """Return the function without NumPy's warnings about infinities and NaN."""
    return np.errstate(all="ignore")(function)


# ------------------------------------------------------------------------------------------------ float32 functions


def _polynomial(x, coefficients):
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = fma(x, total, coefficient)
    return total


def _power_of_two(n):
    return ((n.astype(np.int64) + 127) << 23).astype(np.uint32).view(f4)


def _expm1_parts(x):
    s = fma(x, single.LOG2_E, single.ROUNDING)
    n = s - single.ROUNDING
    r = fma(n, -single.LN2_LOW, fma(n, -single.LN2_HIGH, x))
    return fma(r * r, _polynomial(r, single.EXP), r), np.where(np.isnan(n), 0, n).astype(np.int32)


@quiet
def exp(x):
    x = np.where(x > single.EXP_MOST, single.EXP_MOST, np.where(x < single.EXP_LEAST, single.EXP_LEAST, x))
    y, n = _expm1_parts(x)
    return (y + f4(1)) * _power_of_two(n >> 1) * _power_of_two(n - (n >> 1))


@quiet
def log(x):
    small = x < single.LEAST_NORMAL
    bits = np.where(small, x * f4(2**23), x).view(np.int32).astype(np.int64) + 0x3F800000 - single.SQRT_HALF_BITS
    n = ((bits >> 23) - 127).astype(f4) - np.where(small, f4(23), f4(0))
    f = ((bits & single.MANTISSA) + single.SQRT_HALF_BITS).astype(np.int32).view(f4) - f4(1)
    square = f * f
    y = fma(n, single.LN2_LOW, square * f * _polynomial(f, single.LOG))
    y = fma(n, single.LN2_HIGH, f + fma(f4(-0.5), square, y))
    y = np.where(x < np.inf, y, x)
    return np.where(x > 0, y, np.where(x == 0, f4(-np.inf), f4(np.nan)))


@quiet
def tanh(x):
    a = np.abs(x)
    z = a * a
    y, n = _expm1_parts(f4(2) * np.where(a > single.TANH_MOST, single.TANH_MOST, a))
    large = f4(1) - f4(2) / ((y + f4(1)) * _power_of_two(n) + f4(1))
    return np.copysign(np.where(a < 1, fma(a * z, _polynomial(z, single.TANH), a), large), x)


@quiet
def sigmoid(x):
    e = exp(-np.abs(x))
    u, d = np.where(x >= 0, f4(1), e), f4(1) + e
    q = u / d
    rest = fma(-q, e - (d - f4(1)), fma(-q, d, u))
    return fma(rest, fma(d, f4(-0.5), f4(1.457)), q)


def _sum_of_lanes(x):
    """Return the sum of each row: 16 sums of every 16th element, which are then added."""
    lanes, total = np.zeros((len(x), 16), f4), np.zeros(len(x), f4)
    for k in range(x.shape[1]):
        lanes[:, k % 16] += x[:, k]
    for lane in range(16):
        total += lanes[:, lane]
    return total[:, np.newaxis]


@quiet
def softmax(x):
    e = exp(x - x.max(axis=1, keepdims=True))
    return e / _sum_of_lanes(e)


@quiet
def softmax_backward(y, dy):
    return (dy - _sum_of_lanes(y * dy)) * y


# ------------------------------------------------------------------------------------------------ float64 functions


def _bits(x):
    return np.asarray(x, np.float64).view(np.int64)


def _double_polynomial(x, coefficients):
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = coefficient + x * total
    return total


@quiet
def double_exp(x):
    x = np.clip(x, double.EXP_LEAST, double.EXP_MOST)
    n = (x * double.LOG2_E + double.ROUNDING) - double.ROUNDING
    high, low = x - n * double.LN2_HIGH, n * double.LN2_LOW
    r = high - low
    t = r * r
    c = r - t * _double_polynomial(t, double.EXP)
    y = 1 - ((low - (r * c) / (2 - c)) - high)
    n = np.where(np.isnan(n), 0, n).astype(np.int64)
    for part in (n >> 1, n - (n >> 1)):
        y = y * ((part + 1023) << 52).view(np.float64)
    return y


def _log_of_sum(n, f, c):
    s = f / (2 + f)
    z = s * s
    w = z * z
    even, odd = w * _double_polynomial(w, double.LOG[1::2]), z * _double_polynomial(w, double.LOG[::2])
    half = 0.5 * f * f
    return n * double.LN2_HIGH - ((half - (s * (half + (odd + even)) + (n * double.LN2_LOW + c))) - f)


@quiet
def double_log(x):
    bits = _bits(x) + (double.ONE_BITS - double.SQRT_HALF_BITS)
    f = ((bits & double.MANTISSA) + double.SQRT_HALF_BITS).view(np.float64) - 1
    return np.where(np.isnan(x), x, _log_of_sum(((bits >> 52) - 1023).astype(np.float64), f, 0.0))


@quiet
def double_log1p(x):
    u = 1 + x
    c = (x - (u - 1)) / u
    small = u < np.sqrt(2)
    return _log_of_sum(np.where(small, 0.0, 1.0), np.where(small, u - 1, 0.5 * u - 1), c)


# ----------------------------------------------------------------------------------------------------------- losses


def in_order(terms):
    """Return the sum of the terms along the first axis, in order."""
    total = np.zeros(terms.shape[1:])
    for term in terms:
        total = total + term
    return total


@quiet
def softmax_cross_entropy(z, labels, smoothing=0.0, weights=None):
    """Return loss and gradient for logits (N, ..., K) and labels (N, ...)."""
    K, rows, columns = z.shape[-1], np.arange(labels.size), labels.reshape(-1)
    s = z.reshape(-1, K).astype(np.float64)
    s = s - s.max(axis=1, keepdims=True)
    e = double_exp(s)
    sums = in_order(e.T)
    d = e / sums[:, np.newaxis]
    d[rows, columns] -= 1
    losses = double_log(sums) - s[rows, columns]
    if smoothing:
        d[rows, columns] += smoothing
        d -= smoothing / K
        losses = losses + smoothing * (s[rows, columns] - in_order(s.T) / K)
    if weights is not None:
        d, losses = d * weights[columns][:, np.newaxis], losses * weights[columns]
    if labels.ndim > 1:
        labelled = (labels != -1).reshape(len(labels), -1)
        share = labelled * (1 / np.maximum(labelled.sum(axis=1, keepdims=True), 1))
        d, losses = d * share.reshape(-1, 1), in_order((losses.reshape(share.shape) * share).T)
    return in_order(losses), d.reshape(z.shape).astype(f4)


@quiet
def sigmoid_cross_entropy(z, labels, weights=None):
    """Return loss and gradient for logits (N, 1) and labels (N,)."""
    z = z[:, 0].astype(np.float64)
    e = double_exp(-np.abs(z))
    d = np.where(z >= 0, 1, e) / (1 + e) - labels
    losses = (np.maximum(z, 0) - labels * z) + double_log1p(e)
    if weights is not None:
        d, losses = d * weights[labels], losses * weights[labels]
    return in_order(losses), d.reshape(-1, 1).astype(f4)


@quiet
def mean_squared_error(y, targets):
    """Return loss and gradient for outputs and targets (N, ...)."""
    K = y[0].size
    q = y.reshape(-1, K).astype(np.float64) - targets.reshape(-1, K)
    return in_order(in_order((q * q).T)) / K, (q * (2 / K)).reshape(y.shape).astype(f4)


# ---------------------------------------------------------------------------------------------------------- layers


@quiet
def affine(x, W, b, relu):
    y = chain(x, W) + b
    return np.where(np.isnan(y) | (y > 0), y, f4(0)) if relu else y


@quiet
def affine_backward(x, W, y, dy, relu):
    """Return dW, db and dx."""
    d = np.where(y > 0, dy, f4(0)) if relu else dy
    db = np.zeros(d.shape[1], f4)
    for row in d:
        db += row
    return chain(x.T, d), db, chain(d, W.T)


def interpolated(x, rows, columns):
    """Return images (N, H, W, C) with both axes multiplied by a matrix; zeros of the matrices do not take part."""

    def along(axis, matrix, x):
        x = np.moveaxis(x, axis, 0)
        y = np.zeros((len(matrix), *x.shape[1:]), f4)
        for i, k in np.argwhere(matrix):
            y[i] = fma(matrix[i, k], x[k], y[i])
        return np.moveaxis(y, 0, axis)

    return along(2, columns, along(1, rows, x))
