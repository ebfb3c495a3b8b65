"""Clipping of the gradient by its norm."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[Any]


def clip_by_norm(gradient: Vector, largest: float, norm_of: Callable[[Vector], float] | None = None) -> float:
    """Scale the flat gradient in place so that its norm is at most `largest`; return its norm before.

    The factor is ``largest / (norm + 1e-6)``, as in PyTorch's ``clip_grad_norm_``. `norm_of` is that of the kernels, if
    they have one. Not in the book. Source: Pascanu, Mikolov and Bengio 2013.
    """
    norm = math.sqrt(float(np.vdot(gradient, gradient))) if norm_of is None else norm_of(gradient)
    if not math.isfinite(norm):  # the squares overflow
        norm = float(np.linalg.norm(gradient.astype(np.float64)))
    if norm + 1e-6 > largest:
        gradient *= largest / (norm + 1e-6)
    return norm
