"""Compiled convolutions, with the ReLU and the 2x2 max-pooling that follow them."""

import math
from collections.abc import Sequence

import numpy as np

from distdl.nn.activations import ReLU
from distdl.nn.convolution import Conv2d
from distdl.nn.kernels.compiled import winograd
from distdl.nn.kernels.compiled.arrays import scratch
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layers import Array, Layer
from distdl.nn.pooling import MaxPool2d
from distdl.nn.windows import Window
from distdl.rng import Key


def convolution_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of the convolution at the first of these layers; the shape alone chooses it."""
    conv = layers[0]
    assert isinstance(conv, Conv2d)
    following = [*layers[1:3], Layer(), Layer()]
    relu = type(following[0]) is ReLU
    after = following[relu]
    pool = type(after) is MaxPool2d and after.window == Window((2, 2), stride=(2, 2)) and min(conv.output_size) >= 2
    taken = layers[: 1 + relu + pool]
    if conv.window.kernel == (3, 3) and conv.window.stride == (1, 1) and min(conv.output_size) > 2:
        return WinogradConvolution(taken, names[0], relu=relu, pool=pool)
    return None


class WinogradConvolution(CompiledLayers):
    """A 3x3 convolution with stride 1, ReLU and 2x2 max-pooling by F(4x4, 3x3); see `winograd`."""

    def __init__(self, layers: Sequence[Layer], name: str, *, relu: bool, pool: bool) -> None:
        conv = layers[0]
        assert isinstance(conv, Conv2d)
        self.conv, self.relu, self.pool = conv, relu, pool
        self.C, self.F, (self.OH, self.OW) = conv.channels, conv.filters, conv.output_size
        self.output_size = (self.OH // 2, self.OW // 2) if pool else (self.OH, self.OW)
        super().__init__(layers, name, (*self.output_size, self.F))

    def elements(self) -> Elements:
        tiles = winograd.SMALL_SCRATCH + 36 * self._tiles_of_block() * (self.C + self.F)
        transformed = 36 * self.C * self.F
        return Elements(
            kept=math.prod(self.output_shape) * (1 + self.pool * 3 / 32),
            of_weights=transformed * (1 + self.conv.needs_input_gradient),
            gradient=math.prod(self.conv.size) * self.C * self.conv.needs_input_gradient,
            scratch=tiles + transformed + self.F,
        )

    def _tiles_of_block(self) -> int:
        """Return P: many tiles if the transformed weights are too large for the cache."""
        return 48 if self.C * self.F <= 128 * 128 else 128

    def _scratch(self) -> Array:
        return self.kept.array("scratch", (winograd.SMALL_SCRATCH + 36 * self._tiles_of_block() * (self.C + self.F),))

    def _transformed(self, name: str) -> Array:
        return self.kept.array(name, (36 * self.C * self.F,))

    def _winners(self, N: int) -> Array:
        windows = N * self.output_size[0] * self.output_size[1] if self.pool else 0
        return self.kept.array("winners", (windows * -(-self.F // 16), 3), dtype=np.uint16)

    def prepare(self) -> None:
        weight = self.conv.parameters["weight"]
        winograd.transform_weights(weight, self._transformed("U"))
        if self.conv.needs_input_gradient:
            transposed = scratch("gradient of weights", weight.size).reshape(3, 3, self.F, self.C)
            np.copyto(transposed, weight.swapaxes(2, 3))
            winograd.transform_weights(transposed, self._transformed("UT"))

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x = x
        self.y = self.kept.array("y", (len(x), *self.output_size, self.F))
        bias = self.conv.parameters["bias"] if self.conv.bias else self.y.reshape(-1)
        winograd.forward(
            x, self._transformed("U"), bias, self.y, self._winners(len(x)), self._scratch(), self._tiles_of_block(),
            self.OH, self.OW, *self.conv.window.padding, self.conv.bias, self.relu, self.pool,
        )  # fmt: skip
        return self.y

    def _backward(self, dy: Array) -> Array | None:
        wanted = self.conv.needs_input_gradient
        dx = self.gradients.take(self.x.shape if wanted else (0, 0, 0, 0))
        dU = scratch("gradient of weights", 36 * self.C * self.F).reshape(36, self.C, self.F)
        bias = self.conv.gradients["bias"] if self.conv.bias else scratch("gradient of bias", self.F)
        winograd.backward(
            self.x, self._transformed("UT"), dy, self.y, self._winners(len(dy)), dU, bias, dx, self._scratch(),
            self._tiles_of_block(), self.OH, self.OW, *self.conv.window.padding, self.relu, self.pool, wanted,
        )  # fmt: skip
        winograd.weight_gradient(dU, self.conv.gradients["weight"])
        return dx if wanted else None
