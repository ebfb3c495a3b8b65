"""Layers: classes with `forward` and `backward`, as in *Deep Learning from Scratch* (chapters 5 and 6).

N samples, D inputs and K outputs of an affine layer; ``...`` is the shape of one sample.

Every layer follows these rules:

- It is a pure function of its input, its parameters and its key: same shapes, same bits.
- It never writes into its arguments.
- `forward` and `backward` may return a working array of the layer. The next call with the same N overwrites it, so
  copy a result to keep it. A layer never frees these arrays: evaluate in small blocks of few different N.
- `backward` belongs to the latest `forward`, whose input and output must not change in between.
- `backward` overwrites `gradients` and never adds to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distdl.arrays import aligned_empty
from distdl.errors import UserError
from distdl.nn.arguments import show_shape, whole_number
from distdl.nn.initializers import He, Initializer, Zeros
from distdl.rng import Key

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
Watch = Callable[[str, str | None], None]


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter that a layer needs: its name within the layer, its shape and its initializer.

    `decay` says whether weight decay applies to it (weights: yes; biases: no).
    """

    name: str
    shape: Shape
    initializer: Initializer
    fan_in: int
    decay: bool = True


@dataclass(frozen=True)
class BufferSpec:
    """An array that a layer keeps in addition to its parameters and that has no gradient: name, shape, initial value.

    In training the layer sums `statistics` float64 numbers over its input; each update of the buffer uses these sums.
    """

    name: str
    shape: Shape
    initial: float
    statistics: int = 0


class Product(NamedTuple):
    """A matrix product (M, K) times (K, N)."""

    M: int
    K: int
    N: int

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.M * self.K * self.N


class Products(NamedTuple):
    """The matrix products that define a layer; an algorithm may need fewer operations than these have."""

    forward: tuple[Product, ...] = ()
    backward: tuple[Product, ...] = ()


@dataclass(frozen=True)
class Vectors:
    """Named views of a network's vectors, one per parameter or buffer."""

    parameters: Mapping[str, Array]
    gradients: Mapping[str, Array]
    buffers: Mapping[str, Array]
    statistics: Mapping[str, Array]

    def below(self, name: str) -> Vectors:
        """Return the views whose names begin with ``name.``, without this prefix."""
        start = f"{name}."
        return Vectors(
            *(
                {key.removeprefix(start): view for key, view in views.items() if key.startswith(start)}
                for views in vars(self).values()
            )
        )


class Workspace:
    """The working arrays of a layer: aligned, made on first use, one per name and shape, never freed."""

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._arrays: dict[tuple[str, Shape], Array] = {}

    def array(self, name: str, shape: Shape, *, dtype: DTypeLike | None = None, fill: float = 0) -> Array:
        """Return the array of this name and shape; fill it with `fill` only when it is made."""
        array = self._arrays.get((name, shape))
        if array is None:
            array = aligned_empty(shape, self.dtype if dtype is None else dtype)
            array.fill(fill)
            self._arrays[name, shape] = array
        return array


class Layer:
    """The base of all layers: the identity, ``y = x`` (section 3.5). A subclass overrides what it does differently.

    The class with `forward` and `backward` is from section 5.4. A network calls `build` once and makes the parameters
    that `parameter_specs` then lists. The dictionaries `parameters` and `gradients` hold views of its flat vectors.

    >>> class Double(Layer):
    ...     def forward(self, x, *, training, key):
    ...         return 2 * x
    ...     def backward(self, dy):
    ...         return 2 * dy
    """

    parameters: Mapping[str, Array]
    gradients: Mapping[str, Array]
    buffers: Mapping[str, Array]
    statistics: Mapping[str, Array]
    needs_input_gradient = True
    """False if no layer in front has parameters: `backward` may then return None."""

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """Prepare for inputs of this shape, without N; return the shape of the output, without N.

        A subclass that overrides it begins with ``super().build(input_shape, dtype)``, which makes the workspace.
        Raises `UserError` if such an input does not fit; the network adds the layer's name.
        """
        self.input_shape, self.workspace = input_shape, Workspace(dtype)
        return input_shape

    def parameter_specs(self) -> list[ParameterSpec]:
        """Return the parameters that the built layer needs."""
        return []

    def buffer_specs(self) -> list[BufferSpec]:
        """Return the buffers that the built layer needs."""
        return []

    def bind(self, vectors: Vectors) -> None:
        """Take the layer's own views of the network's vectors, by the names in its specs."""
        self.parameters, self.gradients = vectors.parameters, vectors.gradients
        self.buffers, self.statistics = vectors.buffers, vectors.statistics

    def prepare(self) -> None:
        """Derive data from the parameters, such as transposed copies, that `forward` and `backward` then use.

        The network calls it before `forward` whenever the parameters may have changed.
        """

    def update_buffers(self) -> None:
        """Update `buffers` once per step, from the sums over the whole batch in `statistics`."""

    def products(self, samples: int) -> Products:
        """Return the matrix products of one forward and one backward pass of the built layer."""
        return Products()

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the output (N, ...) for the input `x` (N, ...).

        `training` is false in evaluation; `key` names the random numbers of a layer that needs some.
        """
        return x

    def backward(self, dy: Array) -> Array | None:
        """Return the gradient with respect to the input, given that to the output; overwrite `gradients`."""
        return dy

    def __str__(self) -> str:
        return type(self).__name__


class Flatten(Layer):
    """Each sample as one row: (N, H, W, C) becomes (N, H * W * C). In section 7.5 the affine layer does it."""

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        self.input_shape = super().build(input_shape, dtype)
        return (math.prod(input_shape),)

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(len(dy), *self.input_shape)


class Affine(Layer):
    """``y = x W + b`` with x (N, D), W (D, K), b (K,), y (N, K).

    Backward: ``dx = dy W'``, ``dW = x' dy``, ``db = 1 dy``, with ' for the transpose and 1 for a row of ones.
    Source: section 5.6.
    """

    def __init__(self, outputs: int, initializer: Initializer | None = None) -> None:
        self.outputs = whole_number("Affine", "outputs", outputs)
        self.initializer = initializer or He()

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        super().build(input_shape, dtype)
        if len(input_shape) != 1:
            raise UserError(f"input {show_shape(input_shape)} is not flat; put Flatten() in front of this layer")
        self.inputs = input_shape[0]
        return (self.outputs,)

    def parameter_specs(self) -> list[ParameterSpec]:
        return [
            ParameterSpec("weight", (self.inputs, self.outputs), self.initializer, fan_in=self.inputs),
            ParameterSpec("bias", (self.outputs,), Zeros(), fan_in=self.inputs, decay=False),
        ]

    def products(self, samples: int) -> Products:
        N, D, K = samples, self.inputs, self.outputs
        dx = (Product(N, K, D),) if self.needs_input_gradient else ()
        return Products(forward=(Product(N, D, K),), backward=(Product(D, N, K), *dx))

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.x = x
        y = self.workspace.array("y", (len(x), self.outputs))
        np.matmul(x, self.parameters["weight"], out=y)
        y += self.parameters["bias"]
        return y

    def backward(self, dy: Array) -> Array | None:
        np.matmul(self.x.T, dy, out=self.gradients["weight"])
        sum_rows(dy, self.workspace, out=self.gradients["bias"])
        if not self.needs_input_gradient:
            return None
        dx = self.workspace.array("dx", self.x.shape)
        return np.matmul(dy, self.parameters["weight"].T, out=dx)

    def __str__(self) -> str:
        return f"Affine {self.outputs}"


class Dropout(Layer):
    """In training, set each element to 0 with probability `ratio` and divide the others by ``1 - ratio``.

    This keeps the mean, so evaluation passes its input on ("inverted" dropout). The mask is a function of the key
    alone. Source: section 6.4.3 (which scales in evaluation instead); Srivastava et al. 2014.
    """

    def __init__(self, ratio: float = 0.5) -> None:
        if not 0 <= ratio < 1:
            raise UserError(f"Dropout: ratio {ratio} given, expected at least 0 and below 1")
        self.ratio = ratio

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return `x`, masked in training. Raises `ValueError` in training without a key."""
        self.training = training
        if not training:
            return x
        if key is None:
            raise ValueError("Dropout draws random numbers in training: pass key=Key(seed).of(...) to forward")
        self.mask = key.mask(x.size, 1 - self.ratio).reshape(x.shape)
        return self._masked(x, "y")

    def backward(self, dy: Array) -> Array:
        return self._masked(dy, "dx") if self.training else dy

    def _masked(self, x: Array, name: str) -> Array:
        y = np.multiply(x, self.mask, out=self.workspace.array(name, x.shape))
        y *= 1 / (1 - self.ratio)
        return y

    def __str__(self) -> str:
        return f"Dropout {self.ratio}"


def sum_rows(d: Array, workspace: Workspace, out: Array) -> None:
    """Write the sum of the rows of `d` (M, K) to `out` (K,): a product with ones is faster than ``np.sum``."""
    np.matmul(workspace.array("ones", (len(d),), fill=1), d, out=out)
