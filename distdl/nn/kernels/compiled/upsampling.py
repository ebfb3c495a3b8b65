"""Compiled bilinear interpolation.

Each output of an axis is a sum over its sources, the inputs whose weight in the layer's matrix is not 0: one chain of
fused multiply-adds ``fma(weight, source, sum)``, which begins with 0, in ascending order. The rows come first, then the
columns. Backward, the sources of an input are the outputs that it enters.

N images, H and W their height and width, C channels; OH and OW the size of the result.
"""

import math
from collections.abc import Sequence

import numpy as np

from distdl.nn.kernels.compiled.arrays import scratch
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import fma, load_lanes, splat, store_lanes
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layers import Array, Layer
from distdl.nn.upsampling import Upsample2d
from distdl.rng import Key

f4 = np.float32


@kernel
def resize(x_, y_, row_ends_, rows_, row_weights_, column_ends_, columns_, column_weights_, wide_):
    """Write the images y (N, OH, OW, C); `wide` is scratch for one row of the input.

    The sources of an output lie between the end of the output before it and its own.
    """
    N, H, W, C = x_.shape
    _, OH, OW, _ = y_.shape
    x, y, wide, zero = x_.ctypes.data, y_.ctypes.data, wide_.ctypes.data, splat(f4(0))
    for n in range(N):
        first_row = 0
        for i in range(OH):
            for k in range(0, W * C, 16):
                total = zero
                for s in range(first_row, row_ends_[i]):
                    v = load_lanes(x, (n * H + rows_[s]) * W * C + k, W * C - k)
                    total = fma(splat(row_weights_[s]), v, total)
                store_lanes(wide, k, total, W * C - k)
            first_row = row_ends_[i]
            first_column = 0
            for j in range(OW):
                for c in range(0, C, 16):
                    total = zero
                    for s in range(first_column, column_ends_[j]):
                        v = load_lanes(wide, columns_[s] * C + c, C - c)
                        total = fma(splat(column_weights_[s]), v, total)
                    store_lanes(y, ((n * OH + i) * OW + j) * C + c, total, C - c)
                first_column = column_ends_[j]


def _sources(matrix: Array) -> tuple[Array, Array, Array]:
    """Return the ends of the sources of each row of the matrix, the sources and their weights."""
    rows, sources = np.nonzero(matrix)
    ends = np.cumsum(np.bincount(rows, minlength=len(matrix)))
    return ends.astype(np.int64), sources.astype(np.int64), matrix[rows, sources].astype(np.float32)


def upsampling_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers:
    """Return the implementation of the interpolation at the first of these layers."""
    layer = layers[0]
    assert isinstance(layer, Upsample2d)
    return CompiledUpsampling(layer, names[0])


class CompiledUpsampling(CompiledLayers):
    """A bilinear interpolation."""

    def __init__(self, layer: Upsample2d, name: str) -> None:
        H, W, C = layer.input_shape
        super().__init__([layer], name, (len(layer.rows), len(layer.columns), C))
        self._input_shape = H, W, C
        self._forward_sources = *_sources(layer.rows), *_sources(layer.columns)
        self._backward_sources = *_sources(layer.rows.T), *_sources(layer.columns.T)

    def elements(self) -> Elements:
        _, OW, C = self.output_shape
        return Elements(kept=math.prod(self.output_shape), gradient=math.prod(self._input_shape), scratch=OW * C)

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        y = self.kept.array("y", (len(x), *self.output_shape))
        resize(x, y, *self._forward_sources, scratch("wide", math.prod(x.shape[2:])))
        return y

    def _backward(self, dy: Array) -> Array:
        dx = self.gradients.take((len(dy), *self._input_shape))
        resize(dy, dx, *self._backward_sources, scratch("wide", math.prod(dy.shape[2:])))
        return dx
