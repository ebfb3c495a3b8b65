"""ResNet: a shortcut around every two or three convolutions, so that gradients reach the first layers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from distdl.nn.activations import ReLU
from distdl.nn.composites import Residual
from distdl.nn.convolution import Conv2d
from distdl.nn.initializers import He
from distdl.nn.layers import Affine, Layer, Shape
from distdl.nn.models.variants import is_original
from distdl.nn.network import Sequential
from distdl.nn.normalization import BatchNorm
from distdl.nn.pooling import GlobalAvgPool2d, MaxPool2d


def resnet18(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return ResNet-18: four stages of two blocks; 11,689,512 parameters for 1,000 classes.

    Sides of at least 192 pixels get the original variant, made for 224x224. In the variant for sides of 28 to 64 the
    first convolution is 3x3, stride 1, instead of 7x7, stride 2, and a pooling. Other sizes raise `UserError`.
    Sources: section 8.2.4; He et al. 2015.
    """
    layers = [*_beginning("resnet18", input_shape), *_stages((64, 128, 256, 512), (2, 2, 2, 2), channels=64)]
    return _resnet(layers, input_shape, classes, dtype)


def resnet50(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return ResNet-50: stages of 3, 4, 6 and 3 blocks of 1x1, 3x3 and 1x1; 25,557,032 parameters for 1,000 classes.

    Its variants are those of `resnet18`. At the beginning of a stage the 3x3 has the stride, as in PyTorch; in the
    paper the 1x1 in front has it. Sources: section 8.2.4; He et al. 2015.
    """
    stages = _stages((64, 128, 256, 512), (3, 4, 6, 3), channels=64, bottleneck=True)
    return _resnet([*_beginning("resnet50", input_shape), *stages], input_shape, classes, dtype)


def resnet20(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return the ResNet-20 made for 32x32: three stages of three blocks, 16 to 64 filters.

    It takes images of any size. A stage begins with a shortcut of a 1x1 convolution (the paper's option B): 272,474
    parameters for three channels and ten classes. Sources: section 8.2.4; He et al. 2015, section 4.2 of the paper.
    """
    layers = [*_convolution(16, 3), ReLU(), *_stages((16, 32, 64), (3, 3, 3), channels=16)]
    return _resnet(layers, input_shape, classes, dtype)


def _resnet(layers: Sequence[Layer], input_shape: Shape, classes: int, dtype: DTypeLike) -> Sequential:
    return Sequential([*layers, GlobalAvgPool2d(), Affine(classes, He())], input_shape, dtype=dtype)


def _beginning(name: str, input_shape: Shape) -> list[Layer]:
    if is_original(name, input_shape):
        return [*_convolution(64, 7, stride=2), ReLU(), MaxPool2d(3, stride=2, padding=1)]
    return [*_convolution(64, 3), ReLU()]


def _stages(widths: Sequence[int], depths: Sequence[int], *, channels: int, bottleneck: bool = False) -> list[Layer]:
    """Return the blocks of all stages; from the second stage on, the first block halves height and width."""
    layers: list[Layer] = []
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        outputs = 4 * width if bottleneck else width
        for number in range(depth):
            stride = 2 if stage and not number else 1
            body = _bottleneck(width, stride) if bottleneck else _basic(width, stride)
            changes = stride > 1 or channels != outputs
            layers += [Residual(body, _convolution(outputs, 1, stride) if changes else ()), ReLU()]
            channels = outputs
    return layers


def _basic(filters: int, stride: int) -> list[Layer]:
    return [*_convolution(filters, 3, stride), ReLU(), *_convolution(filters, 3)]


def _bottleneck(filters: int, stride: int) -> list[Layer]:
    """Return the layers of a block whose 3x3 has a quarter of the block's channels."""
    narrow = [*_convolution(filters, 1), ReLU(), *_convolution(filters, 3, stride), ReLU()]
    return [*narrow, *_convolution(4 * filters, 1)]


def _convolution(filters: int, kernel: int, stride: int = 1) -> list[Layer]:
    """Return a convolution that keeps the size, except for its stride, and a BatchNorm, whose beta is the bias."""
    convolution = Conv2d(filters, kernel, stride=stride, padding=kernel // 2, initializer=He(), bias=False)
    return [convolution, BatchNorm()]
