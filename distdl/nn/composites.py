"""Layers made of other layers: a way around them (ResNet), and several ways side by side (GoogLeNet)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.layers import (
    Array,
    BufferSpec,
    Layer,
    ParameterSpec,
    Products,
    Shape,
    Vectors,
    list_of_layers,
    show_shape,
)
from distdl.nn.path import Path
from distdl.rng import Key


class Composite(Layer):
    """Ways that the same input takes, each through layers of its own; a subclass says how outputs become one.

    `ways` gives each way's name, which stands before those of its layers (``body.conv2d_1.weight``), and its layers; a
    way without layers passes the input on.
    """

    def __init__(self, ways: Sequence[tuple[str, Sequence[Layer]]]) -> None:
        self.ways = [(name, list_of_layers(f"{type(self).__name__}, {name}", layers)) for name, layers in ways]

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """Each way's first layer must take such an input."""
        super().build(input_shape, dtype)
        self.paths = [
            (name, Path(layers, input_shape, dtype, self.form) if layers else None) for name, layers in self.ways
        ]
        return self._joined_shape([input_shape if path is None else path.shapes[-1] for _, path in self.paths])

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the output; raise `UserError` where those of the ways do not fit together."""
        raise NotImplementedError

    def _join(self, outputs: Sequence[Array]) -> Array:
        """Return the output, given those of the ways."""
        raise NotImplementedError

    def _parts_of(self, dy: Array) -> Sequence[Array]:
        """Return the gradient by the output of each way."""
        raise NotImplementedError

    def parameter_specs(self) -> list[ParameterSpec]:
        """Return those of all ways."""
        return [
            ParameterSpec(f"{name}.{spec.name}", spec.shape, spec.initializer, spec.fan_in, spec.decay)
            for name, path in self._built()
            for spec in path.parameter_specs()
        ]

    def buffer_specs(self) -> list[BufferSpec]:
        """Return those of all ways."""
        return [
            BufferSpec(f"{name}.{spec.name}", spec.shape, spec.initial, spec.statistics)
            for name, path in self._built()
            for spec in path.buffer_specs()
        ]

    def bind(self, vectors: Vectors) -> None:
        """Hand each way its views."""
        super().bind(vectors)
        for name, path in self._built():
            path.bind(vectors.below(name), needs_input_gradient=self.needs_input_gradient)

    def prepare(self) -> None:
        """Let all ways derive data from their parameters."""
        for _, path in self._built():
            path.prepare()

    def update_buffers(self) -> None:
        """Let all ways update theirs."""
        for _, path in self._built():
            path.update_buffers()

    def products(self, samples: int) -> Products:
        """Return those of all ways."""
        ways = [path.products(samples) for _, path in self._built()]
        return Products(
            forward=tuple(product for way in ways for product in way.forward),
            backward=tuple(product for way in ways for product in way.backward),
        )

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the joined outputs of all ways; a layer of theirs draws from ``key.of(way, layer)``."""
        outputs = []
        for name, path in self.paths:
            if path is None:
                outputs.append(x)
                continue
            below = None if key is None else key.of(name)
            outputs.append(path.forward(x, training=training, key=below))
        return self._join(outputs)

    def backward(self, dy: Array) -> Array | None:
        """Set the gradients of all layers; return that of the input, the sum over the ways."""
        parts = [
            part if path is None else path.backward(part)
            for (_, path), part in zip(self.paths, self._parts_of(dy), strict=True)
        ]
        if not self.needs_input_gradient:
            return None
        first, *others = parts
        assert first is not None, "every way gives its input gradient where it is needed"
        dx = self.workspace.array("dx", first.shape)
        np.copyto(dx, first)
        for other in others:
            assert other is not None, "every way gives its input gradient where it is needed"
            dx += other
        return dx

    def _built(self) -> list[tuple[str, Path]]:
        return [(name, path) for name, path in self.paths if path is not None]

    def __str__(self) -> str:
        ways = "; ".join(", ".join(map(str, layers)) or "as it is" for _, layers in self.ways)
        return f"{type(self).__name__} ({ways})"


class Residual(Composite):
    """``y = body(x) + shortcut(x)``; without a shortcut the input itself is added.

    The shortcut is for bodies that change the shape: a 1x1 convolution with the same stride. The ReLU behind the sum
    is a layer of its own. Source: section 8.2.4; He et al. 2015.
    """

    def __init__(self, body: Sequence[Layer], shortcut: Sequence[Layer] = ()) -> None:
        if not body:
            raise UserError("Residual: no layers given, expected at least one in the body")
        super().__init__([("body", body), ("shortcut", shortcut)])

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        body, shortcut = shapes
        if body != shortcut:
            raise UserError(
                f"the body puts out {show_shape(body)}, the shortcut {show_shape(shortcut)}: expected the same; give a "
                "shortcut such as [Conv2d(filters, 1, stride=stride)]"
            )
        return body

    def _join(self, outputs: Sequence[Array]) -> Array:
        body, shortcut = outputs
        return np.add(body, shortcut, out=self.workspace.array("y", body.shape))

    def _parts_of(self, dy: Array) -> Sequence[Array]:
        return [dy, dy]


class Branches(Composite):
    """The outputs of several ways, one after another on the last axis: the module of GoogLeNet ("Inception").

    Ways must agree in all other axes. Source: section 8.2.3; Szegedy et al. 2014.
    """

    def __init__(self, *branches: Sequence[Layer]) -> None:
        if not branches:
            raise UserError("Branches: none given, expected at least one list of layers")
        super().__init__([(f"branch_{number}", layers) for number, layers in enumerate(branches, 1)])

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        if len({shape[:-1] for shape in shapes}) > 1:
            given = ", ".join(show_shape(shape) for shape in shapes)
            raise UserError(f"the branches put out {given}: expected the same but for the channels; use padding")
        self.widths = [shape[-1] for shape in shapes]
        return (*shapes[0][:-1], sum(self.widths))

    def _join(self, outputs: Sequence[Array]) -> Array:
        y = self.workspace.array("y", (*outputs[0].shape[:-1], sum(self.widths)))
        return np.concatenate(outputs, axis=-1, out=y)

    def _parts_of(self, dy: Array) -> Sequence[Array]:
        parts, start = [], 0
        for number, width in enumerate(self.widths):
            part = self.workspace.array(f"part {number}", (*dy.shape[:-1], width))
            np.copyto(part, dy[..., start : start + width])
            parts.append(part)
            start += width
        return parts
