"""Layers with branches: a shortcut around other layers (ResNet), and several branches side by side (GoogLeNet)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.arguments import show_shape
from distdl.nn.layer_stack import LayerGroup, LayerStack, list_of_layers
from distdl.nn.layers import Array, Layer, Shape, Vectors
from distdl.rng import Key


class Composite(LayerGroup):
    """Named branches that take the same input, each a stack of layers; a subclass joins their outputs.

    A branch without layers passes the input on.
    """

    members: Sequence[tuple[str, LayerStack]]

    def __init__(self, branches: Sequence[tuple[str, Sequence[Layer]]]) -> None:
        owner = type(self).__name__
        self.members = [(name, LayerStack(list_of_layers(f"{owner}, {name}", layers))) for name, layers in branches]

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        self.input_shape = super().build(input_shape, dtype)
        return self._joined_shape([stack.build(input_shape, dtype) for _, stack in self.members])

    def bind(self, vectors: Vectors) -> None:
        super().bind(vectors)
        for name, stack in self.members:
            stack.needs_input_gradient = self.needs_input_gradient
            stack.bind(vectors.below(name))

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the output; raise `UserError` if the outputs of the branches do not fit together."""
        raise NotImplementedError

    def _join(self, outputs: Sequence[Array]) -> Array:
        """Return the output, given those of the branches."""
        raise NotImplementedError

    def _split(self, dy: Array) -> Sequence[Array]:
        """Return the gradient with respect to the output of each branch."""
        raise NotImplementedError

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the joined outputs of all branches; their layers draw from ``key.of(branch, layer)``."""
        return self._join(
            [
                stack.forward(x, training=training, key=None if key is None else key.of(name))
                for name, stack in self.members
            ]
        )

    def backward(self, dy: Array) -> Array | None:
        """Set the gradients of all layers; return that of the input, the sum over the branches."""
        branches = zip(self.members, self._split(dy), strict=True)
        parts: list[Any] = [stack.backward(part) for (_, stack), part in branches]
        if not self.needs_input_gradient:
            return None
        dx = self.workspace.array("dx", (len(dy), *self.input_shape))
        np.copyto(dx, parts[0])
        for part in parts[1:]:
            dx += part
        return dx

    def __str__(self) -> str:
        branches = "; ".join(", ".join(map(str, stack.layers)) or "identity" for _, stack in self.members)
        return f"{type(self).__name__} ({branches})"


class Residual(Composite):
    """``y = body(x) + shortcut(x)``; without a shortcut the input itself is added.

    A body that changes the shape needs a shortcut: a 1x1 convolution with the same stride. The ReLU after the sum is
    a layer of its own. Source: section 8.2.4; He et al. 2015.
    """

    def __init__(self, body: Sequence[Layer], shortcut: Sequence[Layer] = ()) -> None:
        if not body:
            raise UserError("Residual: no layers given, expected at least one in the body")
        super().__init__([("body", body), ("shortcut", shortcut)])

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        body, shortcut = shapes
        if body != shortcut:
            raise UserError(
                f"the body's output is {show_shape(body)}, the shortcut's {show_shape(shortcut)}: expected the same; "
                "give a shortcut such as [Conv2d(filters, 1, stride=stride)]"
            )
        return body

    def _join(self, outputs: Sequence[Array]) -> Array:
        body, shortcut = outputs
        return np.add(body, shortcut, out=self.workspace.array("y", body.shape))

    def _split(self, dy: Array) -> Sequence[Array]:
        return [dy, dy]


class Branches(Composite):
    """The outputs of several branches, concatenated on the last axis: the module of GoogLeNet ("Inception").

    The outputs must agree in all other axes. Source: section 8.2.3; Szegedy et al. 2014.
    """

    def __init__(self, *branches: Sequence[Layer]) -> None:
        if not branches:
            raise UserError("Branches: no branches given, expected at least one list of layers")
        super().__init__([(f"branch_{number}", layers) for number, layers in enumerate(branches, 1)])

    def _joined_shape(self, shapes: Sequence[Shape]) -> Shape:
        if len({shape[:-1] for shape in shapes}) > 1:
            given = ", ".join(show_shape(shape) for shape in shapes)
            raise UserError(
                f"the outputs of the branches are {given}: expected the same except for the channels; use padding"
            )
        self.widths = [shape[-1] for shape in shapes]
        return (*shapes[0][:-1], sum(self.widths))

    def _join(self, outputs: Sequence[Array]) -> Array:
        y = self.workspace.array("y", (*outputs[0].shape[:-1], sum(self.widths)))
        return np.concatenate(outputs, axis=-1, out=y)

    def _split(self, dy: Array) -> Sequence[Array]:
        parts = []
        for number, view in enumerate(np.split(dy, np.cumsum(self.widths[:-1]), axis=-1)):
            parts.append(self.workspace.array(f"part {number}", view.shape))
            np.copyto(parts[-1], view)
        return parts
