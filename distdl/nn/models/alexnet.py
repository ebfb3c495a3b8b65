"""AlexNet: ReLU, local response normalization and Dropout."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from distdl.nn.activations import ReLU
from distdl.nn.convolution import Conv2d
from distdl.nn.initializers import He
from distdl.nn.layers import Affine, Dropout, Flatten, Layer, Shape
from distdl.nn.models.variants import is_original
from distdl.nn.network import Sequential
from distdl.nn.normalization import LocalResponseNorm
from distdl.nn.pooling import MaxPool2d


def alexnet(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return AlexNet: five convolutions and three affine layers; He.

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
