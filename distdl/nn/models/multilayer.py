"""Networks of affine layers: logistic regression, and the book's networks of any depth."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError, unknown_name
from distdl.nn.activations import LeakyReLU, ReLU, Sigmoid, Tanh
from distdl.nn.initializers import He, Initializer, Normal, Xavier, Zeros
from distdl.nn.layers import Affine, Dropout, Flatten, Layer, Shape
from distdl.nn.network import Sequential
from distdl.nn.normalization import BatchNorm

#: Each activation with the initial weights that suit it (section 6.2).
ACTIVATIONS: dict[str, tuple[Callable[[], Layer], Initializer]] = {
    "relu": (ReLU, He()),
    "leaky_relu": (LeakyReLU, He()),
    "sigmoid": (Sigmoid, Xavier()),
    "tanh": (Tanh, Xavier()),
}


def logistic(input_shape: Shape, classes: int, *, dtype: DTypeLike = np.float32) -> Sequential:
    """Return multinomial logistic regression: one affine layer; the loss includes the softmax (Ng, week 2).

    Initial weights are Normal(0.01); the loss has one minimum, so they hardly matter.
    """
    return Sequential([Flatten(), Affine(classes, Normal(0.01))], input_shape, dtype=dtype)


#: Initial weights by name; a number is the standard deviation of `Normal`, as the book's `weight_init_std`.
INITIALIZERS: dict[str, Initializer] = {"he": He(), "xavier": Xavier(), "zeros": Zeros()}


def multilayer_net(
    input_shape: Shape,
    classes: int,
    hidden: Sequence[int] | int = (100,),
    activation: str = "relu",
    initializer: Initializer | str | float | None = None,
    *,
    batch_norm: bool = False,
    dropout: float = 0.0,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """Return the book's MultiLayerNet of any depth, or with `batch_norm` or `dropout` its MultiLayerNetExtend.

    For each of the `hidden` sizes it has affine - BatchNorm - activation - Dropout (a ratio), and at the end an affine
    layer. Activations are relu, leaky_relu, sigmoid and tanh. `initializer` sets all initial weights (also he, xavier,
    zeros, or a standard deviation); the default suits the activation: He for both ReLUs, otherwise Xavier. Weight decay
    belongs to the optimizer. Raises `UserError` for invalid settings. Source: sections 6.1.8 to 6.4.

    >>> net = multilayer_net((28, 28, 1), 10, hidden=(100,) * 4, batch_norm=True)
    >>> net.layer_names[:4], net.parameter_count
    (['flatten_1', 'affine_1', 'batchnorm_1', 'relu_1'], 110610)
    """
    if activation not in ACTIVATIONS:
        raise unknown_name("activation", str(activation), ACTIVATIONS)
    sizes = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    if any(isinstance(size, bool) or not isinstance(size, int | np.integer) for size in sizes):
        raise UserError(f"hidden={hidden!r} given, expected whole numbers: (100, 50), or by flag hidden=100-50")
    if not isinstance(batch_norm, bool):
        raise UserError(f"batch_norm={batch_norm!r} given, expected true or false")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise UserError(f"dropout={dropout!r} given, expected a ratio from 0 to below 1")
    activate, default = ACTIVATIONS[activation]
    start = default if initializer is None else _initializer(initializer)
    layers: list[Layer] = [Flatten()]
    for size in sizes:
        layers.append(Affine(size, start))
        if batch_norm:
            layers.append(BatchNorm())
        layers.append(activate())
        if dropout:
            layers.append(Dropout(dropout))
    layers.append(Affine(classes, start))
    return Sequential(layers, input_shape, dtype=dtype)


def _initializer(given: Initializer | str | float) -> Initializer:
    """Return the initializer for a name or a standard deviation; raise `UserError` if it is invalid."""
    if isinstance(given, str):
        if given not in INITIALIZERS:
            raise unknown_name("initializer", given, INITIALIZERS)
        return INITIALIZERS[given]
    if isinstance(given, bool | tuple) or (isinstance(given, int | float) and not given > 0):
        raise UserError(f"initializer={given} given, expected {', '.join(INITIALIZERS)}, or a deviation above 0")
    return Normal(given) if isinstance(given, int | float) else given


def mlp(
    input_shape: Shape,
    classes: int,
    hidden: Sequence[int] | int | None = None,
    activation: str = "relu",
    initializer: Initializer | str | float | None = None,
    *,
    batch_norm: bool = False,
    dropout: float = 0.0,
    dtype: DTypeLike = np.float32,
) -> Sequential:
    """Return the two-layer network of chapter 5 (5.7.2): 100 hidden units with ReLU, all weights Normal(0.01).

    With `hidden`, one or more sizes, it is `multilayer_net` with the same settings. The initial weights then suit the
    activation, because a deep network does not learn from Normal(0.01) (section 6.2).
    """
    return multilayer_net(
        input_shape,
        classes,
        (100,) if hidden is None else hidden,
        activation,
        0.01 if hidden is None and initializer is None else initializer,
        batch_norm=batch_norm,
        dropout=dropout,
        dtype=dtype,
    )
