"""Activations: functions of each element, any shape. Ng's course is A. Ng, *Neural Networks and Deep Learning*."""

import math

import numpy as np

from distdl.errors import UserError
from distdl.nn.layers import Array, Layer
from distdl.rng import Key


class ReLU(Layer):
    """``y = max(x, 0)``; the gradient passes if x > 0, and is 0 at 0. Source: section 5.5.1."""

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.y = self.workspace.array("y", x.shape)
        return np.maximum(x, 0, out=self.y)

    def backward(self, dy: Array) -> Array:
        positive = self.workspace.array("positive", dy.shape, dtype=np.bool_)
        np.greater(self.y, 0, out=positive)
        return np.multiply(dy, positive, out=self.workspace.array("dx", dy.shape))


class Sigmoid(Layer):
    """``y = 1 / (1 + exp(-x))``, accurate in both tails; if ``exp(-x)`` overflows, ``1 / inf`` is 0.

    Backward: ``dx = dy y (1 - y)``. Source: sections 3.2.4 and 5.5.2.
    """

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.y = y = self.workspace.array("y", x.shape)
        np.multiply(x, -1, out=y)
        with np.errstate(over="ignore"):
            np.exp(y, out=y)
        y += 1
        return np.divide(1, y, out=y)

    def backward(self, dy: Array) -> Array:
        dx = np.subtract(1, self.y, out=self.workspace.array("dx", dy.shape))
        dx *= self.y
        dx *= dy
        return dx


class Tanh(Layer):
    """``y = tanh(x)``. Backward: ``dx = dy (1 - y²)``. Source: Ng's course, week 3; in the book section 6.2.2."""

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.y = self.workspace.array("y", x.shape)
        return np.tanh(x, out=self.y)

    def backward(self, dy: Array) -> Array:
        dx = np.multiply(self.y, self.y, out=self.workspace.array("dx", dy.shape))
        np.subtract(1, dx, out=dx)
        dx *= dy
        return dx


class LeakyReLU(Layer):
    """``y = x`` if x > 0, else ``slope x``; the gradient at 0 is that of the negative side.

    Not in the book. Sources: Ng's course, week 3; Maas, Hannun and Ng 2013.
    """

    def __init__(self, slope: float = 0.01) -> None:
        if not 0 <= slope < math.inf:
            raise UserError(f"LeakyReLU: slope {slope} given, expected a number of at least 0")
        self.slope = slope

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.positive = np.greater(x, 0, out=self.workspace.array("positive", x.shape, dtype=np.bool_))
        return self._sloped(x, "y")

    def backward(self, dy: Array) -> Array:
        return self._sloped(dy, "dx")

    def _sloped(self, x: Array, name: str) -> Array:
        y = np.multiply(x, self.slope, out=self.workspace.array(name, x.shape))
        np.copyto(y, x, where=self.positive)
        return y

    def __str__(self) -> str:
        return f"LeakyReLU {self.slope:g}"


class Softmax(Layer):
    """``y[n, k] = exp(x[n, k]) / sum over j of exp(x[n, j])`` along the last axis, without overflow.

    The losses of classifiers take logits and include the softmax; this layer is for probabilities inside a network.
    Backward: ``dx = y (dy - sum over k of y dy)``. Source: section 3.5.
    """

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.y = y = self.workspace.array("y", x.shape)
        np.subtract(x, x.max(axis=-1, keepdims=True), out=y)
        np.exp(y, out=y)
        y /= y.sum(axis=-1, keepdims=True)
        return y

    def backward(self, dy: Array) -> Array:
        dx = np.multiply(self.y, dy, out=self.workspace.array("dx", dy.shape))
        inner = dx.sum(axis=-1, keepdims=True)
        np.subtract(dy, inner, out=dx)
        dx *= self.y
        return dx
