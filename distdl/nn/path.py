"""Layers in a row: what a network runs, and each way through a layer that is made of others.

A path builds its layers for an input shape, hands them their views of the network's vectors, and then runs them: in
the fast form with convolutions and what stands behind them as chains of fused blocks (see `distdl.nn.fused`), in the
plain form one by one as they are written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.fused import Chain, chain_at
from distdl.nn.layers import Array, BufferSpec, Layer, ParameterSpec, Products, Shape, Vectors
from distdl.rng import Key

Form = Literal["fast", "plain"]
Watch = Callable[[str, str | None], None]
Spec = TypeVar("Spec", ParameterSpec, BufferSpec)


class Path:
    """Layers in a row, built for inputs of `input_shape` without N.

    A layer is named after its class and its number among its kind: ``conv2d_1``, ``affine_2``. `shapes` are those of
    all outputs. Raises `UserError`, naming the layer, if a layer's input does not fit.
    """

    def __init__(self, layers: Sequence[Layer], input_shape: Shape, dtype: DTypeLike, form: Form) -> None:
        self.layers = list(layers)
        self.names = _names(self.layers)
        self.shapes: list[Shape] = []
        self.stages: list[Stage] = []
        self._form = form
        shape = input_shape
        for layer, name in self._named_layers():
            try:
                layer.form = form
                shape = layer.build(shape, dtype)
            except UserError as error:
                raise UserError(f"{name} ({layer}): {error}") from None
            self.shapes.append(shape)

    def parameter_specs(self) -> list[ParameterSpec]:
        """Return the parameters of all layers, each named after its layer: ``conv2d_1.weight``."""
        return [_named(spec, name) for layer, name in self._named_layers() for spec in layer.parameter_specs()]

    def buffer_specs(self) -> list[BufferSpec]:
        """Return the buffers of all layers, each named after its layer: ``batchnorm_1.mean``."""
        return [_named(spec, name) for layer, name in self._named_layers() for spec in layer.buffer_specs()]

    def _named_layers(self) -> list[tuple[Layer, str]]:
        return list(zip(self.layers, self.names, strict=True))

    def bind(self, vectors: Vectors, *, needs_input_gradient: bool) -> None:
        """Give each layer its views, and tell it whether its input gradient is needed; then decide what to fuse."""
        needed = needs_input_gradient
        for layer, name in self._named_layers():
            layer.needs_input_gradient = needed
            own = vectors.below(name)
            layer.bind(own)
            needed = needed or bool(own.parameters)
        self.stages = self._staged()

    def _staged(self) -> list[Stage]:
        stages = []
        start = 0
        while start < len(self.layers):
            chain, taken = None, 0
            if self._form == "fast":
                chain, taken = chain_at(self.layers[start:], self.names[start:])
            stages.append(Stage(slice(start, start + max(taken, 1)), chain))
            start += max(taken, 1)
        return stages

    def update_buffers(self) -> None:
        """Let all layers update their buffers from their statistics, once a step."""
        for layer in self.layers:
            layer.update_buffers()

    def products(self, samples: int) -> Products:
        """Return the matrix products of all layers."""
        all_of_them = [layer.products(samples) for layer in self.layers]
        return Products(
            forward=tuple(product for products in all_of_them for product in products.forward),
            backward=tuple(product for products in all_of_them for product in products.backward),
        )

    def prepare(self) -> None:
        """Let all layers and chains derive data from the parameters."""
        for stage in self.stages:
            if stage.chain is None:
                self.layers[stage.layers.start].prepare()
            else:
                stage.chain.prepare()

    def forward(self, x: Array, *, training: bool, key: Key | None, watch: Watch | None = None) -> Array:
        """Return the last layer's output; a layer called ``dropout_1`` draws from ``key.of("dropout_1")``."""
        for stage in self.stages:
            x = np.ascontiguousarray(x)
            if stage.chain is not None:
                x = stage.chain.forward(x, watch=watch)
                continue
            place = stage.layers.start
            layer, name = self.layers[place], self.names[place]
            x = layer.forward(x, training=training, key=None if key is None else key.of(name))
            if x.shape[1:] != self.shapes[place]:
                raise UserError(
                    f"{name} ({layer}): forward returned {x.shape}; build announced {self.shapes[place]} without N"
                )
            if watch:
                watch("forward", name)
        return x

    def backward(self, dy: Array, *, watch: Watch | None = None) -> Array | None:
        """Set the gradients of all layers; return that of the input, or None where nothing in front needs it."""
        d: Array | None = dy
        for stage in reversed(self.stages):
            assert d is not None, "only a layer without need of an input gradient may return None"
            first = self.layers[stage.layers.start]
            d = np.ascontiguousarray(d)
            if stage.chain is not None:
                d = stage.chain.backward(d, watch=watch)
            else:
                d = first.backward(d)
                if watch:
                    watch("backward", self.names[stage.layers.start])
            if not first.needs_input_gradient:
                return None
        return d


class Stage(NamedTuple):
    """Layers that are run as one: a chain of fused ones, or a single layer as it is."""

    layers: slice
    chain: Chain | None


def _named(spec: Spec, layer_name: str) -> Spec:
    return replace(spec, name=f"{layer_name}.{spec.name}")


def _names(layers: Sequence[Layer]) -> list[str]:
    """Return for each layer its class in lower case and its number among its kind."""
    seen: Counter[str] = Counter()
    names = []
    for layer in layers:
        kind = type(layer).__name__.lower()
        seen[kind] += 1
        names.append(f"{kind}_{seen[kind]}")
    return names
