"""Enlarge images (N, H, W, C) without parameters."""

import numpy as np
from numpy.typing import DTypeLike

from distdl.nn.arguments import image_shape, whole_number
from distdl.nn.layers import Array, Layer, Shape
from distdl.rng import Key


class Upsample2d(Layer):
    """Bilinear interpolation to `factor` times the size: (N, H, W, C) becomes (N, factor H, factor W, C).

    Pixels are squares with their centres at halves, and the border repeats outwards, as in PyTorch's ``bilinear`` with
    ``align_corners=False``. Each axis is one product with a small fixed matrix. Source: section 8.4 (FCN).
    """

    def __init__(self, factor: int = 2) -> None:
        self.factor = whole_number("Upsample2d", "factor", factor)

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        H, W, C = image_shape(super().build(input_shape, dtype))
        self.rows, self.columns = interpolation(H, self.factor, dtype), interpolation(W, self.factor, dtype)
        return (self.factor * H, self.factor * W, C)

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        return self._resized(x, self.rows, self.columns, "y")

    def backward(self, dy: Array) -> Array:
        return self._resized(dy, self.rows.T, self.columns.T, "dx")

    def _resized(self, x: Array, rows: Array, columns: Array, name: str) -> Array:
        N, H, W, C = x.shape
        wide = self.workspace.array(f"{name} of rows", (N, len(rows), W, C))
        np.matmul(rows, x.reshape(N, H, W * C), out=wide.reshape(N, len(rows), W * C))
        y = self.workspace.array(name, (N, len(rows), len(columns), C))
        np.matmul(columns, wide, out=y)
        return y

    def __str__(self) -> str:
        return f"Upsample2d x{self.factor}"


def interpolation(size: int, factor: int, dtype: DTypeLike) -> Array:
    """Return the matrix (factor * size, size) of linear interpolation along one axis.

    >>> interpolation(2, 2, float).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    place = np.clip((np.arange(factor * size) + 0.5) / factor - 0.5, 0, size - 1)
    below = np.minimum(place.astype(np.int64), max(size - 2, 0))
    matrix = np.zeros((factor * size, size), dtype)
    matrix[np.arange(len(place)), np.minimum(below + 1, size - 1)] = place - below
    matrix[np.arange(len(place)), below] += 1 - (place - below)
    return matrix
