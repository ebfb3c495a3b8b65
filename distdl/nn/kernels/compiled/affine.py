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
from distdl.nn.kernels.compiled.arrays import scratch
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.products import (
    block_width,
    column_block,
    copy_rows,
    pack_rows,
    transpose,
)
from distdl.nn.kernels.compiled.simd import greater, load_lanes, maximum, select, splat, store_lanes
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layers import Affine, Array, Layer
from distdl.rng import Key

f4 = np.float32

#: Up to this number of columns a product reads the weights where they are: their rows fit the cache as they lie.
DIRECT_COLUMNS = 256
#: Rows of the weights that it reads at a time there, so that all tiles find them in the first-level cache.
DIRECT_ROWS = 128
#: Rows of the weights that are copied at a time; so a panel of 64 columns fits the first-level cache.
PANEL_ROWS = 64
#: With fewer samples a copy does not pay. Then this number of rows is read at a time.
FEW_SAMPLES, FEW_ROWS = 8, 16
#: Inputs whose weight gradient is computed at a time: a multiple of the rows of a tile.
INPUTS = 48
#: Samples that `backward` takes at a time.
SAMPLES = 64

_NOTHING = np.empty((0, 0), f4)


@kernel
def _multiply(A, a_m, a_k, B, b_k, C, c_m, M, K, N, add, panel):
    """Set ``C[m, n] (+)= sum over k < K of A[m, k] B[k, n]``.

    B is first copied to `panel`, 64 columns at a time, unless `panel` is 0. B is a packed matrix if b_k is 0.
    """
    n = 0
    while n < N:
        width = block_width(n, N)
        right, row = B + 4 * n, b_k
        if b_k == 0:
            right, row = B + 4 * n * K, width
        if panel:
            copy_rows(right, row, K, width, panel, width)
            right, row = panel, width
        column_block(A, a_m, 0, a_k, right, 0, row, C + 4 * n, c_m, 1, M, K, width, add)
        n += width


@kernel
def forward(x_, W_, b_, y_, panel_, relu):
    """Write y; `panel` has room for `PANEL_ROWS` rows of 64 numbers."""
    N, D = x_.shape
    K = W_.shape[1]
    x, W, b, y, panel = x_.ctypes.data, W_.ctypes.data, b_.ctypes.data, y_.ctypes.data, panel_.ctypes.data
    copies, rows = K > DIRECT_COLUMNS and N >= FEW_SAMPLES, DIRECT_ROWS
    if K > DIRECT_COLUMNS:
        rows = PANEL_ROWS if copies else FEW_ROWS
    for d in range(0, D, rows):
        _multiply(
            x + 4 * d, D, 1, W + 4 * d * K, K, y, K, N, min(rows, D - d), K, 1 if d else 0, panel if copies else 0
        )
    zero = splat(f4(0))
    for n in range(N):
        for k in range(0, K, 16):
            v = load_lanes(y, n * K + k, K - k) + load_lanes(b, k, K - k)
            if relu:
                v = maximum(v, zero)
            store_lanes(y, n * K + k, v, K - k)


def scratch_size(D: int, K: int) -> int:
    """Return the number of floats of scratch that `backward` needs."""
    return SAMPLES * (2 * INPUTS + D + 3 * K)


@kernel
def backward(x_, W_, y_, dy_, dW_, db_, dx_, scratch_, relu, wanted):
    """Write dW, db and, if `wanted`, dx."""
    N, D = x_.shape
    K = W_.shape[1]
    x, W, y, dW, db, dx, inputs = (
        x_.ctypes.data,
        W_.ctypes.data,
        y_.ctypes.data,
        dW_.ctypes.data,
        db_.ctypes.data,
        dx_.ctypes.data,
        scratch_.ctypes.data,
    )
    results, masked = inputs + 4 * SAMPLES * INPUTS, inputs + 8 * SAMPLES * INPUTS
    packed, rest = masked + 4 * SAMPLES * K, masked + 8 * SAMPLES * K
    db_[:] = 0
    zero = splat(f4(0))
    transposes_weights = wanted and min(N, SAMPLES) * (D + K) >= D * K
    if transposes_weights:
        transpose(W, K, D, K, rest, D)
    for n in range(0, N, SAMPLES):
        M, add = min(SAMPLES, N - n), 1 if n else 0
        d = dy_.ctypes.data + 4 * n * K
        for m in range(M):
            for k in range(0, K, 16):
                lanes, o = K - k, m * K + k
                v = load_lanes(d, o, lanes)
                if relu:
                    v = select(greater(load_lanes(y, n * K + o, lanes), zero), v, zero)
                    store_lanes(masked, o, v, lanes)
                store_lanes(db, k, load_lanes(db, k, lanes) + v, lanes)
        if relu:
            d = masked

        pack_rows(d, K, M, K, packed)
        for i in range(0, D, INPUTS):
            count = min(INPUTS, D - i)
            copy_rows(x + 4 * (n * D + i), D, M, count, inputs, INPUTS)
            _multiply(inputs, 1, INPUTS, packed, 0, dW + 4 * i * K, K, count, M, K, add, 0)

        if transposes_weights:
            _multiply(d, K, 1, rest, D, dx + 4 * n * D, D, M, K, D, 0, 0)
        elif wanted:  # dx' = W d': it is cheaper to transpose d and dx than W
            transpose(d, K, M, K, rest, M)
            for i in range(0, D, INPUTS):
                count = min(INPUTS, D - i)
                _multiply(W + 4 * i * K, K, 1, rest, M, results, M, count, K, M, 0, 0)
                transpose(results, M, count, M, dx + 4 * (n * D + i), D)


def affine_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers:
    """Return the implementation of the affine layer at the first of these layers, and of the ReLU that follows."""
    relu = len(layers) > 1 and type(layers[1]) is ReLU
    return CompiledAffine(layers[: 1 + relu], names[0], relu=relu)


class CompiledAffine(CompiledLayers):
    """An affine layer, and the ReLU that follows."""

    def __init__(self, layers: Sequence[Layer], name: str, *, relu: bool) -> None:
        affine = layers[0]
        assert isinstance(affine, Affine)
        self.affine, self.relu = affine, relu
        super().__init__(layers, name, (affine.outputs,))

    def elements(self) -> Elements:
        D, K, wanted = self.affine.inputs, self.affine.outputs, self.affine.needs_input_gradient
        return Elements(kept=K, gradient=D * wanted, scratch=PANEL_ROWS * 64 + scratch_size(D, K))

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x, self.y = x, self.kept.array("y", (len(x), self.affine.outputs))
        parameters, panel = self.affine.parameters, scratch("panel", PANEL_ROWS * 64)
        forward(x, parameters["weight"], parameters["bias"], self.y, panel, self.relu)
        return self.y

    def _backward(self, dy: Array) -> Array | None:
        affine, wanted = self.affine, self.affine.needs_input_gradient
        dx = self.gradients.take(self.x.shape) if wanted else _NOTHING
        backward(
            self.x, affine.parameters["weight"], self.y, dy, affine.gradients["weight"], affine.gradients["bias"], dx,
            scratch("affine", scratch_size(affine.inputs, affine.outputs)), self.relu, wanted,
        )  # fmt: skip
        return dx if wanted else None
