"""A network: layers in a row, with all parameters in one flat vector.

A layer's parameters and gradients are named views of two flat vectors, so whoever reduces, updates, saves
or hashes a network handles one array. Each parameter starts on a 64-byte boundary; the padding in between
stays zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from distdl.arrays import ALIGNMENT_BYTES, aligned_zeros
from distdl.errors import UserError
from distdl.nn.fused import Chain, chain_at
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

    In the fast form, which is the default, convolutions with the ReLU and 2x2 max-pooling behind them are run as chains
    of fused blocks (see `distdl.nn.fused`); in the plain form every layer runs as it is written, which is the oracle.

    `parameters` and `gradients` are the flat vectors, `decay_slices` the parts of them where weight decay
    applies, `parameter_count` the number of parameters without padding.

    Raises `UserError`, naming the layer, if a layer's input does not fit.

    >>> from distdl.nn import Affine, ReLU
    >>> network = Sequential([Affine(3), ReLU(), Affine(2)], (4,))
    >>> [(name, view.shape) for name, view in network.named_parameters()][:2]
    [('affine_1.weight', (4, 3)), ('affine_1.bias', (3,))]
    >>> network.parameter_count, network.output_shape
    (23, (2,))
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        input_shape: Shape,
        *,
        dtype: DTypeLike = np.float32,
        form: Literal["fast", "plain"] = "fast",
    ) -> None:
        self.layers = list(layers)
        self.layer_names = _names(self.layers)
        self.input_shape = tuple(input_shape)
        self.dtype = np.dtype(dtype)
        if not self.layers or len(set(map(id, self.layers))) < len(self.layers):
            raise UserError("a network needs at least one layer, and each layer only once; make a new one instead")
        if not all(n >= 1 for n in self.input_shape):
            raise UserError(f"input shape {self.input_shape} given, expected sizes of at least 1")
        #: If set, it is called with "forward" or "backward" and the name of each part that has just been done,
        #: and with None for a name when a pass begins. Fused layers are one part, done once for each tile.
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
        self._stages = self._staged(form)

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

    def _staged(self, form: str) -> list[_Stage]:
        """Return what is run one after the other: in the fast form, chains of fused layers where there are some."""
        stages = []
        start = 0
        while start < len(self.layers):
            chain, taken = None, 0
            if form == "fast":
                chain, taken = chain_at(self.layers[start:], self.layer_names[start:])
            stages.append(_Stage(slice(start, start + max(taken, 1)), chain))
            start += max(taken, 1)
        return stages

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
        found = []
        for stage in self._stages:
            if stage.chain is None:
                place = stage.layers.start
                layer = self.layers[place]
                found.append((self.layer_names[place], str(layer), layer.products(samples)))
            else:
                found += [(block.name, str(block), block.conv.products(samples)) for block in stage.chain.blocks]
        return found

    def initialize(self, key: Key) -> None:
        """Set each parameter by its initializer, from the key ``key.of(name)``."""
        for (name, view), place in zip(self.named_parameters(), self._places, strict=True):
            view[...] = place.spec.initializer(key.of(name), place.spec.shape, place.spec.fan_in)

    def forward(
        self, x: Array, *, training: bool = False, key: Key | None = None, parameters_changed: bool = True
    ) -> Array:
        """Return the logits (N, ...) for `x` (N, ...), which has the network's dtype.

        The layer called ``dropout_1`` draws from ``key.of("dropout_1")``. The result may be a buffer that
        the next `forward` of the same N overwrites. `x` must stay as it is until `backward`.
        """
        if x.shape[1:] != self.input_shape or x.dtype != self.dtype:
            expected = ", ".join(str(n) for n in ("N", *self.input_shape))
            raise UserError(f"input is {x.dtype} {x.shape}; expected {self.dtype} ({expected})")
        if self.watch:
            self.watch("forward", None)
        for stage in self._stages:
            x = np.ascontiguousarray(x)
            if stage.chain is not None:
                x = stage.chain.forward(x, prepare=parameters_changed, watch=self.watch)
                continue
            place = stage.layers.start
            layer, name = self.layers[place], self.layer_names[place]
            x = layer.forward(x, training=training, key=None if key is None else key.of(name))
            if x.shape[1:] != self._shapes[place]:
                raise UserError(
                    f"{name} ({layer}): forward returned {x.shape}; build announced {self._shapes[place]} without N"
                )
            if self.watch:
                self.watch("forward", name)
        return x

    def backward(self, d_logits: Array) -> None:
        """Overwrite `gradients`, given the gradient of the loss by the logits of the latest `forward`."""
        d: Array | None = d_logits
        if self.watch:
            self.watch("backward", None)
        for stage in reversed(self._stages):
            assert d is not None, "only a layer without need of an input gradient may return None"
            first = self.layers[stage.layers.start]
            d = np.ascontiguousarray(d)
            if stage.chain is not None:
                d = stage.chain.backward(d, watch=self.watch)
            else:
                d = first.backward(d)
                if self.watch:
                    self.watch("backward", self.layer_names[stage.layers.start])
            if not first.needs_input_gradient:
                break  # nothing in front has parameters


class _Stage(NamedTuple):
    """Layers that are run as one: a chain of fused ones, or a single layer as it is."""

    layers: slice
    chain: Chain | None


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
