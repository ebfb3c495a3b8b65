"""Layers: classes with `forward` and `backward`, as in *Deep Learning from Scratch* (chapters 5 and 6).

N samples, D inputs and K outputs of an affine layer; ``...`` is any per-sample shape.

What every layer keeps to:

- It is a pure function of its input, its parameters and its key: same shapes, same bits.
- It never writes into its arguments.
- What `forward` and `backward` return may be a buffer of the layer, made once per N and overwritten by its
  next call with the same N. Who wants to keep it copies it. Buffers of each N are kept for good, so evaluate
  in blocks of few different N, and no larger than need be.
- `backward` belongs to the latest `forward`, whose input and output must be unchanged until then. It
  overwrites `gradients`, never adds to them.
"""
# ruff: noqa: ARG002  every layer's forward takes the same arguments, whether it needs them or not

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distdl.arrays import aligned_empty
from distdl.errors import UserError
from distdl.nn.initializers import He, Initializer, Zeros
from distdl.rng import Key

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter that a layer needs: its name within the layer, its shape, and how it begins.

    `decay` says whether weight decay applies to it (weights: yes; biases: no).
    """

    name: str
    shape: Shape
    initializer: Initializer
    fan_in: int
    decay: bool = True


@dataclass(frozen=True)
class BufferSpec:
    """Numbers that a layer keeps besides its parameters, and that no gradient changes: its name, shape and start.

    `statistics` is how many float64 numbers the layer sums over its input in training for each update of the buffer.
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
    """The matrix products that a layer stands for; an algorithm may do with fewer operations than these have."""

    forward: tuple[Product, ...] = ()
    backward: tuple[Product, ...] = ()


@dataclass(frozen=True)
class Vectors:
    """Named views of a network's vectors, one a parameter or buffer."""

    parameters: Mapping[str, Array]
    gradients: Mapping[str, Array]
    buffers: Mapping[str, Array]
    statistics: Mapping[str, Array]

    def below(self, name: str) -> Vectors:
        """Return those whose names begin with ``name.``, without it."""
        start = f"{name}."
        return Vectors(
            *(
                {key.removeprefix(start): view for key, view in views.items() if key.startswith(start)}
                for views in (self.parameters, self.gradients, self.buffers, self.statistics)
            )
        )


class Workspace:
    """The buffers of a layer: aligned arrays made on first use and kept, one per name and shape."""

    def __init__(self, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self._arrays: dict[tuple[str, Shape], Array] = {}
        self._kept: dict[str, Any] = {}

    def array(self, name: str, shape: Shape, *, dtype: DTypeLike | None = None, fill: float = 0) -> Array:
        """Return the array of this name and shape, filled with `fill` when it is made and only then."""
        array = self._arrays.get((name, shape))
        if array is None:
            array = aligned_empty(shape, self.dtype if dtype is None else dtype)
            array.fill(fill)
            self._arrays[name, shape] = array
        return array

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """Return what `make` returned when this name was first asked for: views that are dear to make again."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found


class Layer:
    """The base of all layers. Here it passes its input on; a subclass overrides what it does differently.

    That a layer is a class with `forward` and `backward` is from section 5.4.
    A network calls `build` once, makes the parameters that `parameter_specs` then lists, and puts them with
    their gradients, as views of its two flat vectors, into the dictionaries `parameters` and `gradients`.

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
    """False where nothing in front has parameters: `backward` may then return None."""
    form: Literal["fast", "plain"] = "fast"
    """Set before `build`: for layers that are made of others, how those are run."""

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """Prepare for inputs of this shape, without N; return the shape of the output, without N.

        A subclass that overrides it begins with ``super().build(input_shape, dtype)``, which makes the workspace.
        Raises `UserError` if such an input does not fit; the network puts the layer's name in front.
        """
        self.workspace = Workspace(dtype)
        return input_shape

    def parameter_specs(self) -> list[ParameterSpec]:
        """Return the parameters that the layer needs, once it is built."""
        return []

    def buffer_specs(self) -> list[BufferSpec]:
        """Return the buffers that the layer needs, once it is built."""
        return []

    def bind(self, vectors: Vectors) -> None:
        """Take the layer's own views of the network's vectors, by the names that its specs gave."""
        self.parameters, self.gradients = vectors.parameters, vectors.gradients
        self.buffers, self.statistics = vectors.buffers, vectors.statistics

    def prepare(self) -> None:
        """Derive data from the parameters, such as transposed copies, that `forward` and `backward` then use.

        The network calls it before `forward` whenever the parameters may have changed.
        """

    def update_buffers(self) -> None:
        """Update `buffers` once a step; `statistics` then hold the sums over the whole batch."""

    def products(self, samples: int) -> Products:
        """Return the matrix products of one forward and one backward of this many samples, once it is built."""
        return Products()

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the output (N, ...) for the input `x` (N, ...).

        `training` is false in evaluation; `key` names the random numbers of a layer that needs some.
        """
        return x

    def backward(self, dy: Array) -> Array | None:
        """Return the gradient by the input, given that by the output; overwrite `gradients`."""
        return dy

    def __str__(self) -> str:
        return type(self).__name__


class Flatten(Layer):
    """Each sample as one row: (N, H, W, C) becomes (N, H * W * C). In section 7.5 the affine layer does it itself."""

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """Any input fits."""
        self.input_shape = super().build(input_shape, dtype)
        return (math.prod(input_shape),)

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return `x` with all axes but the first made one."""
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        """Return `dy` in the shape of the input."""
        return dy.reshape(len(dy), *self.input_shape)


class Affine(Layer):
    """``y = x W + b`` with x (N, D), W (D, K), b (K,), y (N, K).

    Backward: ``dx = dy W'``, ``dW = x' dy``, ``db = 1 dy``, where ' is the transpose and 1 a row of ones.
    Source: section 5.6.
    """

    def __init__(self, outputs: int, initializer: Initializer | None = None) -> None:
        self.outputs = whole_number("Affine", "outputs", outputs)
        self.initializer = initializer or He()

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """The input must be flat: (D,)."""
        super().build(input_shape, dtype)
        if len(input_shape) != 1:
            raise UserError(f"input {show_shape(input_shape)} is not flat; put Flatten() in front of this layer")
        self.inputs = input_shape[0]
        return (self.outputs,)

    def parameter_specs(self) -> list[ParameterSpec]:
        """Return weight (D, K) and bias (K,)."""
        return [
            ParameterSpec("weight", (self.inputs, self.outputs), self.initializer, fan_in=self.inputs),
            ParameterSpec("bias", (self.outputs,), Zeros(), fan_in=self.inputs, decay=False),
        ]

    def products(self, samples: int) -> Products:
        """Return ``x W``; ``x' dy`` and ``dy W'``."""
        N, D, K = samples, self.inputs, self.outputs
        dx = (Product(N, K, D),) if self.needs_input_gradient else ()
        return Products(forward=(Product(N, D, K),), backward=(Product(D, N, K), *dx))

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return ``x W + b``, (N, K)."""
        self.x = x
        y = self.workspace.array("y", (len(x), self.outputs))
        np.matmul(x, self.parameters["weight"], out=y)
        y += self.parameters["bias"]
        return y

    def backward(self, dy: Array) -> Array | None:
        """Set the gradients of weight and bias; return that of the input, (N, D)."""
        np.matmul(self.x.T, dy, out=self.gradients["weight"])
        ones = self.workspace.array("ones", (len(dy),), fill=1)
        np.matmul(ones, dy, out=self.gradients["bias"])
        if not self.needs_input_gradient:
            return None
        dx = self.workspace.array("dx", self.x.shape)
        return np.matmul(dy, self.parameters["weight"].T, out=dx)

    def __str__(self) -> str:
        return f"Affine {self.outputs}"


class Dropout(Layer):
    """In training, set each element to 0 with probability `ratio` and divide the others by ``1 - ratio``.

    The mean stays what it was, so evaluation passes its input on ("inverted" dropout). The mask is a
    function of the key alone. Source: section 6.4.3 (which scales in evaluation instead); Srivastava et al.
    2014.
    """

    def __init__(self, ratio: float = 0.5) -> None:
        if not 0 <= ratio < 1:
            raise UserError(f"Dropout: ratio {ratio} given, expected at least 0 and below 1")
        self.ratio = ratio

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return `x`, thinned out in training. Raises `ValueError` in training without a key."""
        self.training = training
        if not training:
            return x
        if key is None:
            raise ValueError("Dropout draws random numbers in training: pass key=Key(seed).of(...) to forward")
        self.mask = key.mask(x.size, 1 - self.ratio).reshape(x.shape)
        return self._thin(x, "y")

    def backward(self, dy: Array) -> Array:
        """Return `dy` where an element was kept, scaled as in forward, else 0."""
        return self._thin(dy, "dx") if self.training else dy

    def _thin(self, x: Array, name: str) -> Array:
        y = np.multiply(x, self.mask, out=self.workspace.array(name, x.shape))
        y *= 1 / (1 - self.ratio)
        return y

    def __str__(self) -> str:
        return f"Dropout {self.ratio}"


def as_whole(given: Any, least: int) -> int | None:
    """Return a whole number of any integer type as an `int`; None if it is no such number, or below `least`."""
    if isinstance(given, bool):
        return None
    try:
        number = operator.index(given)
    except TypeError:
        return None
    return number if number >= least else None


def whole_number(layer: str, name: str, given: Any, least: int = 1) -> int:
    """Return the setting `name` of a layer as an `int`; raise `UserError` if it is none, or below `least`."""
    number = as_whole(given, least)
    if number is None:
        raise UserError(f"{layer}: {name} {given!r} given, expected a whole number of at least {least}")
    return number


def list_of_layers(owner: str, given: Any) -> list[Layer]:
    """Return the layers that `owner` is made of; raise `UserError` if something else is among them."""
    if isinstance(given, Layer | str) or not isinstance(given, Iterable):
        raise UserError(f"{owner}: {given} given, expected a list of layers")
    layers = list(given)
    for layer in layers:
        if isinstance(layer, type):
            raise UserError(f"{owner}: the class {layer.__name__} given, expected a layer: {layer.__name__}(...)")
        if not isinstance(layer, Layer):
            raise UserError(f"{owner}: {layer!r} given, expected a layer")
    return layers


def show_shape(shape: Shape) -> str:
    """Return a shape as people write it.

    >>> show_shape((28, 28, 1))
    '28x28x1'
    """
    return "x".join(str(n) for n in shape)
