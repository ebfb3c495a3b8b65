"""The memory of the working arrays of a network, from its shapes alone.

Layers keep their working arrays for each number of samples (`Workspace`). This module lists the sizes of these arrays
by kind of layer. A test compares the sums with the arrays that networks really make.

N samples of a micro-batch; sizes are numbers of elements of one sample, such as H * W * C.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distdl.nn.activations import LeakyReLU, ReLU
from distdl.nn.composites import Branches, Composite
from distdl.nn.convolution import Conv2d, ConvTranspose2d
from distdl.nn.kernels.fused_layers import Elements
from distdl.nn.layer_stack import LayerStack
from distdl.nn.layers import Affine, Dropout, Flatten, Layer, Shape
from distdl.nn.network import Sequential
from distdl.nn.normalization import BatchNorm, LocalResponseNorm
from distdl.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from distdl.nn.upsampling import Upsample2d
from distdl.nn.windows import Pair, Window


def working_bytes(network: Sequential, training: set[int], evaluation: set[int]) -> int:
    """Return the bytes of all working arrays after passes with these numbers of samples.

    `training` and `evaluation` hold the numbers N of the micro-batches that occur in training and in evaluation.
    """
    elements = elements_of_stack(network.stack, network.input_shape)
    numbers = elements.of_weights + elements.forward * sum(training | evaluation) + elements.backward * sum(training)
    numbers += elements.kept * max(training | evaluation) + elements.gradient * max(training)
    numbers += elements.scratch
    for shared, largest in elements.of_tiles:
        numbers += shared * sum({size for N in training | evaluation for size in _tile_sizes(N, largest)})
    return int(numbers * network.dtype.itemsize)


def _tile_sizes(N: int, largest: int) -> set[int]:
    count = -(-N // largest)
    return {N // count, -(-N // count)}


def elements_of_stack(stack: LayerStack, shape: Shape) -> Elements:
    """Return the elements of the working arrays of all layers of a stack, given the shape of its input."""
    found = Elements()
    for _, layer, output, fused in stack.segments:
        if fused is None:
            found += _of_layer(layer, shape, output)
            shape = output
        else:
            shape = fused.output_shape
            own = fused.elements()
            found += replace(own, gradient=own.gradient + math.prod(shape))  # that of the output is in use too
    return found


def _of_layer(layer: Layer, input_shape: Shape, output_shape: Shape) -> Elements:
    x, y = math.prod(input_shape), math.prod(output_shape)
    if isinstance(layer, Composite):
        inside = sum((elements_of_stack(stack, input_shape) for _, stack in layer.members), Elements())
        return inside + Elements(y, x * layer.needs_input_gradient + y * isinstance(layer, Branches))
    if isinstance(layer, MaxPool2d | AvgPool2d):
        return _of_pooling(layer, input_shape, y)
    for kind, elements in _KINDS.items():
        if isinstance(layer, kind):
            return elements(layer, x, y)
    return Elements(y, x + y)  # a user's own layer


def _of_conv(layer: Conv2d, x: int, y: int) -> Elements:
    (FH, FW), (PH, PW), (H, W), C = layer.window.kernel, layer.window.padding, layer.size, layer.channels
    patches = math.prod(layer.output_size) * FH * FW * C
    if layer.window == Window((1, 1)):
        return Elements(y, x * layer.needs_input_gradient, of_weights=C * layer.filters)
    forward = patches + y + _padded(layer.size, C, layer.window.padding)
    if not layer.needs_input_gradient:
        return Elements(forward)
    if layer.window.stride == (1, 1):
        margin = (FH - 1 - PH, FW - 1 - PW)
        d_patches = _padded(layer.output_size, layer.filters, margin) + H * W * FH * FW * layer.filters
        return Elements(forward, d_patches + x, of_weights=FH * FW * C * layer.filters)
    return Elements(forward, patches + (H + 2 * PH) * (W + 2 * PW) * C + x * (layer.window.padding != (0, 0)))


def _of_transposed(layer: ConvTranspose2d, x: int, y: int) -> Elements:
    (FH, FW), (PH, PW), (OH, OW) = layer.window.kernel, layer.window.padding, layer.output_size
    spread, sums = math.prod(layer.size) * FH * FW * layer.filters, (OH + 2 * PH) * (OW + 2 * PW) * layer.filters
    is_padded = layer.window.padding != (0, 0)
    return Elements(spread + sums + y + y * is_padded, spread + sums * is_padded + x * layer.needs_input_gradient)


def _of_pooling(layer: MaxPool2d | AvgPool2d, input_shape: Shape, y: int) -> Elements:
    H, W, C = input_shape
    x, padded = H * W * C, _padded((H, W), C, layer.window.padding)
    of_outputs = 1.5 * y if isinstance(layer, MaxPool2d) else y
    return Elements(y + padded, of_outputs + (padded + x if padded else x))


def _of_upsampling(layer: Upsample2d, x: int, y: int) -> Elements:
    return Elements(y + y / layer.factor, x + x * layer.factor)


def _padded(size: Pair, channels: int, margin: Pair) -> int:
    """Return the elements of images with a margin; 0 without a margin: then there is no copy."""
    (H, W), (PH, PW) = size, margin
    return 0 if margin == (0, 0) else (H + 2 * PH) * (W + 2 * PW) * channels


#: The elements of each kind of layer, given the layer and the elements of its input and output.
_KINDS: dict[type[Layer], Callable[[Any, int, int], Elements]] = {
    Conv2d: _of_conv,
    ConvTranspose2d: _of_transposed,
    BatchNorm: lambda layer, x, _: Elements(2 * x + x / layer.channels, x),
    LocalResponseNorm: lambda _, x, __: Elements(4 * x, 2 * x),
    GlobalAvgPool2d: lambda _, x, y: Elements(y, x),
    Upsample2d: _of_upsampling,
    ReLU: lambda _, x, y: Elements(y, 1.25 * x),
    LeakyReLU: lambda _, x, y: Elements(1.25 * y, x),
    Dropout: lambda _, x, __: Elements(0, 2.25 * x),
    Flatten: lambda *_: Elements(),
    Affine: lambda layer, x, y: Elements(y, x * layer.needs_input_gradient),
}
