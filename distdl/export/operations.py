"""A trained network as operations on images (N, C, H, W), with arrays in PyTorch's layouts: what all formats share.

PyTorch and ONNX agree in these layouts. So there is one walk over the layers, and each format writes the
operations in its own words. See `distdl.nn.pytorch_layouts`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.errors import UserError
from distdl.nn.composites import Composite
from distdl.nn.layer_stack import LayerStack
from distdl.nn.layers import Flatten, Layer
from distdl.nn.network import Sequential
from distdl.nn.normalization import LocalResponseNorm
from distdl.nn.pytorch_layouts import flattened_images, laid_out, order_matters


@dataclass(frozen=True, eq=False)
class Operation:
    """A layer of the network."""

    name: str
    """Its name within its stack, such as ``conv2d_1``."""
    layer: Any
    """The layer; each form knows its kind."""
    arrays: dict[str, NDArray[np.float32]]
    """Its parameters and buffers in PyTorch's layouts, by PyTorch's names."""
    branches: tuple[tuple[str, tuple[Operation, ...]], ...] = ()
    """Of a composite: the name and the operations of each branch."""
    channels_last: bool = False
    """Of a `Flatten`: the rows have our order (H, W, C), not (C, H, W)."""


def operations_of(network: Sequential, known: Collection[type[Layer]], format_name: str) -> tuple[Operation, ...]:
    """Return the operations of a network of layers that a format knows.

    Raises `UserError` for any other layer, and for a network that computes its outputs in another way than its layers.
    """
    if type(network).forward is not Sequential.forward:
        raise UserError(
            f"the network is a {type(network).__name__} with a forward of its own, which has no form in {format_name}: "
            "give --to npz, or make it of layers in a Sequential"
        )
    return _operations(network.stack, known, format_name, "")


def _operations(
    stack: LayerStack, known: Collection[type[Layer]], format_name: str, prefix: str
) -> tuple[Operation, ...]:
    images, found = flattened_images(stack), []
    for name, layer in stack.members:
        _refuse_unknown(f"{prefix}{name}", layer, known, format_name)
        arrays = {
            one.name: np.ascontiguousarray(one.to_pytorch()) for one in laid_out(layer, images.get(name)).values()
        }
        operation = Operation(name, layer, arrays)
        if isinstance(layer, Composite):
            inside = [
                (branch, _operations(inner, known, format_name, f"{prefix}{name}.{branch}."))
                for branch, inner in layer.members
            ]
            operation = replace(operation, branches=tuple(inside))
        elif isinstance(layer, Flatten):
            keeps = order_matters(layer.input_shape) and name not in images
            operation = replace(operation, channels_last=keeps)
        found.append(operation)
    return tuple(found)


def _refuse_unknown(name: str, layer: Layer, known: Collection[type[Layer]], format_name: str) -> None:
    """Raise `UserError` for a layer without a form in a format. A subclass may compute anything, so it has none."""
    if type(layer) not in known:
        names = ", ".join(sorted(one.__name__ for one in known))
        raise UserError(
            f"{name} ({layer}) has no form in {format_name}: expected layers of distdl.nn ({names}); give --to npz, or "
            "use one of these layers"
        )
    if isinstance(layer, LocalResponseNorm) and len(layer.input_shape) != 3:
        raise UserError(
            f"{name} ({layer}) normalizes rows of numbers, which has no form in {format_name}: give --to npz, or put "
            "it before Flatten"
        )


def all_arrays(operations: tuple[Operation, ...], prefix: str = "") -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield all arrays with their whole names, such as ``residual_1.body.conv2d_1.weight``."""
    for operation in operations:
        for name, array in operation.arrays.items():
            yield f"{prefix}{operation.name}.{name}", array
        for branch, inside in operation.branches:
            yield from all_arrays(inside, f"{prefix}{operation.name}.{branch}.")
