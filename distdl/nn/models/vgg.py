"""VGG: only 3x3 convolutions, 2x2 max-pooling and affine layers."""

import numpy as np
from numpy.typing import DTypeLike

from distdl.nn.activations import ReLU
from distdl.nn.convolution import Conv2d
from distdl.nn.initializers import He
from distdl.nn.layers import Affine, Dropout, Flatten, Layer, Shape
from distdl.nn.models.variants import is_original
from distdl.nn.network import Sequential
from distdl.nn.pooling import MaxPool2d

#: Five poolings reduce this side to one pixel.
LEAST_SIDE = 32


def vgg11(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return VGG11: 132,863,336 parameters for 224x224x3, 1,000 classes (Simonyan and Zisserman 2014, table 1, A)."""
    return _vgg("vgg11", (1, 1, 2, 2, 2), input_shape, classes, dtype)


def vgg16(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return VGG16: 138,357,544 parameters for 224x224x3, 1,000 classes (Simonyan and Zisserman 2014, table 1, D)."""
    return _vgg("vgg16", (2, 2, 3, 3, 3), input_shape, classes, dtype)


def _vgg(name: str, depths: tuple[int, ...], input_shape: Shape, classes: int, dtype: DTypeLike) -> Sequential:
    """Return the network with `depths` convolutions in front of its five poolings; He.

    The original variant is for sides of at least 192 pixels. The variant for sides of 28 to 64 has 512 units in its
    affine layers instead of 4,096. If a side is below 32, a wider margin of the first convolution makes it 32. Other
    sizes raise `UserError`. Sources: section 8.2.2; Simonyan and Zisserman 2014.
    """
    hidden = 4096 if is_original(name, input_shape) else 512
    margin = max(0, -(-(LEAST_SIDE - min(input_shape[:2])) // 2))
    layers: list[Layer] = []
    for filters, depth in zip((64, 128, 256, 512, 512), depths, strict=True):
        for _ in range(depth):
            layers += [Conv2d(filters, 3, padding=1 if layers else 1 + margin, initializer=He()), ReLU()]
        layers.append(MaxPool2d(2))
    layers += [
        Flatten(),
        *(Affine(hidden, He()), ReLU(), Dropout(0.5)),
        *(Affine(hidden, He()), ReLU(), Dropout(0.5)),
        Affine(classes, He()),
    ]
    return Sequential(layers, input_shape, dtype=dtype)
