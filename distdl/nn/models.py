"""The networks of *Deep Learning from Scratch*, by name.

A model is a function from an input shape (H, W, C) and a number of classes to a network; its output is the
logits, the softmax being part of the loss. Sizes follow from the input shape, which may be any that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError, unknown_name
from distdl.nn.activations import ReLU
from distdl.nn.convolution import Conv2d
from distdl.nn.initializers import He, Normal
from distdl.nn.layers import Affine, Dropout, Flatten, Layer, Shape
from distdl.nn.network import Sequential
from distdl.nn.pooling import MaxPool2d

Model: TypeAlias = Callable[..., Sequential]
"""Called as ``model(input_shape, classes)``; ours take ``dtype`` besides."""


def mlp(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return the two-layer network of section 4.5 with 100 hidden units and ReLU, Normal(0.01)."""
    initializer = Normal(0.01)
    layers = [Flatten(), Affine(100, initializer), ReLU(), Affine(classes, initializer)]
    return Sequential(layers, input_shape, dtype=dtype)


def simple_convnet(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return the SimpleConvNet of section 7.5: conv - ReLU - pool - affine - ReLU - affine, Normal(0.01)."""
    initializer = Normal(0.01)
    layers = [
        Conv2d(30, 5, initializer=initializer),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Affine(100, initializer),
        ReLU(),
        Affine(classes, initializer),
    ]
    return Sequential(layers, input_shape, dtype=dtype)


def deep_convnet(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return the DeepConvNet of section 8.1: six 3x3 convolutions, two affine layers, dropout; He."""

    def convolution(filters: int, padding: int = 1) -> list[Layer]:
        return [Conv2d(filters, 3, padding=padding, initializer=He()), ReLU()]

    layers = [
        *convolution(16),
        *convolution(16),
        MaxPool2d(2),
        *convolution(32),
        *convolution(32, padding=2),
        MaxPool2d(2),
        *convolution(64),
        *convolution(64),
        MaxPool2d(2),
        Flatten(),
        Affine(50, He()),
        ReLU(),
        Dropout(0.5),
        Affine(classes, He()),
        Dropout(0.5),
    ]
    return Sequential(layers, input_shape, dtype=dtype)


MODELS: dict[str, Model] = {"mlp": mlp, "simple_convnet": simple_convnet, "deep_convnet": deep_convnet}


def build_model(name: str, input_shape: Shape, classes: int, **settings: Any) -> Sequential:
    """Return the model of this name; `settings` may give ``dtype`` (float32).

    Raises `UserError` for an unknown name, or a size that does not fit, naming the layer.

    >>> build_model("simple_convnet", (28, 28, 1), 10).parameter_count
    433890
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    if classes < 1:
        raise UserError(f"{classes} classes given, expected at least 1")
    return MODELS[name](input_shape, classes, **settings)
