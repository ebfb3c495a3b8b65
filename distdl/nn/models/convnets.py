"""The book's convolutional networks, and their ancestors LeNet and AlexNet."""

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import unknown_name
from distdl.nn.activations import ReLU
from distdl.nn.convolution import Conv2d
from distdl.nn.initializers import He, Normal
from distdl.nn.layers import Affine, Dropout, Flatten, Layer, Shape
from distdl.nn.models.multilayer import ACTIVATIONS
from distdl.nn.models.variants import is_original
from distdl.nn.network import Sequential
from distdl.nn.normalization import LocalResponseNorm
from distdl.nn.pooling import AvgPool2d, MaxPool2d


def simple_convnet(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return the SimpleConvNet of section 7.5: conv - ReLU - pool - affine - ReLU - affine, Normal(0.01)."""
    initializer = Normal(0.01)
    layers = [
        *(Conv2d(30, 5, initializer=initializer), ReLU(), MaxPool2d(2), Flatten()),
        *(Affine(100, initializer), ReLU(), Affine(classes, initializer)),
    ]
    return Sequential(layers, input_shape, dtype=dtype)


def deep_convnet(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return the DeepConvNet of section 8.1: six 3x3 convolutions, two affine layers, dropout; He."""

    def convolution(filters: int, padding: int = 1) -> list[Layer]:
        return [Conv2d(filters, 3, padding=padding, initializer=He()), ReLU()]

    layers = [
        *(*convolution(16), *convolution(16), MaxPool2d(2)),
        *(*convolution(32), *convolution(32, padding=2), MaxPool2d(2)),
        *(*convolution(64), *convolution(64), MaxPool2d(2)),
        *(Flatten(), Affine(50, He()), ReLU(), Dropout(0.5)),
        *(Affine(classes, He()), Dropout(0.5)),
    ]
    return Sequential(layers, input_shape, dtype=dtype)


def lenet(input_shape: Shape, classes: int, *, activation: str = "tanh", dtype: DTypeLike = np.float32) -> Sequential:
    """Return LeNet-5: conv 6 - pool - conv 16 - pool - affine 120 - 84 - classes, all kernels 5x5, mean pooling.

    It is made for 32x32. An image with a side below 32 gets a margin of 2, as the paper's digits of 28x28 lie within
    32x32. Any image with sides of at least 12 fits. Its activation is tanh, the paper's squashing function; the book
    names the sigmoid: pass ``activation="sigmoid"``. The initial weights suit the activation, Xavier for both.

    Differences from the paper: each of the 16 filters sees all 6 channels, pooling has no weights, and the output is
    affine. Sources: section 7.7.1; LeCun et al. 1998.
    """
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", str(activation), ACTIVATIONS)
    activate, initializer = ACTIVATIONS[activation]
    margin = 2 if min(input_shape[:2]) < 32 else 0
    layers = [
        *(Conv2d(6, 5, padding=margin, initializer=initializer), activate(), AvgPool2d(2)),
        *(Conv2d(16, 5, initializer=initializer), activate(), AvgPool2d(2), Flatten()),
        *(Affine(120, initializer), activate()),
        *(Affine(84, initializer), activate()),
        Affine(classes, initializer),
    ]
    return Sequential(layers, input_shape, dtype=dtype)


def alexnet(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return AlexNet: five convolutions, three affine layers, local response normalization and Dropout; He.

    The original variant, for sides of at least 192 pixels, has the widths for one device (64, 192, 384, 256, 256, 4096,
    4096; Krizhevsky 2014, as in torchvision: 61,100,840 parameters for 224x224 or 227x227 and 1,000 classes) and the
    normalization of the first paper. The variant for sides of 28 to 64 begins with 5x5, stride 1, instead of 11x11,
    stride 4, and has 1,024 units in its affine layers. Other sizes raise `UserError`.

    Sources: section 7.7.2; Krizhevsky et al. 2012.
    """
    original = is_original("alexnet", input_shape, made_for="224x224 or 227x227")
    first = Conv2d(64, 11, stride=4, padding=2) if original else Conv2d(64, 5, padding=2)
    hidden = 4096 if original else 1024

    def norm() -> Layer:
        return LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)  # the paper's alpha is per element, ours per window

    layers = [
        *(first, ReLU(), norm(), MaxPool2d(3, stride=2)),
        *(Conv2d(192, 5, padding=2), ReLU(), norm(), MaxPool2d(3, stride=2)),
        *(Conv2d(384, 3, padding=1), ReLU()),
        *(Conv2d(256, 3, padding=1), ReLU()),
        *(Conv2d(256, 3, padding=1), ReLU(), MaxPool2d(3, stride=2)),
        Flatten(),
        *(Dropout(0.5), Affine(hidden, He()), ReLU()),
        *(Dropout(0.5), Affine(hidden, He()), ReLU()),
        Affine(classes, He()),
    ]
    return Sequential(layers, input_shape, dtype=dtype)
