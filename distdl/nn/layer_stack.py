"""Layers that run one after another: the layers of a network, or of one branch of a composite.

The kernels of a stack decide which layers run together (see `distdl.nn.kernels`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.kernels import NUMPY, FusedLayers, Kernels
from distdl.nn.layers import Array, BufferSpec, Layer, ParameterSpec, Products, Shape, Vectors, Watch
from distdl.rng import Key

Segment: TypeAlias = tuple[str, Layer, Shape, FusedLayers | None]
"""Layers that run together: name, layer and output shape of the first one, and their implementation by the kernels."""


class LayerGroup(Layer):
    """A layer made of others. `members` lists the name and the layer of each.

    A member's name precedes the names of its parameters and buffers: ``body.conv2d_1.weight``.
    """

    members: Sequence[tuple[str, Layer]]
    kernels: Kernels = NUMPY
    """Set before `bind`, also for the groups inside."""

    def use(self, kernels: Kernels) -> None:
        """Choose the kernels of all stacks inside; `bind` follows."""
        self.kernels = kernels
        for _, member in self.members:
            if isinstance(member, LayerGroup):
                member.use(kernels)

    def every_layer(self) -> Iterator[Layer]:
        """Yield all layers inside, each one before the layers that it is made of; stacks themselves do not count."""
        for _, member in self.members:
            if not isinstance(member, LayerStack):
                yield member
            if isinstance(member, LayerGroup):
                yield from member.every_layer()

    def parameter_specs(self) -> list[ParameterSpec]:
        return [
            replace(spec, name=f"{name}.{spec.name}")
            for name, member in self.members
            for spec in member.parameter_specs()
        ]

    def buffer_specs(self) -> list[BufferSpec]:
        return [
            replace(spec, name=f"{name}.{spec.name}") for name, member in self.members for spec in member.buffer_specs()
        ]

    def prepare(self) -> None:
        for _, member in self.members:
            member.prepare()

    def update_buffers(self) -> None:
        for _, member in self.members:
            member.update_buffers()

    def products(self, samples: int) -> Products:
        each = [member.products(samples) for _, member in self.members]
        return Products(
            forward=tuple(product for products in each for product in products.forward),
            backward=tuple(product for products in each for product in products.backward),
        )


class LayerStack(LayerGroup):
    """Layers that run one after another.

    A layer's name is its class and its number among the layers of this class: ``conv2d_1``, ``affine_2``. After
    `build`, `shapes` has the shapes of all outputs.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)
        self.names = _names(layers)
        self.members = list(zip(self.names, self.layers, strict=True))

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """Build all layers; raise `UserError`, naming the layer, if a layer's input does not fit."""
        shape = super().build(input_shape, dtype)
        self.shapes: list[Shape] = []
        for name, layer in self.members:
            try:
                shape = layer.build(shape, dtype)
            except UserError as error:
                raise type(error)(f"{name} ({layer}): {error}") from None
            self.shapes.append(shape)
        return shape

    def bind(self, vectors: Vectors) -> None:
        """Give each layer its views, and tell it whether its input gradient is needed; then decide what to fuse."""
        super().bind(vectors)
        needed = self.needs_input_gradient
        for name, layer in self.members:
            layer.needs_input_gradient = needed
            own = vectors.below(name)
            layer.bind(own)
            needed = needed or bool(own.parameters)
        self.segments = list(self._segments())

    def _segments(self) -> Iterator[Segment]:
        start = 0
        while start < len(self.layers):
            fused, taken = self.kernels.fuse(self.layers[start:], self.names[start:])
            yield self.names[start], self.layers[start], self.shapes[start], fused
            start += taken

    def prepare(self) -> None:
        super().prepare()
        for *_, fused in self.segments:
            if fused is not None:
                fused.prepare()

    def forward(self, x: Array, *, training: bool, key: Key | None, watch: Watch | None = None) -> Array:
        """Return the last layer's output; a layer called ``dropout_1`` draws from ``key.of("dropout_1")``."""
        for name, layer, shape, fused in self.segments:
            x = np.ascontiguousarray(x)
            if fused is not None:
                x = fused.forward(x, training=training, key=key, watch=watch)
                continue
            x = layer.forward(x, training=training, key=None if key is None else key.of(name))
            if x.shape[1:] != shape:
                raise UserError(f"{name} ({layer}): forward returned {x.shape}; build announced {shape} without N")
            if watch:
                watch("forward", name)
        return x

    def backward(self, dy: Array, *, watch: Watch | None = None) -> Array | None:
        """Set the gradients of all layers; return that of the input, or None if it is not needed."""
        d: Array | None = dy
        for name, layer, _, fused in reversed(self.segments):
            assert d is not None, "only a layer without need of an input gradient may return None"
            d_output = d = np.ascontiguousarray(d)
            if fused is not None:
                d = fused.backward(d, watch=watch)
            else:
                d = layer.backward(d)
                if watch:
                    watch("backward", name)
            self.kernels.release(d_output, dy, d)
            if not layer.needs_input_gradient:
                return None
        return d


def _names(layers: Sequence[Layer]) -> list[str]:
    """Return for each layer its class in lower case and its number among the layers of this class."""
    kinds = [type(layer).__name__.lower() for layer in layers]
    return [f"{kind}_{kinds[:index].count(kind) + 1}" for index, kind in enumerate(kinds)]


def list_of_layers(owner: str, given: Any) -> list[Layer]:
    """Return the layers given to `owner` as a list; raise `UserError` if one of them is not a layer."""
    if isinstance(given, Layer | str) or not isinstance(given, Iterable):
        raise UserError(f"{owner}: {given} given, expected a list of layers")
    layers = list(given)
    for layer in layers:
        if isinstance(layer, type):
            raise UserError(f"{owner}: the class {layer.__name__} given, expected a layer: {layer.__name__}(...)")
        if not isinstance(layer, Layer):
            raise UserError(f"{owner}: {layer!r} given, expected a layer")
    return layers
