"""Networks of affine layers: logistic regression, and the book's networks of any depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError, unknown_name
from distdl.nn.activations import LeakyReLU, ReLU, Sigmoid, Tanh
from distdl.nn.initializers import He, Initializer, Normal, Xavier
from distdl.nn.layers import Affine, Dropout, Flatten, Layer, Shape
from distdl.nn.network import Sequential
from distdl.nn.normalization import BatchNorm

#: Each activation with the initial weights made for it (section 6.2).
ACTIVATIONS: dict[str, tuple[Callable[[], Layer], Initializer]] = {
    "relu": (ReLU, He()),
    "leaky_relu": (LeakyReLU, He()),
    "sigmoid": (Sigmoid, Xavier()),
    "tanh": (Tanh, Xavier()),
}


def logistic(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return multinomial logistic regression: one affine layer, whose softmax is in the loss (Ng, week 2).

    It begins with Normal(0.01); its loss has one minimum, wherever it begins.
    """
    return Sequential([Flatten(), Affine(classes, Normal(0.01))], input_shape, dtype=dtype)


def multilayer_net(
    input_shape: Shape,
    classes: int,
    hidden: Sequence[int] = (100,),
    activation: str = "relu",
    initializer: Initializer | None = None,
    *,
    batch_norm: bool = False,
    dropout: float = 0.0,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """Return the book's MultiLayerNet of any depth, or with `batch_norm` or `dropout` its MultiLayerNetExtend.

    For each of the `hidden` sizes it has affine - BatchNorm - activation - Dropout (a ratio), and at the end an affine
    layer. Activations are relu, leaky_relu, sigmoid and tanh. All weights begin by `initializer`; without one by that
    which is made for the activation, He for both ReLUs and Xavier else. Weight decay is the optimizer's. Raises
    `UserError`. Source: sections 6.1.8 to 6.4.

    >>> net = multilayer_net((28, 28, 1), 10, hidden=(100,) * 4, batch_norm=True)
    >>> net.layer_names[:4], net.parameter_count
    (['flatten_1', 'affine_1', 'batchnorm_1', 'relu_1'], 110610)
    """
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    if isinstance(hidden, int):
        raise UserError(f"hidden={hidden} given, expected the size of each hidden layer, such as ({hidden},)")
    activate, made_for_it = ACTIVATIONS[activation]
    initializer = initializer or made_for_it
    layers: list[Layer] = [Flatten()]
    for size in hidden:
        layers.append(Affine(size, initializer))
        if batch_norm:
            layers.append(BatchNorm())
        layers.append(activate())
        if dropout:
            layers.append(Dropout(dropout))
    layers.append(Affine(classes, initializer))
    return Sequential(layers, input_shape, dtype=dtype)


def mlp(input_shape: Shape, classes: int, **settings: Any) -> Sequential:
    """Return the two-layer network of section 4.5 with 100 hidden units and ReLU, Normal(0.01).

    `settings` are those of `multilayer_net`, so ``build_model("mlp", shape, 10, hidden=(100,) * 4)`` is a deeper one.
    """
    return multilayer_net(input_shape, classes, **{"initializer": Normal(0.01), **settings})
