"""The interface of layers that run together."""

from abc import ABC, abstractmethod

from distdl.nn.layers import Array, Products, Watch
from distdl.rng import Key


class FusedLayers(ABC):
    """An implementation of one or more layers that follow each other. The rules of `Layer` hold for it."""

    @abstractmethod
    def parts(self, samples: int) -> list[tuple[str, str, Products]]:
        """Return the name, the description and the matrix products of each part that `watch` hears of."""

    def prepare(self) -> None:  # noqa: B027
        """Derive data from the parameters; see `Layer.prepare`."""

    @abstractmethod
    def forward(self, x: Array, *, training: bool, key: Key | None, watch: Watch | None = None) -> Array:
        """Return the output of the last layer. `key` is that of the stack; a layer draws from ``key.of(name)``."""

    @abstractmethod
    def backward(self, dy: Array, *, watch: Watch | None = None) -> Array | None:
        """Set the gradients of all layers; return that of the input, or None if it is not needed."""
