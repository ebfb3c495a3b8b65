"""The interface of layers that run together."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from distdl.nn.layers import Array, Products, Shape, Watch
from distdl.rng import Key


@dataclass(frozen=True)
class Elements:
    """Numbers of elements of working arrays: for each sample, those of a forward pass and those of a backward pass.

    `of_weights` do not depend on the samples. `of_tiles` has the elements, for each sample of a tile, of the arrays
    that the tiles of a chain share, and the largest tile. `kept` are those of a sample that every number of samples
    shares. `gradient` has those of the input gradients of a sample, which all layers of a network share, as they share
    their `scratch`.
    """

    forward: float = 0
    backward: float = 0
    of_weights: float = 0
    of_tiles: tuple[tuple[float, int], ...] = ()
    kept: float = 0
    gradient: float = 0
    scratch: float = 0

    def __add__(self, other: "Elements") -> "Elements":
        return Elements(
            self.forward + other.forward,
            self.backward + other.backward,
            self.of_weights + other.of_weights,
            self.of_tiles + other.of_tiles,
            self.kept + other.kept,
            max(self.gradient, other.gradient),
            max(self.scratch, other.scratch),
        )


class FusedLayers(ABC):
    """An implementation of one or more layers that follow each other. The rules of `Layer` hold for it."""

    output_shape: Shape

    @abstractmethod
    def elements(self) -> Elements:
        """Return the numbers of elements of the working arrays."""

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
