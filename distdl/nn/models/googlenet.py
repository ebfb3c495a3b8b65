"""GoogLeNet: modules of four branches side by side ("Inception")."""

import numpy as np
from numpy.typing import DTypeLike

from distdl.nn.activations import ReLU
from distdl.nn.composites import Branches
from distdl.nn.convolution import Conv2d
from distdl.nn.initializers import He
from distdl.nn.layers import Affine, Dropout, Layer, Shape
from distdl.nn.models.variants import is_original
from distdl.nn.network import Sequential
from distdl.nn.normalization import LocalResponseNorm
from distdl.nn.pooling import GlobalAvgPool2d, MaxPool2d

#: Filters of each module: 1x1; 1x1 before the 3x3, 3x3; 1x1 before the 5x5, 5x5; 1x1 after the pooling.
MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def googlenet(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return GoogLeNet as in the paper's table 1, without the two auxiliary classifiers; He.

    It has local response normalization and no BatchNorm, biases in its convolutions, and true 5x5 kernels: 6,998,552
    parameters for 1,000 classes. (torchvision's has BatchNorm, no biases, and 3x3 instead of 5x5.) The original variant
    is for sides of at least 192 pixels, made for 224x224. In the variant for sides of 28 to 64 the first convolution is
    3x3, stride 1, instead of 7x7, stride 2, and there is no pooling before module 3a. Other sizes raise `UserError`.
    Poolings have a margin of 1, which gives the paper's sizes.

    Sources: section 8.2.3; Szegedy et al. 2014.
    """
    original = is_original("googlenet", input_shape)

    def pool() -> Layer:
        return MaxPool2d(3, stride=2, padding=1)

    def norm() -> Layer:
        return LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)

    layers: list[Layer] = [
        *(_convolution(64, 7, stride=2) if original else _convolution(64, 3)),
        *(pool(), norm()),
        *_convolution(64, 1),
        *(*_convolution(192, 3), norm()),
    ]
    if original:
        layers.append(pool())
    layers += [*(inception(*MODULES[name]) for name in ("3a", "3b")), pool()]
    layers += [*(inception(*MODULES[name]) for name in ("4a", "4b", "4c", "4d", "4e")), pool()]
    layers += [inception(*MODULES[name]) for name in ("5a", "5b")]
    layers += [GlobalAvgPool2d(), Dropout(0.4), Affine(classes, He())]
    return Sequential(layers, input_shape, dtype=dtype)


def inception(ones: int, before_threes: int, threes: int, before_fives: int, fives: int, after_pool: int) -> Branches:
    """Return a module: 1x1; 1x1 - 3x3; 1x1 - 5x5; pooling - 1x1. Each convolution has its ReLU.

    The 1x1 convolutions before the larger ones and after the pooling reduce the number of channels.
    """
    return Branches(
        _convolution(ones, 1),
        [*_convolution(before_threes, 1), *_convolution(threes, 3)],
        [*_convolution(before_fives, 1), *_convolution(fives, 5)],
        [MaxPool2d(3, stride=1, padding=1), *_convolution(after_pool, 1)],
    )


def _convolution(filters: int, kernel: int, stride: int = 1) -> list[Layer]:
    return [Conv2d(filters, kernel, stride=stride, padding=kernel // 2, initializer=He()), ReLU()]
