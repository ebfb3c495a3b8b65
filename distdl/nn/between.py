"""Copies of a network with a further layer behind each of its own: to keep what they put out, or to round it.

The further layers have no parameters and names of their own, so the copy has the parameters and buffers of the
original, under the same names. The original stays as it is.
"""
# ruff: noqa: ARG002  every layer's forward takes the same arguments, whether it needs them or not

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np

from distdl.nn.composites import Composite
from distdl.nn.layers import Array, Layer
from distdl.nn.network import Sequential
from distdl.rng import Key


class Kept(Layer):
    """Passes its input on, and keeps a copy of it in `x`."""

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return `x` itself, any shape."""
        self.x = x.copy()
        return x


class HalfStorage(Layer):
    """Stores its input as float16, to nearest with ties to even, and returns that in the network's own dtype.

    The largest is 65,504: from 65,520 on a number becomes infinite. The least is 2⁻²⁴: up to half of it one becomes
    zero. The gradient passes as it is. Source: section 8.3.4.
    """

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the rounded numbers, any shape."""
        stored = self.workspace.array("stored", x.shape, dtype=np.float16)
        y = self.workspace.array("y", x.shape)
        with np.errstate(over="ignore"):
            np.copyto(stored, x, casting="same_kind")
        np.copyto(y, stored)
        return y


def activations(network: Sequential, x: Array) -> dict[str, Array]:
    """Return what each layer puts out in evaluation, (N, ...), by the layer's name, for `x` (N, ...).

    Of a layer that is made of others, such as `Residual`, that is its own output alone.

    >>> from distdl.nn import Affine, ReLU
    >>> network = Sequential([Affine(2), ReLU()], (2,))
    >>> network.parameters[:] = 1
    >>> activations(network, np.array([[1, -4]], np.float32))
    {'affine_1': array([[-2., -2.]], dtype=float32), 'relu_1': array([[0., 0.]], dtype=float32)}
    """
    layers = copy.deepcopy(network.layers)
    kept = [Kept() for _ in layers]
    _like(network, [part for pair in zip(layers, kept, strict=True) for part in pair]).forward(x)
    return {name: keeper.x for name, keeper in zip(network.layer_names, kept, strict=True)}


def half_precision(network: Sequential) -> Sequential:
    """Return a copy of the network, for evaluation, whose numbers are stored as float16 and computed with as before.

    Rounded to float16, each once: every parameter and every buffer (the running moments of batch normalization); the
    network's input; what each layer puts out, the logits and the layers inside of `Residual` and `Branches` included.
    The products and sums inside of a layer are in the network's dtype, float32. Source: section 8.3.4.
    """
    half = _like(network, [HalfStorage(), *_each_followed(copy.deepcopy(network.layers), HalfStorage)])
    for vector in (half.parameters, half.buffers):
        with np.errstate(over="ignore"):
            vector[...] = vector.astype(np.float16)
    return half


def _each_followed(layers: Sequence[Layer], make: Callable[[], Layer]) -> list[Layer]:
    """Return the layers with one that `make` makes behind each, inside of composites too."""
    followed: list[Layer] = []
    for layer in layers:
        if isinstance(layer, Composite):
            layer.ways = [(name, _each_followed(way, make)) for name, way in layer.ways]
        followed += [layer, make()]
    return followed


def _like(network: Sequential, layers: Sequence[Layer]) -> Sequential:
    """Return a network of these layers with the parameters, buffers and form of `network`."""
    made = Sequential(layers, network.input_shape, dtype=network.dtype, form=network.layers[0].form)
    np.copyto(made.parameters, network.parameters)
    np.copyto(made.buffers, network.buffers)
    return made
