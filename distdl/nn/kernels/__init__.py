"""Kernels: the implementations of the computations of a network.

All kernels compute the same networks:

- `PLAIN` runs every layer as its class is written. It is the oracle of the others.
- `NUMPY` is the definition: chains of convolutions in NumPy (`chains`), all other layers as written.
- `compiled.COMPILED`: numba compiles them. Their bits do not depend on the CPU.

`choice` tells whether a process can use them.

A `LayerStack` asks its kernels at each layer for an implementation of this layer and some that follow (`FusedLayers`).
A layer without such an implementation runs as written. No other code knows which kernels are in use.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

from distdl.nn.kernels.chains import Chain, chain_at
from distdl.nn.kernels.fused_layers import FusedLayers
from distdl.nn.layers import Array, Layer
from distdl.nn.losses import LossFunction

__all__ = ["NUMPY", "PLAIN", "Chain", "FusedLayers", "Kernels"]


class Kernels(ABC):
    """The implementation of the computations of networks; `name` is that of the setting."""

    name: str
    portable = False
    """Whether the formulas alone determine the bits, not the CPU."""
    norm: Callable[[Array], float] | None = None
    """Computes the Euclidean norm of a vector, if the kernels have an implementation of their own."""

    @abstractmethod
    def fuse(self, layers: Sequence[Layer], names: Sequence[str]) -> tuple[FusedLayers | None, int]:
        """Return an implementation of the first of these layers and its number of layers; or None and 1.

        The layers have their parameters. Classes are compared exactly: a derived class may compute something else.
        """

    def optimizer_rule(self, name: str) -> Callable[[Any], Callable[..., None]] | None:
        """Return an implementation of the updates of an optimizer, with the same bits; None if there is none.

        It takes the optimizer and returns its update: see ``distdl.optim.Optimizer``.
        """
        return None

    def loss(self, loss: LossFunction) -> LossFunction:
        """Return the implementation of this loss: it itself, as written, unless the kernels have another one."""
        return loss

    def row_loader(self, images: Array, mean: Array, deviation: Array) -> Callable[[Array, Array], Array] | None:
        """Return a function of rows (N,) and an array: it writes their images there, normalized; or None.

        `mean` and `deviation` have an element for each channel.
        """
        return None

    def for_network(self) -> Self:
        """Return the kernels for one network: itself, unless they keep arrays."""
        return self

    def begin_backward(self) -> None:  # noqa: B027
        """Declare that no gradient of an earlier pass is in use any more."""

    def release(self, gradient: Array, *in_use: Array | None) -> None:  # noqa: B027
        """Declare that a gradient is no longer in use, unless it shares memory with one that is."""


class _Plain(Kernels):
    name = "plain"

    def fuse(self, layers: Sequence[Layer], names: Sequence[str]) -> tuple[FusedLayers | None, int]:
        return None, 1


class _NumPy(Kernels):
    name = "numpy"

    def fuse(self, layers: Sequence[Layer], names: Sequence[str]) -> tuple[FusedLayers | None, int]:
        return chain_at(layers, names)


PLAIN, NUMPY = _Plain(), _NumPy()
