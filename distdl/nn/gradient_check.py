"""Check a `backward`: compare its gradients with central differences (sections 4.3 and 5.7).

``df/dx[i]`` is about ``(f(x + h e[i]) - f(x - h e[i])) / 2h``. In float64 with h = 1e-5 both agree to about 1e-9 if
`backward` is correct, and not at all if it is wrong. An error is relative to the largest entry of its array.

To check your own layer::

    assert check_layer(MyLayer(), (4, 4, 2)) < 1e-6
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from distdl.errors import UserError
from distdl.nn.kernels import PLAIN
from distdl.nn.layers import Array, Layer, Shape
from distdl.nn.losses import LossFunction, SoftmaxCrossEntropy
from distdl.nn.network import Sequential
from distdl.rng import Key

STEP = 1e-5
NOISE = 1e-6
"""If all gradients of an array are below this, the error is absolute, in units of it."""


def numerical_gradient(
    f: Callable[[], float], x: Array, indices: NDArray[np.int64] | None = None, h: float = STEP
) -> Array:
    """Return the gradient of `f`, which reads the contiguous float64 array `x`, by central differences.

    With `indices` (into the flattened array) the result has one element per index; without, it has the shape of `x`.
    `x` changes temporarily and is restored. Source: sections 4.3 and 4.4 (with h = 1e-4).

    >>> x = np.array([3.0, 4.0])
    >>> numerical_gradient(lambda: float((x**2).sum()), x).round(6).tolist()
    [6.0, 8.0]
    """
    if x.dtype != np.float64 or not x.flags.c_contiguous:
        raise UserError(f"numerical gradients need a contiguous float64 array; given {x.dtype}")
    flat = x.reshape(-1)
    chosen = np.arange(x.size) if indices is None else indices
    gradient = np.empty(len(chosen))
    for n, i in enumerate(chosen):
        kept = flat[i]
        flat[i] = kept + h
        above = f()
        flat[i] = kept - h
        below = f()
        flat[i] = kept
        gradient[n] = (above - below) / (2 * h)
    return gradient.reshape(x.shape) if indices is None else gradient


def check_network(
    network: Sequential,
    x: Array,
    targets: Array,
    loss: LossFunction | None = None,
    *,
    elements: int = 20,
    training: bool = False,
    key: Key | None = None,
) -> float:
    """Return the largest relative error among the gradients of all parameters of a float64 network.

    It compares at most `elements` elements of each parameter, always the same ones. The default loss is
    `SoftmaxCrossEntropy`. With ``training=True`` a network with dropout needs a `key`, which fixes the masks.
    Source: section 5.7.
    """
    loss = loss or SoftmaxCrossEntropy()

    def value() -> float:
        return loss.forward(network.forward(x, training=training, key=key), targets)

    value()
    network.backward(loss.backward())
    checked = [
        (parameter, gradient.copy())
        for (_, parameter), (_, gradient) in zip(network.named_parameters(), network.named_gradients(), strict=True)
    ]
    return max(_error(value, parameter, gradient, elements) for parameter, gradient in checked)


def check_layer(
    layer: Layer,
    input_shape: Shape,
    *,
    samples: int = 3,
    elements: int = 100,
    training: bool = False,
    key: Key | None = None,
) -> float:
    """Return the largest relative error among the gradients of a layer with respect to its input and parameters.

    The input (samples, *input_shape) is normal numbers in float64. A random projection reduces the output to one
    number. Parameters are their initial values plus noise. It compares at most `elements` elements of each array.
    Source: section 5.7, which checks a whole network.

    >>> from distdl.nn.activations import Sigmoid
    >>> check_layer(Sigmoid(), (4, 4, 2)) < 1e-6
    True
    """
    key = key or Key(0).of("check_layer")
    network = Sequential([layer], input_shape, dtype=np.float64, kernels=PLAIN)
    network.bind(needs_input_gradient=True)
    network.initialize(key)
    network.parameters += 0.1 * key.of("noise").normal(network.parameters.size)
    x, dy = (
        key.of(name).normal(samples * math.prod(shape)).reshape(samples, *shape)
        for name, shape in (("x", network.input_shape), ("dy", network.output_shape))
    )

    def value() -> float:
        return float((network.forward(x, training=training, key=key) * dy).sum())

    value()
    dx = network.backward(dy)
    if dx is None or dx.shape != x.shape:
        raise UserError(f"{layer}: backward returned no array of the input's shape {x.shape}")
    checked = [(x, dx.copy())]
    checked += [(layer.parameters[name], gradient.copy()) for name, gradient in layer.gradients.items()]
    return max(_error(value, array, gradient, elements) for array, gradient in checked)


def _error(value: Callable[[], float], array: Array, gradient: Array, elements: int) -> float:
    """Return the largest error of `gradient` at some of its elements, relative to its largest entry."""
    indices = Key(0).of("elements").permutation(array.size)[:elements]
    expected = numerical_gradient(value, array, indices)
    largest = max(np.abs(gradient).max(), np.abs(expected).max(), NOISE)
    return float(np.abs(gradient.reshape(-1)[indices] - expected).max() / largest)
