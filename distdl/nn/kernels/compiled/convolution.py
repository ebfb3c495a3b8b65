"""Compiled convolutions, with the ReLU and the 2x2 max-pooling that follow them."""

from collections.abc import Sequence

import numpy as np

from distdl.nn.activations import ReLU
from distdl.nn.convolution import Conv2d
from distdl.nn.kernels.compiled import direct, products, winograd
from distdl.nn.kernels.compiled.base import CompiledLayers
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
        super().__init__(layers, name)
        conv = layers[0]
        assert isinstance(conv, Conv2d)
        self.conv, self.relu, self.pool = conv, relu, pool
        self.C, self.F, (self.OH, self.OW) = conv.channels, conv.filters, conv.output_size
        self.output_size = (self.OH // 2, self.OW // 2) if pool else (self.OH, self.OW)

    def _tiles_of_block(self) -> int:
        """Return P: many tiles if the transformed weights are too large for the cache."""
        return 48 if self.C * self.F <= 128 * 128 else 128

    def _scratch(self) -> Array:
        return self.workspace.array(
            "scratch", (winograd.SMALL_SCRATCH + 36 * self._tiles_of_block() * (self.C + self.F),)
        )

    def _transformed(self, name: str) -> Array:
        return self.workspace.array(name, (36 * self.C * self.F,))

    def _winners(self, N: int) -> Array:
        windows = N * self.output_size[0] * self.output_size[1] if self.pool else 0
        return self.workspace.array("winners", (windows * -(-self.F // 16), 3), dtype=np.uint16)

    def prepare(self) -> None:
        weight = self.conv.parameters["weight"]
        winograd.transform_weights(weight, self._transformed("U"))
        if self.conv.needs_input_gradient:
            transposed = self.workspace.array("transposed", (3, 3, self.F, self.C))
            np.copyto(transposed, weight.swapaxes(2, 3))
            winograd.transform_weights(transposed, self._transformed("UT"))

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x = x
        self.y = self.workspace.array("y", (len(x), *self.output_size, self.F))
        bias = self.conv.parameters["bias"] if self.conv.bias else self.y.reshape(-1)
        winograd.forward(
            x, self._transformed("U"), bias, self.y, self._winners(len(x)), self._scratch(), self._tiles_of_block(),
            self.OH, self.OW, *self.conv.window.padding, self.conv.bias, self.relu, self.pool,
        )  # fmt: skip
        return self.y

    def _backward(self, dy: Array) -> Array | None:
        wanted = self.conv.needs_input_gradient
        dx = self.workspace.array("dx", self.x.shape if wanted else (0, 0, 0, 0))
        dU = self.workspace.array("dU", (36, self.C, self.F))
        bias = self.conv.gradients["bias"] if self.conv.bias else self.workspace.array("d_bias", (self.F,))
        winograd.backward(
            self.x, self._transformed("UT"), dy, self.y, self._winners(len(dy)), dU, bias, dx, self._scratch(),
            self._tiles_of_block(), self.OH, self.OW, *self.conv.window.padding, self.relu, self.pool, wanted,
        )  # fmt: skip
        winograd.weight_gradient(dU, self.conv.gradients["weight"])
        return dx if wanted else None


class DirectConvolution(CompiledLayers):
    """Any other convolution, ReLU and 2x2 max-pooling; see `direct`."""

    def __init__(self, layers: Sequence[Layer], name: str, *, relu: bool, pool: bool) -> None:
        super().__init__(layers, name)
        conv = layers[0]
        assert isinstance(conv, Conv2d)
        self.conv, self.relu, self.pool = conv, relu, pool
        self.window = (*conv.window.kernel, *conv.window.stride, *conv.window.padding)
        (self.H, self.W), (self.OH, self.OW) = conv.size, conv.output_size
        self.C, self.F = conv.channels, conv.filters
        self.output_shape = (self.OH // 2, self.OW // 2, self.F) if pool else (self.OH, self.OW, self.F)
        #: Without pooling, the pixels of a 1x1 convolution are images of their own.
        self.by_points = self.window == (1, 1, 1, 1, 0, 0) and not pool
        if self.by_points:
            self.H = self.W = self.OH = self.OW = 1

    def _block(self, N: int) -> tuple[int, bool]:
        """Return the number of images of a block, and whether the rows of products are pixels of one image."""
        by_pixels = not self.by_points and (N < 6 or self.OW >= 16)
        floats = self.H * self.W * self.C + self.OH * self.OW * self.F
        block = 2**18 // floats if by_pixels else max(24, 2**18 // floats // 24 * 24)
        import os
        if self.by_points and "PB" in os.environ: block = int(os.environ["PB"])
        return max(1, min(block, N)), by_pixels

    def _packed(self) -> Array:
        """Return the packed weights; a single block of columns is its own packed form."""
        weight = self.conv.parameters["weight"].reshape(-1, self.F)
        if products.block_width(0, self.F) == self.F:
            return weight.reshape(-1)
        return self.workspace.array("packed", (weight.size,))

    def _transposed(self) -> Array:
        return self.workspace.array("transposed", (self.conv.parameters["weight"].size,))

    def _winners(self, N: int) -> Array:
        windows = N * self.output_shape[0] * self.output_shape[1] if self.pool else 0
        return self.workspace.array("winners", (windows * -(-self.F // 16), 3), dtype=np.uint16)

    def prepare(self) -> None:
        weight, packed = self.conv.parameters["weight"], self._packed()
        if not np.may_share_memory(weight, packed):
            products.pack(weight.reshape(-1, self.F), packed)
        if self.conv.needs_input_gradient:
            direct.pack_for_input_gradient(
                weight, self.conv.window.stride, self.conv.window.padding, self._transposed()
            )

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        N = len(x)
        self.x, self.y = x, self.workspace.array("y", (N, *self.output_shape))
        images = x.reshape(-1, self.H, self.W, self.C)
        y = self.y.reshape(len(images), *(1, 1) if self.by_points else self.output_shape[:2], self.F)
        block, by_pixels = self._block(len(images))
        rows = max(2, 2**16 // (self.OW * self.F * block) // 2 * 2)
        scratch = self.workspace.array("scratch", (block * rows * self.OW * self.F if self.pool else 0,))
        bias = self.conv.parameters["bias"] if self.conv.bias else y.reshape(-1)
        direct.forward(
            images, self._packed(), bias, y, self._winners(N), scratch, self.window, (self.OH, self.OW), block, rows,
            by_pixels, self.conv.bias, self.relu, self.pool,
        )  # fmt: skip
        return self.y

    def _backward(self, dy: Array) -> Array | None:
        wanted = self.conv.needs_input_gradient
        dx = self.workspace.array("dx", self.x.shape if wanted else (0, 0, 0, 0))
        images = self.x.reshape(-1, self.H, self.W, self.C)
        block, by_pixels = self._block(len(images))
        floats = direct.backward_scratch(
            self.window, (self.OH, self.OW), block, self.C, self.F, self.relu or self.pool
        )
        bias = self.conv.gradients["bias"] if self.conv.bias else self.workspace.array("d_bias", (self.F,))
        weight = self.conv.gradients["weight"]
        direct.backward(
            images, self._transposed(), dy.reshape(len(images), -1, 1, self.F), self.y, self._winners(len(dy)), weight,
            bias, dx, self.workspace.array("gradient scratch", (floats,)), self.window, (self.OH, self.OW), block,
            by_pixels, self.relu, self.pool, wanted,
        )  # fmt: skip
        return dx if wanted else None
