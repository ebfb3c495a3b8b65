"""Compiled optimizers, and the norm of a gradient: they call the kernels in `updates`.

The rules in `distdl.optim` are the definition; these have their bits.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.nn.kernels.compiled import updates

_partial = np.empty(64, np.float32)


def norm(vector: NDArray[np.float32]) -> float:
    """Return the Euclidean norm; see ``updates.sum_of_squares``."""
    total = updates.sum_of_squares(vector, _partial) if vector.dtype == np.float32 else np.inf
    return float(np.sqrt(total if np.isfinite(total) else updates.wide_sum_of_squares(vector)))


def _numbers(samples: int, *numbers: float) -> list[np.float32]:
    """Return `scale` and `samples` of the mean, then the other numbers, as float32."""
    mean = (1 / samples, 1) if samples & (samples - 1) == 0 else (1, samples)
    return [np.float32(number) for number in (*mean, *numbers)]


def _sgd(o: Any, segments: Any, w: Any, g: Any, rate: float, step: int, samples: int) -> None:
    updates.sgd(w, g, segments, *_numbers(samples, o.weight_decay, o.l1, rate))


def _momentum(o: Any, segments: Any, w: Any, g: Any, rate: float, step: int, samples: int) -> None:
    updates.momentum(
        w, g, o.state["momentum_buffer"], segments, *_numbers(samples, o.weight_decay, o.l1, rate, o.momentum)
    )


def _nesterov(o: Any, segments: Any, w: Any, g: Any, rate: float, step: int, samples: int) -> None:
    updates.nesterov(w, g, o.state["velocity"], segments, *_numbers(samples, o.weight_decay, o.l1, rate, o.momentum))


def _adagrad(o: Any, segments: Any, w: Any, g: Any, rate: float, step: int, samples: int) -> None:
    updates.squares(
        w, g, o.state["sum_of_squares"], segments, *_numbers(samples, o.weight_decay, o.l1, rate, 1, 1, o.epsilon)
    )


def _rmsprop(o: Any, segments: Any, w: Any, g: Any, rate: float, step: int, samples: int) -> None:
    numbers = _numbers(samples, o.weight_decay, o.l1, rate, o.beta2, 1 - o.beta2, o.epsilon)
    updates.squares(w, g, o.state["mean_of_squares"], segments, *numbers)


def _adam(
    o: Any, segments: Any, w: Any, g: Any, rate: float, step: int, samples: int, decay: float | None = None
) -> None:
    """Take a step of Adam; with a factor `decay`, of AdamW."""
    root, corrected = o.corrections(rate, step)
    numbers = _numbers(
        samples, o.weight_decay if decay is None else decay, o.l1, corrected, o.beta1, 1 - o.beta1, o.beta2,
        1 - o.beta2, root, o.epsilon,
    )  # fmt: skip
    updates.adam(w, g, o.state["first_moment"], o.state["second_moment"], segments, decay is not None, *numbers)


def _adamw(o: Any, segments: Any, w: Any, g: Any, rate: float, step: int, samples: int) -> None:
    _adam(o, segments, w, g, rate, step, samples, decay=1 - rate * o.weight_decay)


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


def _update(apply: Callable[..., None], o: Any, segments: Any, w: Any, g: Any, *numbers: Any) -> None:
    read_only = g.view()  # as the sum of a reduction is; a kernel would be compiled again for a writable gradient
    read_only.flags.writeable = False
    apply(o, segments, w, read_only, *numbers)


def _segments(optimizer: Any) -> NDArray[np.int64]:
    """Return start, stop and mode of each range of elements that are updated alike; see `updates`."""
    mode = bool(optimizer.weight_decay) + 2 * bool(optimizer.l1)
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
