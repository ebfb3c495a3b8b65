"""The updates of optimizers, and the sum of squares of a vector: one pass over memory each.

Each element gets the operations of the rule in `distdl.optim`, in its order: the bits are those of the NumPy form.

Legend: w parameters, g gradient, lambda_ weight decay, rate learning rate; the others are the settings and the state of
the optimizer. Numbers are rounded to float32 first, as NumPy does.

The gradient is given as a sum over samples: ``g = (sum scale) / samples``. For a power of two, `samples` is 1 and
`scale` is its inverse. The product is then the quotient, to the last bit, and it is faster.

**Subnormal numbers.** The moments of a weight whose gradient stays 0 (a dead ReLU, say) shrink below 2^-126. There a
CPU takes more than a hundred cycles for a multiplication or division. So Adam, Momentum and Nesterov
multiply them as integers, with the same bits, and take no step that is too small to change w.

`segments_` (n, 3) lists start, stop and mode of ranges of elements. Mode 1 adds ``lambda_ w`` to the gradient, mode 2
adds ``l1 sign(w)``, mode 3 adds both. For AdamW, modes 1 and 3 multiply w by `lambda_` instead.
"""

import numpy as np
from numba import njit

from distdl.nn.kernels.compiled.integers import FACTOR_BITS, subnormal, subnormal_product
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import (
    WIDTH,
    fma,
    greater,
    load,
    load_lanes,
    select,
    splat,
    square_root,
    store_lanes,
)

DECAY, L1 = 1, 2
#: Lanes of the partial sums of a norm, and elements whose squares are added in float32.
CHAINS, BLOCK = 4 * WIDTH, 4096
#: A subnormal moment, at most this rate, at least this epsilon: the step is below 2^-56. So it does not change a weight
#: of at least `LEAST_WEIGHT`, whose neighbours are at least 2^-54 away.
MOST_RATE, LEAST_EPSILON, LEAST_WEIGHT = np.float32(2.0**10), np.float32(2.0**-60), np.float32(2.0**-30)
_NONE = np.uint16(0)


@njit(inline="always")
def _mean(g, at, lanes, scale, samples):
    """Return elements of the mean gradient."""
    mean = load_lanes(g, at, lanes) * splat(scale)
    return mean / splat(samples) if samples != 1 else mean


@njit(inline="always")
def _decayed(w, g, mode, lambda_, l1):
    """Return the gradient with the terms of weight decay and L1."""
    if mode & DECAY:
        g = g + w * splat(lambda_)
    if mode & L1:
        zero = splat(np.float32(0))
        negative = select(greater(zero, w), splat(-l1), w - w)  # 0, or NaN
        g = g + select(greater(w, zero), splat(l1), negative)
    return g


@njit(inline="always")
def _quotient(x, divisor, inverse):
    """Return ``x / divisor``, rounded once; `inverse` is ``1 / divisor``. It is faster than a division of vectors.

    The first correction leaves an error below one unit in the last place. Then the second remainder is exact, and the
    second correction gives the rounded quotient (Markstein 1990). x is a square root, so nothing underflows.
    """
    y, negative = splat(inverse), splat(-divisor)
    q = x * y
    q = fma(fma(q, negative, x), y, q)
    q = fma(fma(q, negative, x), y, q)
    return select(greater(splat(np.float32(np.inf)), x), q, x)


@njit(inline="always")
def _factor(factor):
    """Return a factor as an integer for `subnormal_product`; return -1 if it is not such a number."""
    scaled = np.float64(factor) * 2.0**FACTOR_BITS
    return np.int64(scaled) if scaled >= 0 and scaled <= 2.0**FACTOR_BITS and np.floor(scaled) == scaled else -1


@njit(inline="always")
def _shrunk(x, factor, integer):
    """Return ``x * factor``."""
    small = subnormal(x) if integer >= 0 else _NONE
    product = select(small, splat(np.float32(0)), x) * splat(factor)
    if small != 0:
        product = select(small, subnormal_product(x, integer), product)
    return product


@njit(inline="always")
def _negligible(x, w, may_skip):
    """Return the lanes in which the product of x and the rate, or a quotient of it, is too small to change w."""
    small = subnormal(x) if may_skip else _NONE
    if small != 0:
        small = np.uint16(small & (greater(w, splat(LEAST_WEIGHT)) | greater(splat(-LEAST_WEIGHT), w)))
    return small


@kernel
def sgd(w_, g_, segments_, scale, samples, lambda_, l1, rate):
    """Compute ``w - rate g``."""
    w, g = w_.ctypes.data, g_.ctypes.data
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            G = _decayed(W, _mean(g, at, lanes, scale, samples), mode, lambda_, l1)
            store_lanes(w, at, W - G * splat(rate), lanes)


@kernel
def momentum(w_, g_, v_, segments_, scale, samples, lambda_, l1, rate, factor):
    """Compute ``v = factor v + g`` and ``w - rate v``."""
    w, g, v = w_.ctypes.data, g_.ctypes.data, v_.ctypes.data
    integer, zero, may_skip = _factor(factor), splat(np.float32(0)), abs(rate) <= MOST_RATE
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            G = _decayed(W, _mean(g, at, lanes, scale, samples), mode, lambda_, l1)
            V = _shrunk(load_lanes(v, at, lanes), factor, integer) + G
            store_lanes(v, at, V, lanes)
            V = select(_negligible(V, W, may_skip), zero, V)
            store_lanes(w, at, W - V * splat(rate), lanes)


@kernel
def nesterov(w_, g_, v_, segments_, scale, samples, lambda_, l1, rate, factor):
    """Compute ``v = factor v + g`` and ``w - (factor v + g) rate``."""
    w, g, v = w_.ctypes.data, g_.ctypes.data, v_.ctypes.data
    integer, zero, may_skip = _factor(factor), splat(np.float32(0)), abs(rate) <= MOST_RATE
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            G = _decayed(W, _mean(g, at, lanes, scale, samples), mode, lambda_, l1)
            V = _shrunk(load_lanes(v, at, lanes), factor, integer) + G
            store_lanes(v, at, V, lanes)
            step = _shrunk(V, factor, integer) + G
            step = select(_negligible(step, W, may_skip), zero, step)
            store_lanes(w, at, W - step * splat(rate), lanes)


@kernel
def squares(w_, g_, h_, segments_, scale, samples, lambda_, l1, rate, kept, added, epsilon):
    """Compute ``h = kept h + (g g) added`` and ``w - (g / (sqrt(h) + epsilon)) rate``: AdaGrad and RMSProp."""
    w, g, h = w_.ctypes.data, g_.ctypes.data, h_.ctypes.data
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            G = _decayed(W, _mean(g, at, lanes, scale, samples), mode, lambda_, l1)
            H = load_lanes(h, at, lanes) * splat(kept) + (G * G) * splat(added)
            store_lanes(h, at, H, lanes)
            store_lanes(w, at, W - G / (square_root(H) + splat(epsilon)) * splat(rate), lanes)


@kernel
def adam(
    w_, g_, m_, v_, segments_, decoupled, scale, samples, lambda_, l1, rate, kept_m, added_m, kept_v, added_v, root,
    epsilon,
):  # fmt: skip
    """Compute the moments m and v, then ``w - (m / (sqrt(v) / root + epsilon)) rate``.

    ``m = m kept_m + g added_m`` and ``v = v kept_v + (g g) added_v``.
    """
    w, g, m, v = w_.ctypes.data, g_.ctypes.data, m_.ctypes.data, v_.ctypes.data
    inverse, zero = np.float32(1) / root, splat(np.float32(0))
    integer_m, integer_v = _factor(kept_m), _factor(kept_v)
    may_skip = abs(rate) <= MOST_RATE and epsilon >= LEAST_EPSILON
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            if decoupled and mode & DECAY:
                W = W * splat(lambda_)
                G = _decayed(W, _mean(g, at, lanes, scale, samples), mode & L1, lambda_, l1)
            else:
                G = _decayed(W, _mean(g, at, lanes, scale, samples), mode, lambda_, l1)
            M = _shrunk(load_lanes(m, at, lanes), kept_m, integer_m) + G * splat(added_m)
            V = _shrunk(load_lanes(v, at, lanes), kept_v, integer_v) + (G * G) * splat(added_v)
            store_lanes(m, at, M, lanes)
            store_lanes(v, at, V, lanes)
            skipped = _negligible(M, W, may_skip)
            M, V = select(skipped, zero, M), select(np.uint16(skipped & subnormal(V)), zero, V)
            step = M / (_quotient(square_root(V), root, inverse) + splat(epsilon))
            store_lanes(w, at, W - step * splat(rate), lanes)


@kernel
def sum_of_squares(vector_, partial_):
    """Return the sum of the squares, in float64. `partial_` (64,) is scratch.

    Each block of 4,096 elements has 64 chains of float32 fused multiply-adds: element i belongs to chain i mod 64, in
    ascending order, from 0. The chains of all blocks are added in float64, in ascending order.
    """
    x, partial = vector_.ctypes.data, partial_.ctypes.data
    total = 0.0
    for start in range(0, len(vector_), BLOCK):
        stop = min(start + BLOCK, len(vector_))
        a = b = c = d = splat(np.float32(0))
        at = start
        while at + CHAINS <= stop:
            A, B, C, D = load(x, at), load(x, at + WIDTH), load(x, at + 2 * WIDTH), load(x, at + 3 * WIDTH)
            a, b, c, d = fma(A, A, a), fma(B, B, b), fma(C, C, c), fma(D, D, d)
            at += CHAINS
        store_lanes(partial, 0, a, WIDTH)
        store_lanes(partial, WIDTH, b, WIDTH)
        store_lanes(partial, 2 * WIDTH, c, WIDTH)
        store_lanes(partial, 3 * WIDTH, d, WIDTH)
        for chain in range(0, stop - at, WIDTH):
            rest = load_lanes(x, at + chain, stop - at - chain)
            store_lanes(partial, chain, fma(rest, rest, load(partial, chain)), WIDTH)
        for chain in range(CHAINS):
            total += np.float64(partial_[chain])
    return total


@kernel
def wide_sum_of_squares(vector_):
    """Return the sum of the squares in float64, one chain in ascending order: for squares that overflow float32."""
    total = 0.0
    for x in vector_:
        total += np.float64(x) * np.float64(x)
    return total
