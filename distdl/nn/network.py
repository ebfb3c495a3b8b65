"""A network: layers in a row, with all parameters in one flat vector.

A layer's parameters and gradients are named views of two flat vectors, so whoever reduces, updates, saves
or hashes a network handles one array. Each parameter starts on a 64-byte boundary; the padding in between
stays zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from distdl.arrays import ALIGNMENT_BYTES, aligned_zeros
from distdl.errors import UserError
from distdl.nn.layers import Array, Layer, ParameterSpec, Products, Shape
from distdl.rng import Key


class _Place(NamedTuple):
    """Where a parameter lies in the flat vectors."""

    layer: Layer
    name: str
    spec: ParameterSpec
    where: slice


class Sequential:
    """Layers in a row.

    `input_shape` and `output_shape` are those of one sample, without N. A layer is named after its class
    and its number among its kind: ``conv2d_1``, ``affine_2``; a parameter after its layer:
    ``conv2d_1.weight``.

    `parameters` and `gradients` are the flat vectors, `decay_slices` the parts of them where weight decay
    applies, `parameter_count` the number of parameters without padding.

    Raises `UserError`, naming the layer, if a layer's input does not fit.

    >>> from distdl.nn.layers import Affine, ReLU
    >>> network = Sequential([Affine(3), ReLU(), Affine(2)], (4,))
    >>> [(name, view.shape) for name, view in network.named_parameters()][:2]
    [('affine_1.weight', (4, 3)), ('affine_1.bias', (3,))]
    >>> network.parameter_count, network.output_shape
    (23, (2,))
    """

    def __init__(self, layers: Sequence[Layer], input_shape: Shape, *, dtype: DTypeLike = np.float32) -> None:
        self.layers = list(layers)
        self.layer_names = _names(self.layers)
        self.input_shape = tuple(input_shape)
        self.dtype = np.dtype(dtype)
        if not self.layers or len(set(map(id, self.layers))) < len(self.layers):
            raise UserError("a network needs at least one layer, and each layer only once; make a new one instead")
        if not all(n >= 1 for n in self.input_shape):
            raise UserError(f"input shape {self.input_shape} given, expected sizes of at least 1")
        #: If set, it is called with "forward" or "backward" and the name of each part that has just been done,
        #: and with None for a name when a pass begins. A network that fuses layers names the part as a whole.
        self.watch: Callable[[str, str | None], None] | None = None
        self._shapes = self._build()
        self.output_shape = self._shapes[-1]
        self._places = self._lay_out()
        size = self._places[-1].where.stop if self._places else 0
        self.parameters = aligned_zeros(_aligned(size, self.dtype), self.dtype)
        self.gradients = aligned_zeros(self.parameters.shape, self.dtype)
        self.parameter_count = sum(place.where.stop - place.where.start for place in self._places)
        self.decay_slices = [place.where for place in self._places if place.spec.decay]
        self._hand_out()

    def _build(self) -> list[Shape]:
        """Build each layer for the output of the one in front; return the shapes of all outputs."""
        shapes = []
        shape = self.input_shape
        for layer, name in zip(self.layers, self.layer_names, strict=True):
            try:
                shape = layer.build(shape, self.dtype)
            except UserError as error:
                raise UserError(f"{name} ({layer}): {error}") from None
            shapes.append(shape)
        return shapes

    def _lay_out(self) -> list[_Place]:
        places = []
        stop = 0
        for layer, layer_name in zip(self.layers, self.layer_names, strict=True):
            for spec in layer.parameter_specs():
                start = _aligned(stop, self.dtype)
                stop = start + math.prod(spec.shape)
                places.append(_Place(layer, f"{layer_name}.{spec.name}", spec, slice(start, stop)))
        return places

    def _hand_out(self) -> None:
        """Give each layer its views, and tell it whether anything in front of it needs a gradient."""
        for layer in self.layers:
            layer.parameters, layer.gradients = {}, {}
        for layer, _, spec, where in self._places:
            layer.parameters[spec.name] = self.parameters[where].reshape(spec.shape)
            layer.gradients[spec.name] = self.gradients[where].reshape(spec.shape)
        parameters_in_front = False
        for layer in self.layers:
            layer.needs_input_gradient = parameters_in_front
            parameters_in_front = parameters_in_front or bool(layer.parameters)

    def views(self, flat: Array) -> list[tuple[str, Array]]:
        """Return each parameter's name with its view of `flat`, any vector laid out as `parameters` is."""
        if flat.shape != self.parameters.shape:
            raise ValueError(f"a vector of shape {flat.shape} given, expected {self.parameters.shape}")
        return [(place.name, flat[place.where].reshape(place.spec.shape)) for place in self._places]

    def named_parameters(self) -> list[tuple[str, Array]]:
        """Return each parameter's name and view, in the order of the layers."""
        return self.views(self.parameters)

    def named_gradients(self) -> list[tuple[str, Array]]:
        """Return each parameter's name and the view of its gradient, in the order of the layers."""
        return self.views(self.gradients)

    def parts(self, samples: int) -> list[tuple[str, str, Products]]:
        """Return the parts that `watch` hears of: name, description, and the products for so many samples."""
        return [
            (name, str(layer), layer.products(samples))
            for layer, name in zip(self.layers, self.layer_names, strict=True)
        ]

    def initialize(self, key: Key) -> None:
        """Set each parameter by its initializer, from the key ``key.of(name)``."""
        for (name, view), place in zip(self.named_parameters(), self._places, strict=True):
            view[...] = place.spec.initializer(key.of(name), place.spec.shape, place.spec.fan_in)

    def forward(self, x: Array, *, training: bool = False, key: Key | None = None) -> Array:
        """Return the logits (N, ...) for `x` (N, ...), which has the network's dtype.

        The layer called ``dropout_1`` draws from ``key.of("dropout_1")``. The result may be a buffer that
        the next `forward` of the same N overwrites. `x` must stay as it is until `backward`.
        """
        if x.shape[1:] != self.input_shape or x.dtype != self.dtype:
            expected = ", ".join(str(n) for n in ("N", *self.input_shape))
            raise UserError(f"input is {x.dtype} {x.shape}; expected {self.dtype} ({expected})")
        if self.watch:
            self.watch("forward", None)
        for layer, name, shape in zip(self.layers, self.layer_names, self._shapes, strict=True):
            x = np.ascontiguousarray(x)
            x = layer.forward(x, training=training, key=None if key is None else key.of(name))
            if x.shape[1:] != shape:
                raise UserError(f"{name} ({layer}): forward returned {x.shape}; build announced {shape} without N")
            if self.watch:
                self.watch("forward", name)
        return x

    def backward(self, d_logits: Array) -> None:
        """Overwrite `gradients`, given the gradient of the loss by the logits of the latest `forward`."""
        d: Array | None = d_logits
        if self.watch:
            self.watch("backward", None)
        for layer, name in zip(reversed(self.layers), reversed(self.layer_names), strict=True):
            assert d is not None, "only a layer without need of an input gradient may return None"
            d = layer.backward(np.ascontiguousarray(d))
            if self.watch:
                self.watch("backward", name)
            if not layer.needs_input_gradient:
                break  # nothing in front has parameters


def _names(layers: Sequence[Layer]) -> list[str]:
    """Return for each layer its class in lower case and its number among its kind."""
    seen: Counter[str] = Counter()
    names = []
    for layer in layers:
        kind = type(layer).__name__.lower()
        seen[kind] += 1
        names.append(f"{kind}_{seen[kind]}")
    return names


def _aligned(count: int, dtype: np.dtype[Any]) -> int:
    """Return the least multiple of a 64-byte line's elements that is at least `count`."""
    line = ALIGNMENT_BYTES // dtype.itemsize
    return -(-count // line) * line
