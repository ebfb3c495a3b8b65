"""Initial values of parameters; the call is ``initializer(key, shape, fan_in)``.

`fan_in` is the number of products that one output of the layer sums (inputs of an affine layer, FH * FW * C of a
convolution). Results are float64; the network rounds them to its own dtype. A key always gives the same numbers, so
every rank draws the same network and no rank sends it.

Source: *Deep Learning from Scratch*, section 6.2; Glorot and Bengio 2010 (Xavier); He et al. 2015 (He).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distdl.rng import Key

Initializer: TypeAlias = Callable[[Key, tuple[int, ...], int], NDArray[Any]]


@dataclass(frozen=True)
class Zeros:
    """All zeros, for biases; weights that start equal stay equal. Source: section 6.2.1."""

    def __call__(self, key: Key, shape: tuple[int, ...], fan_in: int) -> NDArray[Any]:
        return np.zeros(shape)


@dataclass(frozen=True)
class Constant:
    """The same number everywhere, such as 1 for gamma in batch normalization (section 6.3)."""

    value: float

    def __call__(self, key: Key, shape: tuple[int, ...], fan_in: int) -> NDArray[Any]:
        return np.full(shape, self.value)


@dataclass(frozen=True)
class Normal:
    """Normal numbers with mean 0 and standard deviation `std`, for any fan-in. Source: section 6.2.2.

    >>> Normal(std=0.01)(Key(0), (2, 3), 2).shape
    (2, 3)
    """

    std: float = 0.01

    def __call__(self, key: Key, shape: tuple[int, ...], fan_in: int) -> NDArray[Any]:
        return self.std * key.normal(math.prod(shape)).reshape(shape)


@dataclass(frozen=True)
class Xavier:
    """Normal numbers with standard deviation ``1 / sqrt(fan_in)``, which keeps the scale through tanh.

    Sources: section 6.2.2; Glorot and Bengio 2010, which divides by the mean of fan-in and fan-out.
    """

    def __call__(self, key: Key, shape: tuple[int, ...], fan_in: int) -> NDArray[Any]:
        return Normal(math.sqrt(1.0 / fan_in))(key, shape, fan_in)


@dataclass(frozen=True)
class He:
    """Normal numbers with standard deviation ``sqrt(2 / fan_in)``, which keeps the scale through ReLU.

    Sources: section 6.2.3; He et al. 2015 (*Delving deep into rectifiers*).
    """

    def __call__(self, key: Key, shape: tuple[int, ...], fan_in: int) -> NDArray[Any]:
        return Normal(math.sqrt(2.0 / fan_in))(key, shape, fan_in)
