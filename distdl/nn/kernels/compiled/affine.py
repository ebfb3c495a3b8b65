"""Compiled affine layers, with the ReLU that follows.

N samples, D inputs, K outputs; ``y = x W + b`` with x (N, D), W (D, K), b (K,). The order of operations:

- ``x W``: one chain of fused multiply-adds over D, which begins with 0 (see `products`); then b is added.
- ReLU: ``maximum(y, 0)``. Backward, d is dy where y > 0, and 0 elsewhere; without ReLU, d is dy.
- ``db``: begins with 0; the rows of d are added in order.
- ``dW = x' d``: one chain over N for each element, from 0. ``dx = d W'``: one chain over K, from 0.
"""

from collections.abc import Sequence

import numpy as np

from distdl.nn.activations import ReLU
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.products import (
    block_width,
    copy_rows,
    pack_rows,
    packed_product,
    product,
    transpose,
)
from distdl.nn.kernels.compiled.simd import greater, load_lanes, maximum, select, splat, store_lanes
from distdl.nn.layers import Affine, Array, Layer
from distdl.rng import Key

f4 = np.float32

#: Up to this number of columns a product reads the weights where they are: their rows fit the cache as they lie.
DIRECT_COLUMNS = 256
#: Rows of the weights that are copied at a time; so a panel of 64 columns fits the first-level cache.
PANEL_ROWS = 64
#: With fewer samples a copy does not pay. Then this number of rows is read at a time.
FEW_SAMPLES, FEW_ROWS = 8, 16
#: Inputs whose weight gradient is computed at a time: a multiple of the rows of a tile.
INPUTS = 48


@kernel
def forward(x_, W_, b_, y_, panel_, relu):
    """Write y; `panel` has room for `PANEL_ROWS` rows of 64 numbers."""
    N, D = x_.shape
    K = W_.shape[1]
    x, W, b, y, panel = x_.ctypes.data, W_.ctypes.data, b_.ctypes.data, y_.ctypes.data, panel_.ctypes.data
    if K <= DIRECT_COLUMNS:
        product(x, D, 0, 1, W, 0, K, y, K, 1, N, D, K, 0)
    elif N < FEW_SAMPLES:
        for d in range(0, D, FEW_ROWS):
            product(x + 4 * d, D, 0, 1, W + 4 * d * K, 0, K, y, K, 1, N, min(FEW_ROWS, D - d), K, 1 if d else 0)
    else:
        for d in range(0, D, PANEL_ROWS):
            rows = min(PANEL_ROWS, D - d)
            k = 0
            while k < K:
                width = block_width(k, K)
                copy_rows(W + 4 * (d * K + k), K, rows, width, panel, width)
                product(x + 4 * d, D, 0, 1, panel, 0, width, y + 4 * k, K, 1, N, rows, width, 1 if d else 0)
                k += width
    zero = splat(f4(0))
    for n in range(N):
        for k in range(0, K, 16):
            v = load_lanes(y, n * K + k, K - k) + load_lanes(b, k, K - k)
            if relu:
                v = maximum(v, zero)
            store_lanes(y, n * K + k, v, K - k)


def scratch_size(N: int, D: int, K: int) -> int:
    """Return the number of floats of scratch that `backward` needs."""
    return N * (INPUTS + D + 2 * K)


@kernel
def backward(x_, W_, y_, dy_, d_, dW_, db_, dx_, scratch_, relu, wanted):
    """Write dW, db and, if `wanted`, dx. d (N, K) is scratch, used with `relu` only."""
    N, D = x_.shape
    K = W_.shape[1]
    x, W, y, dy, dW, db, dx = (
        x_.ctypes.data,
        W_.ctypes.data,
        y_.ctypes.data,
        dy_.ctypes.data,
        dW_.ctypes.data,
        db_.ctypes.data,
        dx_.ctypes.data,
    )
    db_[:] = 0
    d = d_.ctypes.data if relu else dy
    zero = splat(f4(0))
    for n in range(N):
        for k in range(0, K, 16):
            lanes, o = K - k, n * K + k
            v = load_lanes(dy, o, lanes)
            if relu:
                v = select(greater(load_lanes(y, o, lanes), zero), v, zero)
                store_lanes(d, o, v, lanes)
            store_lanes(db, k, load_lanes(db, k, lanes) + v, lanes)

    inputs = scratch_.ctypes.data
    packed = inputs + 4 * N * INPUTS
    pack_rows(d, K, N, K, packed)
    for i in range(0, D, INPUTS):
        count = min(INPUTS, D - i)
        copy_rows(x + 4 * i, D, N, count, inputs, INPUTS)
        packed_product(inputs, 1, 0, INPUTS, packed, N, 0, 0, 1, dW + 4 * i * K, K, 1, count, N, K, 0)

    if wanted:
        rest = packed + 4 * N * K
        if D * K <= N * (D + K):
            transpose(W, K, D, K, rest, D)
            product(d, K, 0, 1, rest, 0, D, dx, D, 1, N, K, D, 0)
        else:  # dx' = W d': it is cheaper to transpose d and dx than W
            dxT = rest + 4 * N * K
            transpose(d, K, N, K, rest, N)
            for i in range(0, D, INPUTS):
                product(W + 4 * i * K, K, 0, 1, rest, 0, N, dxT + 4 * i * N, N, 1, min(INPUTS, D - i), K, N, 0)
            transpose(dxT, N, D, N, dx, D)


def affine_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers:
    """Return the implementation of the affine layer at the first of these layers, and of the ReLU that follows."""
    relu = len(layers) > 1 and type(layers[1]) is ReLU
    return CompiledAffine(layers[: 1 + relu], names[0], relu=relu)


class CompiledAffine(CompiledLayers):
    """An affine layer, and the ReLU that follows."""

    def __init__(self, layers: Sequence[Layer], name: str, *, relu: bool) -> None:
        super().__init__(layers, name)
        affine = layers[0]
        assert isinstance(affine, Affine)
        self.affine, self.relu = affine, relu

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x = x
        self.y = self.workspace.array("y", (len(x), self.affine.outputs))
        panel = self.workspace.array("panel", (PANEL_ROWS * 64,))
        parameters = self.affine.parameters
        forward(x, parameters["weight"], parameters["bias"], self.y, panel, self.relu)
        return self.y

    def _backward(self, dy: Array) -> Array | None:
        wanted = self.affine.needs_input_gradient
        N, D, K = len(dy), self.affine.inputs, self.affine.outputs
        dx = self.workspace.array("dx", (N if wanted else 0, D))
        d = self.workspace.array("d", (N if self.relu else 0, K))
        scratch = self.workspace.array("scratch", (scratch_size(N, D, K),))
        weight, gradients = self.affine.parameters["weight"], self.affine.gradients
        backward(
            self.x, weight, self.y, dy, d, gradients["weight"], gradients["bias"], dx, scratch, self.relu, wanted
        )  # fmt: skip
        return dx if wanted else None
