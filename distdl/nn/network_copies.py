"""Copies of a network with an additional layer after each layer: to record its output, or to round it to float16.

The additional layers have no parameters and change no names. So the copy has the parameters and buffers of the
original, under the same names. The original does not change.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np

from distdl.nn.composites import Composite
from distdl.nn.layer_stack import LayerStack
from distdl.nn.layers import Array, Layer
from distdl.nn.network import Sequential
from distdl.rng import Key


class Recorder(Layer):
    """Passes its input on, and keeps a copy of it in `x`."""

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x = x.copy()
        return x


class HalfStorage(Layer):
    """Stores its input as float16 and returns the stored numbers in the network's own dtype.

    It rounds to nearest, ties to even. The largest float16 is 65,504: numbers from 65,520 on become infinite. The
    smallest is 2⁻²⁴: numbers up to half of it become zero. The gradient passes unchanged. Source: section 8.3.4.
    """

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        stored = self.workspace.array("stored", x.shape, dtype=np.float16)
        y = self.workspace.array("y", x.shape)
        with np.errstate(over="ignore"):
            np.copyto(stored, x, casting="same_kind")
        np.copyto(y, stored)
        return y


def layer_outputs(network: Sequential, x: Array) -> dict[str, Array]:
    """Return the output of each layer in evaluation, (N, ...), by the layer's name, for `x` (N, ...).

    A layer that is made of others, such as `Residual`, counts as one layer.

    >>> from distdl.nn import Affine, ReLU
    >>> network = Sequential([Affine(2), ReLU()], (2,))
    >>> network.parameters[:] = 1
    >>> layer_outputs(network, np.array([[1, -4]], np.float32))
    {'affine_1': array([[-2., -2.]], dtype=float32), 'relu_1': array([[0., 0.]], dtype=float32)}
    """
    layers = copy.deepcopy(network.layers)
    recorders = [Recorder() for _ in layers]
    _copy_with(network, [layer for pair in zip(layers, recorders, strict=True) for layer in pair]).forward(x)
    return {name: recorder.x for name, recorder in zip(network.layer_names, recorders, strict=True)}


def half_precision(network: Sequential) -> Sequential:
    """Return a copy of the network, for evaluation, that stores its numbers as float16.

    It rounds to float16, each once: every parameter and buffer (the running moments of batch normalization), the
    network's input, and the output of each layer, including the last and those inside `Residual` and `Branches`. The
    products and sums inside a layer stay in the network's dtype, float32. Source: section 8.3.4.
    """
    half = _copy_with(network, [HalfStorage(), *_each_followed(copy.deepcopy(network.layers), HalfStorage)])
    for vector in (half.parameters, half.buffers):
        with np.errstate(over="ignore"):
            vector[...] = vector.astype(np.float16)
    return half


def _each_followed(layers: Sequence[Layer], make: Callable[[], Layer]) -> list[Layer]:
    """Return the layers, each followed by a new one from `make`, also inside composites."""
    followed: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Composite):
            layer.members = [(name, LayerStack(_each_followed(stack.layers, make))) for name, stack in layer.members]
        followed += [layer, make()]
    return followed


def _copy_with(network: Sequential, layers: Sequence[Layer]) -> Sequential:
    """Return a network of these layers with the parameters, buffers and kernels of `network`."""
    made = Sequential(layers, network.input_shape, dtype=network.dtype, kernels=network.stack.kernels)
    np.copyto(made.parameters, network.parameters)
    np.copyto(made.buffers, network.buffers)
    return made
