"""The base of the compiled implementations of layers."""

from abc import abstractmethod
from collections.abc import Sequence

from distdl.nn.kernels.compiled.arrays import GradientArrays, KeptArrays
from distdl.nn.kernels.fused_layers import FusedLayers
from distdl.nn.layers import Array, Layer, Products, Shape, Watch
from distdl.rng import Key


class CompiledLayers(FusedLayers):
    """One or more layers that follow each other, computed together; they report under the name of the first one.

    `kept` holds the arrays of the layers; gradients with respect to their input come from ``gradients.take``.
    """

    gradients: GradientArrays

    def __init__(self, layers: Sequence[Layer], name: str, output_shape: Shape) -> None:
        self.layers, self.name, self.output_shape = list(layers), name, output_shape
        self.kept = KeptArrays()

    def __str__(self) -> str:
        return " + ".join(map(str, self.layers))

    def parts(self, samples: int) -> list[tuple[str, str, Products]]:
        return [(self.name, str(self), self.layers[0].products(samples))]

    def forward(self, x: Array, *, training: bool, key: Key | None, watch: Watch | None = None) -> Array:
        y = self._forward(x, training=training, key=None if key is None else key.of(self.name))
        if watch:
            watch("forward", self.name)
        return y

    def backward(self, dy: Array, *, watch: Watch | None = None) -> Array | None:
        dx = self._backward(dy)
        if watch:
            watch("backward", self.name)
        return dx

    @abstractmethod
    def _forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the output for a contiguous `x`; `key` is that of the first layer."""

    @abstractmethod
    def _backward(self, dy: Array) -> Array | None:
        """Set all gradients for a contiguous `dy`; return that of the input, or None if it is not needed."""
