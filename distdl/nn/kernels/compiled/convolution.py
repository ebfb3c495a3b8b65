"""Compiled convolutions, with the ReLU and the 2x2 max-pooling that follow them."""

import math
from collections.abc import Sequence

import numpy as np

from distdl.nn.activations import ReLU
from distdl.nn.convolution import Conv2d
from distdl.nn.kernels.compiled import direct, products, winograd
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
    return DirectConvolution(taken, names[0], relu=relu, pool=pool)


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


class DirectConvolution(CompiledLayers):
    """Any other convolution, ReLU and 2x2 max-pooling; see `direct`."""

    def __init__(self, layers: Sequence[Layer], name: str, *, relu: bool, pool: bool) -> None:
        conv = layers[0]
        assert isinstance(conv, Conv2d)
        self.conv, self.relu, self.pool = conv, relu, pool
        window = conv.window
        self.window = (*window.kernel, *window.stride, *window.padding)
        OH, OW = conv.output_size
        super().__init__(layers, name, (OH // 2, OW // 2, conv.filters) if pool else (OH, OW, conv.filters))
        # Without pooling, the pixels of a 1x1 convolution are images of their own.
        self.pointwise = self.window == (1, 1, 1, 1, 0, 0) and not pool
        self.image = (1, 1, conv.channels) if self.pointwise else (*conv.size, conv.channels)
        self.output = (1, 1, conv.filters) if self.pointwise else (OH, OW, conv.filters)

    def elements(self) -> Elements:
        weights = math.prod(self.conv.window.kernel) * self.conv.channels * self.conv.filters
        one_block = products.block_width(0, self.conv.filters) == self.conv.filters
        block, _ = direct.block_of(self.image, self.output, 2**30)
        return Elements(
            kept=math.prod(self.output_shape) * (1 + self.pool * 3 / 32),
            of_weights=weights * (1 - one_block + self.conv.needs_input_gradient),
            gradient=math.prod(self.conv.size) * self.conv.channels * self.conv.needs_input_gradient,
            scratch=self._scratch_size(block) + self.conv.filters,
        )

    def _scratch_size(self, block: int) -> int:
        """Return the larger of the sizes of both passes."""
        forward = math.prod((block, direct.rows_of_block(self.output, block), *self.output[1:])) if self.pool else 0
        masked = self.relu or self.pool
        backward: int = direct.backward_scratch(self.window, self.image, self.output, block, masked)
        return max(forward, backward)

    def _packed(self) -> Array:
        """Return the array of the packed weights; weights that are one block of columns are packed as they are."""
        weight = self.conv.parameters["weight"]
        if products.block_width(0, self.conv.filters) == self.conv.filters:
            return weight.reshape(-1)
        return self.kept.array("packed", (weight.size,))

    def _transposed(self) -> Array:
        return self.kept.array("transposed", (self.conv.parameters["weight"].size,))

    def _winners(self, N: int) -> Array:
        windows = N * self.output_shape[0] * self.output_shape[1] if self.pool else 0
        return self.kept.array("winners", (windows * -(-self.conv.filters // 16), 3), dtype=np.uint16)

    def prepare(self) -> None:
        weight, packed = self.conv.parameters["weight"], self._packed()
        if packed.ctypes.data != weight.ctypes.data:
            products.pack(weight.reshape(-1, self.conv.filters), packed)
        if self.conv.needs_input_gradient:
            direct.pack_for_input_gradient(weight, self.window, self._transposed())

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x, self.y = x, self.kept.array("y", (len(x), *self.output_shape))
        images = x.reshape(-1, *self.image)
        y = self.y.reshape(len(images), *self.output) if self.pointwise else self.y
        block, by_pixels = direct.block_of(self.image, self.output, len(images))
        bias = self.conv.parameters["bias"] if self.conv.bias else y.reshape(-1)
        direct.forward(
            images, self._packed(), bias, y, self._winners(len(x)), scratch("convolution", self._scratch_size(block)),
            self.window, self.output[:2], block, direct.rows_of_block(self.output, block), by_pixels, self.conv.bias,
            self.relu, self.pool,
        )  # fmt: skip
        return self.y

    def _backward(self, dy: Array) -> Array | None:
        wanted = self.conv.needs_input_gradient
        dx = self.gradients.take(self.x.shape if wanted else (0, 0, 0, 0))
        images = self.x.reshape(-1, *self.image)
        block, by_pixels = direct.block_of(self.image, self.output, len(images))
        bias = self.conv.gradients["bias"] if self.conv.bias else scratch("gradient of bias", self.conv.filters)
        direct.backward(
            images, self._transposed(), dy, self.y, self._winners(len(dy)), self.conv.gradients["weight"], bias, dx,
            scratch("convolution", self._scratch_size(block)), self.window, self.output[:2], block, by_pixels,
            self.relu, self.pool, wanted,
        )  # fmt: skip
        return dx if wanted else None
