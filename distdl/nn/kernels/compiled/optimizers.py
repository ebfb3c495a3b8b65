"""Compiled rules of optimizers, and the norm of a vector: one pass over memory each.

Each element gets the operations of the rule in `distdl.optim`, in its order: the bits are those of the NumPy form.

Legend: w parameters, g gradient, lambda_ weight decay, rate learning rate; the others are the settings and the state of
the optimizer. Numbers are rounded to float32 first, as NumPy does.

`segments_` (n, 3) lists start, stop and mode of ranges of elements. The modes: `DECAY` adds ``lambda_ w`` to the
gradient, `L1` adds ``l1 sign(w)``, 3 does both. For AdamW, `DECAY` multiplies w by `lambda_` instead.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

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


@kernel
def sgd(w_, g_, segments_, lambda_, l1, rate):
    """Compute ``w - rate g``."""
    w, g = w_.ctypes.data, g_.ctypes.data
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            G = _decayed(W, load_lanes(g, at, lanes), mode, lambda_, l1)
            store_lanes(w, at, W - G * splat(rate), lanes)


@kernel
def momentum(w_, g_, v_, segments_, lambda_, l1, rate, factor):
    """Compute ``v = factor v + g`` and ``w - rate v``."""
    w, g, v = w_.ctypes.data, g_.ctypes.data, v_.ctypes.data
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            G = _decayed(W, load_lanes(g, at, lanes), mode, lambda_, l1)
            V = load_lanes(v, at, lanes) * splat(factor) + G
            store_lanes(v, at, V, lanes)
            store_lanes(w, at, W - V * splat(rate), lanes)


@kernel
def nesterov(w_, g_, v_, segments_, lambda_, l1, rate, factor):
    """Compute ``v = factor v + g`` and ``w - (factor v + g) rate``."""
    w, g, v = w_.ctypes.data, g_.ctypes.data, v_.ctypes.data
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            G = _decayed(W, load_lanes(g, at, lanes), mode, lambda_, l1)
            V = load_lanes(v, at, lanes) * splat(factor) + G
            store_lanes(v, at, V, lanes)
            store_lanes(w, at, W - (V * splat(factor) + G) * splat(rate), lanes)


@kernel
def squares(w_, g_, h_, segments_, lambda_, l1, rate, kept, added, epsilon):
    """Compute ``h = kept h + (g g) added`` and ``w - (g / (sqrt(h) + epsilon)) rate``: AdaGrad and RMSProp."""
    w, g, h = w_.ctypes.data, g_.ctypes.data, h_.ctypes.data
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            G = _decayed(W, load_lanes(g, at, lanes), mode, lambda_, l1)
            H = load_lanes(h, at, lanes) * splat(kept) + (G * G) * splat(added)
            store_lanes(h, at, H, lanes)
            store_lanes(w, at, W - G / (square_root(H) + splat(epsilon)) * splat(rate), lanes)


@kernel
def adam(w_, g_, m_, v_, segments_, decoupled, lambda_, l1, rate, kept_m, added_m, kept_v, added_v, root, epsilon):
    """Compute the moments m and v, then ``w - (m / (sqrt(v) / root + epsilon)) rate``.

    ``m = m kept_m + g added_m`` and ``v = v kept_v + (g g) added_v``.
    """
    w, g, m, v = w_.ctypes.data, g_.ctypes.data, m_.ctypes.data, v_.ctypes.data
    for s in range(len(segments_)):
        stop, mode = segments_[s, 1], segments_[s, 2]
        for at in range(segments_[s, 0], stop, WIDTH):
            lanes = stop - at
            W = load_lanes(w, at, lanes)
            if decoupled and mode & DECAY:
                W = W * splat(lambda_)
                G = _decayed(W, load_lanes(g, at, lanes), mode & L1, lambda_, l1)
            else:
                G = _decayed(W, load_lanes(g, at, lanes), mode, lambda_, l1)
            M = load_lanes(m, at, lanes) * splat(kept_m) + G * splat(added_m)
            V = load_lanes(v, at, lanes) * splat(kept_v) + (G * G) * splat(added_v)
            store_lanes(m, at, M, lanes)
            store_lanes(v, at, V, lanes)
            step = M / (square_root(V) / splat(root) + splat(epsilon))
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
            total += float(partial_[chain])
    return total


@kernel
def wide_sum_of_squares(vector_):
    """Return the sum of the squares in float64, one chain in ascending order: for squares that overflow float32."""
    total = 0.0
    for x in vector_:
        total += float(x) * float(x)
    return total


_partial = np.empty(CHAINS, np.float32)


def norm(vector: NDArray[np.float32]) -> float:
    """Return the Euclidean norm; see `sum_of_squares`."""
    total = sum_of_squares(vector, _partial) if vector.dtype == np.float32 else np.inf
    return float(np.sqrt(total if np.isfinite(total) else wide_sum_of_squares(vector)))


def _numbers(*numbers: float) -> list[np.float32]:
    return [np.float32(number) for number in numbers]


def _sgd(o: Any, w: Any, g: Any, segments: Any, rate: float, step: int) -> None:
    sgd(w, g, segments, *_numbers(o.weight_decay, o.l1, rate))


def _momentum(o: Any, w: Any, g: Any, segments: Any, rate: float, step: int) -> None:
    momentum(w, g, o.state["momentum_buffer"], segments, *_numbers(o.weight_decay, o.l1, rate, o.momentum))


def _nesterov(o: Any, w: Any, g: Any, segments: Any, rate: float, step: int) -> None:
    nesterov(w, g, o.state["velocity"], segments, *_numbers(o.weight_decay, o.l1, rate, o.momentum))


def _adagrad(o: Any, w: Any, g: Any, segments: Any, rate: float, step: int) -> None:
    squares(w, g, o.state["sum_of_squares"], segments, *_numbers(o.weight_decay, o.l1, rate, 1, 1, o.epsilon))


def _rmsprop(o: Any, w: Any, g: Any, segments: Any, rate: float, step: int) -> None:
    numbers = _numbers(o.weight_decay, o.l1, rate, o.beta2, 1 - o.beta2, o.epsilon)
    squares(w, g, o.state["mean_of_squares"], segments, *numbers)


def _adam(o: Any, w: Any, g: Any, segments: Any, rate: float, step: int, decay: float | None = None) -> None:
    """Take a step of Adam; with a factor `decay`, of AdamW."""
    root, corrected = o.corrections(rate, step)
    numbers = _numbers(
        o.weight_decay if decay is None else decay, o.l1, corrected, o.beta1, 1 - o.beta1, o.beta2, 1 - o.beta2, root,
        o.epsilon,
    )  # fmt: skip
    adam(w, g, o.state["first_moment"], o.state["second_moment"], segments, decay is not None, *numbers)


def _adamw(o: Any, w: Any, g: Any, segments: Any, rate: float, step: int) -> None:
    _adam(o, w, g, segments, rate, step, decay=1 - rate * o.weight_decay)


#: The name of an optimizer is that of its class in lower case.
_RULES: dict[str, Callable[..., None]] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "nesterov": _nesterov,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adamw,
}


def optimizer_rule(name: str) -> Callable[[Any], Callable[..., None]] | None:
    """Return a function from an optimizer of this name to its update; see ``distdl.optim.Optimizer``."""
    apply = _RULES.get(name)
    return None if apply is None else lambda optimizer: partial(_update, apply, optimizer, _segments(optimizer))


def _update(
    apply: Callable[..., None], optimizer: Any, segments: Any, w: Any, g: Any, rate: float, step: int
) -> None:
    apply(optimizer, w, g, segments, rate, step)


def _segments(optimizer: Any) -> NDArray[np.int64]:
    """Return start, stop and mode of each range of elements that are updated alike."""
    mode = (DECAY if optimizer.weight_decay else 0) | (L1 if optimizer.l1 else 0)
    decayed = optimizer.decay_slices if mode else ()
    cuts = sorted({end for where in (*optimizer.updated, *decayed) for end in (where.start, where.stop)})

    def covered(slices: Iterable[slice], start: int, stop: int) -> bool:
        return any(where.start <= start and stop <= where.stop for where in slices)

    found = [
        (start, stop, mode if covered(decayed, start, stop) else 0)
        for start, stop in itertools.pairwise(cuts)
        if covered(optimizer.updated, start, stop)
    ]
    return np.array(found, np.int64).reshape(-1, 3)
