"""The parameters and buffers of layers in the layouts of PyTorch, which ONNX shares: names, and the order of the axes.

FH, FW kernel, C channels, FN filters, D inputs, K outputs; an image is (H, W, C) here and (C, H, W) there.

| layer | here | PyTorch |
|---|---|---|
| `Conv2d` | weight (FH, FW, C, FN), bias | weight (FN, C, FH, FW), bias |
| `ConvTranspose2d` | weight (FH, FW, FN, C), bias | weight (C, FN, FH, FW), bias |
| `Affine` | weight (D, K), bias | weight (K, D), bias |
| `BatchNorm` | gamma, beta, mean, variance | weight, bias, running_mean, running_var |

`Flatten` makes a row of an image, here in the order (H, W, C), there in the order (C, H, W). So the rows of the weight
of an `Affine` after a `Flatten` have another order there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from distdl.nn.activations import LeakyReLU, ReLU, Sigmoid, Tanh
from distdl.nn.composites import Composite
from distdl.nn.convolution import Conv2d, ConvTranspose2d
from distdl.nn.layer_stack import LayerStack
from distdl.nn.layers import Affine, Array, Dropout, Flatten, Layer, Shape
from distdl.nn.normalization import BatchNorm

#: Of each kind of layer, by our name: PyTorch's name, and its axes as numbers of ours.
LAYOUTS: dict[type[Layer], dict[str, tuple[str, tuple[int, ...]]]] = {
    Conv2d: {"weight": ("weight", (3, 2, 0, 1)), "bias": ("bias", (0,))},
    ConvTranspose2d: {"weight": ("weight", (3, 2, 0, 1)), "bias": ("bias", (0,))},
    Affine: {"weight": ("weight", (1, 0)), "bias": ("bias", (0,))},
    BatchNorm: {
        "gamma": ("weight", (0,)),
        "beta": ("bias", (0,)),
        "mean": ("running_mean", (0,)),
        "variance": ("running_var", (0,)),
    },
}
#: Layers that treat each number of a row alike, so that they keep any order.
ELEMENTWISE = (Layer, ReLU, LeakyReLU, Sigmoid, Tanh, Dropout)


@dataclass(frozen=True, eq=False)
class LaidOut:
    """A parameter or buffer of a layer, and its layout in PyTorch."""

    array: Array
    """The view of the network, in our layout."""
    name: str
    """PyTorch's name within the layer, such as ``running_mean``."""
    axes: tuple[int, ...]
    image: Shape | None = None
    """The image (H, W, C) whose `Flatten` made the rows of this weight."""

    @property
    def shape(self) -> Shape:
        """Its shape in PyTorch."""
        return tuple(self.array.shape[axis] for axis in self.axes)

    def to_pytorch(self) -> Array:
        """Return the array in the layout of PyTorch, as a view or a copy."""
        if self.image is None:
            return self.array.transpose(self.axes)
        D, K = self.array.shape
        return self.array.reshape(*self.image, K).transpose(3, 2, 0, 1).reshape(K, D)

    def from_pytorch(self, theirs: Array) -> Array:
        """Return an array of PyTorch in our layout, as a view or a copy; one of another shape only has our axes."""
        if self.image is None or theirs.shape != self.shape:
            return theirs.transpose([self.axes.index(axis) for axis in range(theirs.ndim)])
        (H, W, C), (K, D) = self.image, theirs.shape
        return theirs.reshape(K, C, H, W).transpose(2, 3, 1, 0).reshape(D, K)


def laid_out(layer: Layer, image: Shape | None = None) -> dict[str, LaidOut]:
    """Return the parameters and buffers of a layer by our name; none of a kind that is not in `LAYOUTS`.

    `image`: see `flattened_images`.
    """
    arrays = {**layer.parameters, **layer.buffers}
    return {
        name: LaidOut(arrays[name], theirs, axes, image if name == "weight" else None)
        for name, (theirs, axes) in LAYOUTS.get(type(layer), {}).items()
        if name in arrays
    }


def all_laid_out(stack: LayerStack) -> Iterator[tuple[str, LaidOut]]:
    """Yield the parameters and buffers of all layers that are in `LAYOUTS`, with their whole names."""
    images = flattened_images(stack)
    for name, layer in stack.members:
        if isinstance(layer, Composite):
            for branch, inner in layer.members:
                yield from ((f"{name}.{branch}.{rest}", one) for rest, one in all_laid_out(inner))
        else:
            yield from ((f"{name}.{own}", one) for own, one in laid_out(layer, images.get(name)).items())


def flattened_images(stack: LayerStack) -> dict[str, Shape]:
    """Return the image (H, W, C) of each `Flatten` by its name, and by the name of the `Affine` that takes its rows.

    An image is there only if its order matters, and only if an `Affine` of the same stack takes the rows, with nothing
    in between that depends on their order. Other rows must keep our order.
    """
    found: dict[str, Shape] = {}
    flatten: tuple[str, Shape] | None = None  # the latest one, as long as its rows may have another order
    for name, layer in stack.members:
        if type(layer) is Flatten and order_matters(layer.input_shape):
            flatten = name, layer.input_shape
        elif type(layer) is Affine and flatten is not None:
            found |= dict.fromkeys((flatten[0], name), flatten[1])
            flatten = None
        elif type(layer) not in {*ELEMENTWISE, Flatten}:
            flatten = None
    return found


def order_matters(shape: Shape) -> bool:
    """Return whether an image (H, W, C) makes another row if its channels come first.

    >>> order_matters((2, 2, 3)), order_matters((2, 2, 1)), order_matters((1, 1, 3)), order_matters((12,))
    (True, False, False, False)
    """
    return len(shape) == 3 and shape[2] > 1 and math.prod(shape[:2]) > 1
