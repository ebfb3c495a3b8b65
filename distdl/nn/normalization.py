"""Normalization inside of networks; images are (N, H, W, C)."""
# ruff: noqa: ARG002  every layer's forward takes the same arguments, whether it needs them or not

from __future__ import annotations

import math

import numpy as np

from distdl.errors import UserError
from distdl.nn.layers import Array, Layer
from distdl.rng import Key


class LocalResponseNorm(Layer):
    """Divide each element by a norm of its neighbours along the channels: AlexNet's local response normalization.

    ``y[c] = x[c] / (k + alpha / size * sum over the window of x[j]²)^beta``; the window of channel c reaches from
    ``c - size // 2`` to ``c + (size - 1) // 2``, cut off at both ends. (The paper multiplies alpha with the plain
    sum; here it is divided by the size first, as in PyTorch.) Any shape (..., C). Source: Krizhevsky et al. 2012,
    section 3.3.
    """

    def __init__(self, size: int = 5, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        if size < 1 or not all(math.isfinite(number) for number in (alpha, beta, k)):
            raise UserError(
                f"LocalResponseNorm: size {size}, alpha {alpha}, beta {beta}, k {k} given, expected a size of at least "
                "1 and finite numbers"
            )
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the normalized elements, any shape (..., C)."""
        self.x = x
        squares = np.multiply(x, x, out=self.workspace.array("squares", x.shape))
        self.scale = self._summed(squares, "scale", before=self.size // 2, behind=(self.size - 1) // 2)
        self.scale *= self.alpha / self.size
        self.scale += self.k
        self.factor = np.power(self.scale, -self.beta, out=self.workspace.array("factor", x.shape))
        return np.multiply(x, self.factor, out=self.workspace.array("y", x.shape))

    def backward(self, dy: Array) -> Array:
        """Return ``dy f - 2 alpha beta / size x * sum over windows that hold the element of dy x f / scale``."""
        through = np.multiply(dy, self.x, out=self.workspace.array("through", dy.shape))
        through *= self.factor
        through /= self.scale
        dx = self._summed(through, "dx", before=(self.size - 1) // 2, behind=self.size // 2)
        dx *= self.x
        dx *= -2 * self.alpha * self.beta / self.size
        direct = np.multiply(dy, self.factor, out=through)
        dx += direct
        return dx

    def _summed(self, values: Array, name: str, *, before: int, behind: int) -> Array:
        """Return for each channel the sum over the channels from `before` in front of it to `behind` after it."""
        sums = self.workspace.array(name, values.shape)
        np.copyto(sums, values)
        C = values.shape[-1]
        for distance in range(1, min(before, C - 1) + 1):
            sums[..., distance:] += values[..., : C - distance]
        for distance in range(1, min(behind, C - 1) + 1):
            sums[..., : C - distance] += values[..., distance:]
        return sums

    def __str__(self) -> str:
        return f"LocalResponseNorm {self.size}"
