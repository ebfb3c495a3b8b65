"""Compiled convolutions, with the ReLU and the 2x2 max-pooling that follow them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from distdl.nn.activations import ReLU
from distdl.nn.convolution import Conv2d, ConvTranspose2d
from distdl.nn.kernels.compiled import direct, products, winograd
from distdl.nn.kernels.compiled.arrays import scratch
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layers import Array, Layer, Shape
from distdl.nn.pooling import MaxPool2d
from distdl.nn.windows import Window
from distdl.rng import Key

#: Floats of the images of a block that the second-level cache holds, as a guide.
CACHE = 2**18
#: More weights than these are prepared in each pass: kept, the transformed ones would need much memory.
MANY_WEIGHTS = 9 * 128 * 128
#: The tiles of a block for other weights.
TILES = 48
#: The samples for which scratch is estimated.
SAMPLES = 64
#: Below this number of channels, the gradient of the weights has zeros outside of the image.
FEW = 16
#: From this number of output pixels on, it takes one image at a time if the channels are not many.
MANY_PIXELS, MANY_CHANNELS = 128, 64
#: Pixels of a chunk of the sums over all pixels: for the gradients of the weights and of the bias.
WEIGHT_CHUNK, BIAS_CHUNK = 128, 32
#: Without pooling.
NO_WINNERS = np.empty((0, 3), np.uint16)


def convolution_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers:
    """Return the implementation of the convolution at the first of these layers; the shape alone chooses it."""
    conv = layers[0]
    assert isinstance(conv, Conv2d)
    following = [*layers[1:3], Layer(), Layer()]
    relu = type(following[0]) is ReLU
    after = following[relu]
    pool = type(after) is MaxPool2d and after.window == Window((2, 2), stride=(2, 2)) and min(conv.output_size) >= 2
    taken = layers[: 1 + relu + pool]
    chosen = WinogradConvolution if is_for_winograd(conv) else DirectConvolution
    return chosen(taken, names[0], relu=relu, pool=pool)


def is_for_winograd(conv: Conv2d) -> bool:
    """Return whether Winograd is faster: not for tiny images, nor for few channels and filters (first layers)."""
    if conv.window.kernel != (3, 3) or conv.window.stride != (1, 1) or min(conv.output_size) <= 3:
        return False
    return conv.channels > 3 or conv.channels * conv.filters > 64


class WinogradConvolution(CompiledLayers):
    """A 3x3 convolution with stride 1, ReLU and 2x2 max-pooling by F(4x4, 3x3); see `winograd`."""

    def __init__(self, layers: Sequence[Layer], name: str, *, relu: bool, pool: bool) -> None:
        conv = layers[0]
        assert isinstance(conv, Conv2d)
        self.conv, self.relu, self.pool = conv, relu, pool
        self.C, self.F, (self.OH, self.OW) = conv.channels, conv.filters, conv.output_size
        self.output_size = (self.OH // 2, self.OW // 2) if pool else (self.OH, self.OW)
        #: Whether the passes transform the weights, some columns at a time: the cache could not hold all of them.
        self.by_columns = 9 * self.C * self.F > MANY_WEIGHTS
        super().__init__(layers, name, (*self.output_size, self.F))

    def elements(self) -> Elements:
        return Elements(
            kept=math.prod(self.output_shape) * (1 + self.pool * 3 / 32),
            of_weights=36 * self.C * self.F * (1 + self.conv.needs_input_gradient) * (not self.by_columns),
            gradient=math.prod(self.conv.size) * self.C * self.conv.needs_input_gradient,
            scratch=self._scratch_size(SAMPLES) + self.F,
        )

    def _tiles(self, N: int) -> int:
        return N * -(-self.OH // 4) * -(-self.OW // 4)

    def _tiles_of_block(self, N: int) -> int:
        """Return P."""
        if not self.by_columns:
            return TILES
        return min(self._tiles(N), max(64, CACHE // 2 // (self.C + self.F)))

    def _is_one_block(self, N: int) -> bool:
        return self.by_columns and self._tiles(N) <= self._tiles_of_block(N)

    def _scratch_size(self, N: int) -> int:
        return winograd.scratch_size(
            self.C, self.F, self._tiles_of_block(N), by_columns=self.by_columns, is_one_block=self._is_one_block(N)
        )

    def _scratch(self, N: int) -> Array:
        return scratch("large", self._scratch_size(N))

    def _transformed(self, name: str) -> Array:
        """Return the transformed weights U or UT; or the weights, if the passes transform them."""
        if self.by_columns:
            return self.conv.parameters["weight"].reshape(-1)
        return self.kept.array(name, (36 * self.C * self.F,))

    def _winners(self, N: int) -> Array:
        windows = N * self.output_size[0] * self.output_size[1] if self.pool else 0
        return self.kept.array("winners", (windows * -(-self.F // 16), 3), dtype=np.uint16)

    def prepare(self) -> None:
        if self.by_columns:
            return
        weight = self.conv.parameters["weight"]
        winograd.transform_weights(weight, self._transformed("U"))
        if self.conv.needs_input_gradient:
            transposed = scratch("large", weight.size).reshape(3, 3, self.F, self.C)
            np.copyto(transposed, weight.swapaxes(2, 3))
            winograd.transform_weights(transposed, self._transformed("UT"))

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x, N = x, len(x)
        self.y = self.kept.array("y", (N, *self.output_size, self.F))
        bias = self.conv.parameters["bias"] if self.conv.bias else self.y.reshape(-1)
        winograd.forward(
            x, self._transformed("U"), bias, self.y, self._winners(N), self._scratch(N), self._tiles_of_block(N),
            self.OH, self.OW, *self.conv.window.padding, self.conv.bias, self.relu, self.pool, self.by_columns,
        )  # fmt: skip
        return self.y

    def _backward(self, dy: Array) -> Array | None:
        wanted, N = self.conv.needs_input_gradient, len(dy)
        dx = self.gradients.take(self.x.shape if wanted else (0, 0, 0, 0))
        bias = self.conv.gradients["bias"] if self.conv.bias else scratch("gradient of bias", self.F)
        winograd.backward(
            self.x, self._transformed("UT"), dy, self.y, self._winners(N), self.conv.gradients["weight"].reshape(-1),
            bias, dx, self._scratch(N), self._tiles_of_block(N), self.OH, self.OW, *self.conv.window.padding,
            self.relu, self.pool, wanted, self.by_columns, self._is_one_block(N),
        )  # fmt: skip
        return dx if wanted else None


class DirectConvolution(CompiledLayers):
    """Any other convolution, ReLU and 2x2 max-pooling; see `direct`."""

    def __init__(self, layers: Sequence[Layer], name: str, *, relu: bool, pool: bool) -> None:
        conv = layers[0]
        assert isinstance(conv, Conv2d)
        self.conv, self.relu, self.pool = conv, relu, pool
        OH, OW = conv.output_size
        super().__init__(layers, name, (OH // 2, OW // 2, conv.filters) if pool else (OH, OW, conv.filters))
        self.geometry = Geometry.of(conv.window, (*conv.size, conv.channels), (OH, OW, conv.filters), pooled=pool)
        self.weights = math.prod(conv.window.kernel) * conv.channels * conv.filters
        self.prepares_in_passes = self.weights > MANY_WEIGHTS

    def elements(self) -> Elements:
        geometry, conv = self.geometry, self.conv
        images = SAMPLES * math.prod(conv.size) // math.prod(geometry.image[:2])
        pooled = geometry.pooling_scratch(geometry.block(images)) * self.pool
        masked = geometry.masked_scratch(geometry.masked_block(images)) * (self.relu or self.pool)
        prepared = self.weights * ((not is_packed(conv.filters)) + conv.needs_input_gradient)
        return Elements(
            kept=math.prod(self.output_shape) * (1 + self.pool * 3 / 32),
            of_weights=prepared * (not self.prepares_in_passes),
            gradient=math.prod(conv.size) * conv.channels * conv.needs_input_gradient,
            scratch=pooled + masked + geometry.sums_scratch() + prepared * self.prepares_in_passes,
        )

    def _winners(self, N: int) -> Array:
        windows = N * self.output_shape[0] * self.output_shape[1] if self.pool else 0
        return self.kept.array("winners", (windows * -(-self.conv.filters // 16), 3), dtype=np.uint16)

    def prepare(self) -> None:
        if not self.prepares_in_passes:
            self._pack()
            if self.conv.needs_input_gradient:
                self._transpose()

    def _array_of_weights(self, name: str) -> Array:
        return scratch("large", self.weights) if self.prepares_in_passes else self.kept.array(name, (self.weights,))

    def _pack(self) -> None:
        self.packed = packed_weights(self.conv.parameters["weight"], self._array_of_weights)

    def _transpose(self) -> None:
        self.transposed = self._array_of_weights("transposed")
        direct.pack_for_input_gradient(self.conv.parameters["weight"], self.transposed, *self.geometry.window[2:])

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x, self.y = x, self.kept.array("y", (len(x), *self.output_shape))
        if self.prepares_in_passes:
            self._pack()
        geometry = self.geometry
        images = geometry.images(x)
        block = geometry.block(len(images))
        room = scratch("pooling", geometry.pooling_scratch(block) if self.pool else 0)
        bias = self.conv.parameters["bias"] if self.conv.bias else self.y.reshape(-1)
        y = self.y if self.pool else geometry.outputs(self.y)
        direct.convolve(
            images, 0, len(images), self.packed, 0, bias, y, 0, self._winners(len(x)), room, *geometry.window,
            *geometry.output[:2], 0, 0, 1, 1, block, geometry.rows(block), geometry.by_pixels(len(images)),
            self.conv.bias, self.relu, self.pool,
        )  # fmt: skip
        return self.y

    def _backward(self, dy: Array) -> Array | None:
        geometry, images = self.geometry, self.geometry.images(self.x)
        wanted, N, winners = self.conv.needs_input_gradient, len(images), self._winners(len(self.x))
        masked = self.relu or self.pool
        if wanted and self.prepares_in_passes:
            self._transpose()
        dx = geometry.images(self.gradients.take(self.x.shape)) if wanted else None
        block = geometry.masked_block(N) if masked else N
        room = scratch("convolution", geometry.masked_scratch(block)) if masked else dy.reshape(-1)
        bias = self.conv.gradients["bias"] if self.conv.bias else scratch("gradient of bias", self.conv.filters)
        for first in range(0, N, block):
            count = min(block, N - first)
            if masked or self.conv.bias:
                direct.output_gradient(
                    dy, self.y, winners, first, count, room, bias, *geometry.output[:2],
                    *chunk(geometry.output, BIAS_CHUNK), self.relu, self.pool,
                )  # fmt: skip
            d, d_first = (geometry.outputs(room), 0) if masked else (geometry.outputs(dy), first)
            weight_gradient(geometry, images, first, d, d_first, count, self.conv.gradients["weight"])
            if dx is not None:
                input_gradient(geometry, d, d_first, count, self.transposed, dx, first)
        return None if dx is None else dx.reshape(self.x.shape)


def transposed_convolution_at(layers: Sequence[Layer], names: Sequence[str]) -> CompiledLayers | None:
    """Return the implementation of the transposed convolution at the first of these layers."""
    return TransposedConvolution(layers[:1], names[0])


class TransposedConvolution(CompiledLayers):
    """A transposed convolution: the passes of a convolution of its output, with the roles exchanged; see `direct`.

    The output is an input gradient, plus the bias. The input gradient is a convolution, and in the gradient of the
    weights input and output gradient have changed places.
    """

    def __init__(self, layers: Sequence[Layer], name: str) -> None:
        conv = layers[0]
        assert isinstance(conv, ConvTranspose2d)
        self.conv = conv
        super().__init__(layers, name, (*conv.output_size, conv.filters))
        self.geometry = Geometry.of(conv.window, self.output_shape, (*conv.size, conv.channels))

    def elements(self) -> Elements:
        weights = math.prod(self.conv.window.kernel) * self.conv.channels * self.conv.filters
        wanted = self.conv.needs_input_gradient
        return Elements(
            kept=math.prod(self.output_shape),
            of_weights=weights * (1 + (wanted and not is_packed(self.conv.channels))),
            gradient=math.prod(self.conv.size) * self.conv.channels * wanted,
            scratch=self.geometry.sums_scratch(),
        )

    def prepare(self) -> None:
        weight = self.conv.parameters["weight"]
        self.transposed = self.kept.array("transposed", (weight.size,))
        direct.pack_for_input_gradient(weight, self.transposed, *self.geometry.window[2:])
        if self.conv.needs_input_gradient:
            self.packed = packed_weights(weight, lambda name: self.kept.array(name, (weight.size,)))

    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x, y = x, self.kept.array("y", (len(x), *self.output_shape))
        d = self.geometry.outputs(x)
        input_gradient(self.geometry, d, 0, len(d), self.transposed, self.geometry.images(y), 0)
        return np.add(y, self.conv.parameters["bias"], out=y)

    def _backward(self, dy: Array) -> Array | None:
        geometry, images, d = self.geometry, self.geometry.images(dy), self.geometry.outputs(self.x)
        N, flat = len(images), dy.reshape(-1)
        weight_gradient(geometry, images, 0, d, 0, N, self.conv.gradients["weight"])
        size = geometry.image[:2]
        direct.output_gradient(
            dy, dy, NO_WINNERS, 0, N, flat, self.conv.gradients["bias"],
            *size, *chunk(geometry.image, BIAS_CHUNK), False, False,
        )  # fmt: skip
        if not self.conv.needs_input_gradient:
            return None
        dx = self.gradients.take(self.x.shape)
        block = geometry.block(N)
        direct.convolve(
            images, 0, N, self.packed, 0, flat, geometry.outputs(dx), 0, NO_WINNERS, flat, *geometry.window,
            *geometry.output[:2], 0, 0, 1, 1, block, geometry.rows(block), geometry.by_pixels(N), False, False, False,
        )  # fmt: skip
        return dx


def chunk(output: Shape, limit: int) -> tuple[int, int]:
    """Return the number of images and of rows of a chunk, which has at most `limit` pixels, or is one row.

    The number of images is a power of two. It is 1 unless the chunk has all rows.
    """
    OH, OW, _ = output
    if limit < OH * OW:
        return 1, max(1, limit // OW)
    return 1 << (limit // (OH * OW)).bit_length() - 1, OH


@dataclass(frozen=True)
class Geometry:
    """A convolution of an `image` (H, W, C) to an `output` (OH, OW, F); `window` is kernel, stride and padding."""

    window: tuple[int, int, int, int, int, int]
    image: Shape
    output: Shape

    @classmethod
    def of(cls, window: Window, image: Shape, output: Shape, *, pooled: bool = False) -> "Geometry":
        """Without pooling, the pixels of a 1x1 convolution are images of their own."""
        numbers = (*window.kernel, *window.stride, *window.padding)
        if numbers == (1, 1, 1, 1, 0, 0) and not pooled:
            image, output = (1, 1, image[2]), (1, 1, output[2])
        return cls(numbers, image, output)

    def images(self, x: Array) -> Array:
        return x.reshape(-1, *self.image)

    def outputs(self, y: Array) -> Array:
        return y.reshape(-1, *self.output)

    def by_pixels(self, N: int) -> bool:
        """Return whether the rows of products are pixels of one image, not the same pixel of many images."""
        return self.output[1] > 1 and (N < 6 or self.output[1] >= 16)

    def block(self, N: int) -> int:
        """Return the number of images that a product, or its loop over pixels, takes at a time."""
        images = CACHE // (math.prod(self.image) + math.prod(self.output))
        if self.image[:2] == (1, 1):
            images = 96
        elif not self.by_pixels(N):
            images = max(24, images // 24 * 24)
        return max(1, min(images, N))

    def masked_block(self, N: int) -> int:
        """Return the number of images whose masked gradient is computed at a time: whole chunks of images."""
        images = CACHE // (self.image[2] + self.output[2]) if self.image[:2] == (1, 1) else self.block(N)
        group, _ = chunk(self.output, WEIGHT_CHUNK)
        return min(N, max(group, images // group * group))

    def masked_scratch(self, block: int) -> int:
        return block * math.prod(self.output)

    def rows(self, block: int) -> int:
        """Return the number of rows of images that are computed at a time, an even one."""
        return max(2, CACHE // 4 // (self.output[1] * self.output[2] * block) // 2 * 2)

    def pooling_scratch(self, block: int) -> int:
        return block * self.rows(block) * self.output[1] * self.output[2]

    def padded_rows(self) -> int:
        """Return the rows of the gradient of the weights, or a few more, so that they are cut into large tiles."""
        step = 16 if self.output[2] <= 16 else 4 if self.output[2] <= 32 else 2
        return -(-self.window[0] * self.window[1] * self.image[2] // step) * step

    def sums_scratch(self) -> int:
        """Return the floats of scratch of the gradient of the weights."""
        C, (_, OW, F), (FH, FW, _, SW, _, _) = self.image[2], self.output, self.window
        rows = math.prod(chunk(self.output, WEIGHT_CHUNK))
        if C < FEW:
            return self.padded_rows() * (F + 1) + rows * ((OW - 1) * SW + FW) * FH * C
        return rows * OW * (C + F)


def weight_gradient(
    geometry: Geometry, x: Array, x_first: int, d: Array, d_first: int, count: int, d_weight: Array
) -> None:
    """Set the gradient of the weights; add to it if the images are not the first ones."""
    (OH, OW, _), C = geometry.output, geometry.image[2]
    room, window, add = scratch("gradient of weights", geometry.sums_scratch()), geometry.window, x_first > 0
    group, rows = chunk(geometry.output, WEIGHT_CHUNK)
    if C < FEW:
        given = (x, x_first, d, d_first, count, d_weight, room)
        direct.weight_gradient_of_few(*given, *window, geometry.padded_rows(), group, rows, add)
    elif OH * OW >= MANY_PIXELS and C < MANY_CHANNELS:
        direct.weight_gradient_by_rows(x, x_first, d, d_first, count, d_weight, *window, rows, add)
    else:
        images = max(CACHE, d_weight.size) // (math.prod(geometry.image) + math.prod(geometry.output))
        step = max(1, images // group) * group  # so they stay in the cache
        for k in range(0, count, step):
            given = (x, x_first + k, d, d_first + k, min(step, count - k), d_weight, room)
            direct.weight_gradient_by_copies(*given, *window, group, rows, add or k > 0)


def input_gradient(
    geometry: Geometry, d: Array, d_first: int, count: int, packed: Array, dx: Array, dx_first: int
) -> None:
    """Write the input gradient of `count` images; `packed` is from `direct.pack_for_input_gradient`."""
    FH, FW, SH, SW, PH, PW = geometry.window
    (H, W, C), F = geometry.image, geometry.output[2]
    at = 0
    for a in range(min(SH, H)):
        FA = len(range((a + PH) % SH, FH, SH))
        for b in range(SW):
            FB, columns = len(range((b + PW) % SW, FW, SW)), len(range(b, W, SW))
            if columns:
                part = Geometry(
                    (FA, FB, 1, 1, FA - 1 - (a + PH) // SH, FB - 1 - (b + PW) // SW),
                    (*geometry.output[:2], F),
                    (len(range(a, H, SH)), columns, C),
                )
                block = part.block(count)
                direct.convolve(
                    d, d_first, count, packed, at, packed, dx, dx_first, NO_WINNERS, packed, *part.window,
                    *part.output[:2], a, b, SH, SW, block, part.rows(block), part.by_pixels(count), False, False, False,
                )  # fmt: skip
            at += FA * FB * F * C


def is_packed(columns: int) -> bool:
    """Return whether a matrix of this number of columns is its own packed form; see `products`."""
    return columns <= 32 or columns == 64


def packed_weights(weight: Array, array_of: Callable[[str], Array]) -> Array:
    """Return the packed matrix (..., F) of the weights, if necessary in the array of the name "packed"."""
    if is_packed(weight.shape[-1]):
        return weight.reshape(-1)
    packed = array_of("packed")
    products.pack(weight.reshape(-1, weight.shape[-1]), packed)
    return packed
