"""A network: layers that run one after another, with all parameters in one flat vector.

The parameters and gradients of layers are named views of two flat vectors. So reduction, update, checkpoint and hash
handle one array. Each parameter starts on a 64-byte boundary; the padding in between stays zero. A third vector,
`buffers`, holds the other arrays of layers (the running moments of batch normalization). A fourth, `statistics`, holds
the sums over the input that update the buffers; ranks add them up as they add gradients.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from distdl.arrays import ALIGNMENT_BYTES, aligned_zeros
from distdl.errors import UserError
from distdl.nn.arguments import as_whole
from distdl.nn.kernels import NUMPY, Kernels
from distdl.nn.layer_stack import LayerStack, list_of_layers
from distdl.nn.layers import Array, BufferSpec, Layer, ParameterSpec, Products, Shape, Vectors, Watch
from distdl.rng import Key


class _NamedSlices:
    """The slices of a flat vector that hold named arrays, each on a 64-byte boundary."""

    def __init__(self, specs: Sequence[ParameterSpec | BufferSpec], lengths: Sequence[int], dtype: DTypeLike) -> None:
        self.shapes = {spec.name: spec.shape for spec in specs}
        self.slices: dict[str, slice] = {}
        line = ALIGNMENT_BYTES // np.dtype(dtype).itemsize
        self.size = 0
        for spec, length in zip(specs, lengths, strict=True):
            self.slices[spec.name] = slice(self.size, self.size + length)
            self.size += -(-length // line) * line

    def views(self, flat: Array) -> dict[str, Array]:
        """Return the named arrays inside a vector with this layout, each in its own shape."""
        return {name: flat[where].reshape(self.shapes[name]) for name, where in self.slices.items()}


class Sequential:
    """Layers that run one after another: the networks of the book keep them in an ordered dictionary (section 5.7).

    `input_shape` and `output_shape` are those of one sample, without N. A layer's name is its class and its number
    among the layers of this class: ``conv2d_1``, ``affine_2``. A parameter is named after its layer:
    ``conv2d_1.weight``.

    `kernels` compute the layers; see `distdl.nn.kernels`.

    `parameters` and `gradients` are the flat vectors. `slices` tells the slice of each parameter by name, and
    `decay_slices` lists those to which weight decay applies. `parameter_count` excludes the padding.

    Raises `UserError`, naming the layer, if a layer's input does not fit.

    >>> from distdl.nn import Affine, ReLU
    >>> network = Sequential([Affine(3), ReLU(), Affine(2)], (4,))
    >>> [(name, view.shape) for name, view in network.named_parameters()][:2]
    [('affine_1.weight', (4, 3)), ('affine_1.bias', (3,))]
    >>> network.parameter_count, network.output_shape
    (23, (2,))

    `backward` skips the gradient with respect to the network's input, unless `bind` asks for it:

    >>> network.bind(needs_input_gradient=True)
    >>> y = network.forward(np.ones((5, 4), np.float32))
    >>> network.backward(np.ones_like(y)).shape
    (5, 4)
    """

    def __init__(
        self, layers: Sequence[Layer], input_shape: Shape, *, dtype: DTypeLike = np.float32, kernels: Kernels = NUMPY
    ) -> None:
        self.layers = list_of_layers("Sequential", layers)
        self.dtype = np.dtype(dtype)
        self.stack = LayerStack(self.layers)
        self.layer_names = self.stack.names
        every = list(self.every_layer())
        if not every or len(set(map(id, every))) < len(every):
            raise UserError(
                "a network needs at least one layer, and each layer only once; create a new layer for each place"
            )
        self.input_shape = _checked_shape(input_shape)
        #: If set, it is called with "forward" or "backward" and the name of each part that has just finished, and with
        #: None as the name when a pass begins. A fused block is one part and runs once per tile.
        self.watch: Watch | None = None
        self._promises = 0
        self.stack.use(kernels.for_network())
        self.output_shape = self.stack.build(self.input_shape, self.dtype)

        self._parameter_specs = self.stack.parameter_specs()
        self._layout = _NamedSlices(
            self._parameter_specs, [math.prod(spec.shape) for spec in self._parameter_specs], self.dtype
        )
        self.slices = self._layout.slices
        self.parameters = aligned_zeros(self._layout.size, self.dtype)
        self.gradients = aligned_zeros(self._layout.size, self.dtype)
        self.parameter_count = sum(where.stop - where.start for where in self.slices.values())
        self.decay_slices = [self.slices[spec.name] for spec in self._parameter_specs if spec.decay]

        buffer_specs = self.stack.buffer_specs()
        self._buffer_layout = _NamedSlices(buffer_specs, [math.prod(spec.shape) for spec in buffer_specs], self.dtype)
        statistics_layout = _NamedSlices(buffer_specs, [spec.statistics for spec in buffer_specs], np.float64)
        self.buffers = aligned_zeros(self._buffer_layout.size, self.dtype)
        self.statistics = aligned_zeros(statistics_layout.size, np.float64)
        self._vectors = Vectors(
            self._layout.views(self.parameters),
            self._layout.views(self.gradients),
            self._buffer_layout.views(self.buffers),
            {name: self.statistics[where] for name, where in statistics_layout.slices.items()},
        )
        for spec in buffer_specs:
            self._vectors.buffers[spec.name][...] = spec.initial
        self.bind()

    def bind(self, *, needs_input_gradient: bool = False) -> None:
        """Give all layers their views; say whether `backward` returns the gradient with respect to the input.

        With `needs_input_gradient` the first convolution may run by another algorithm, whose bits differ.
        """
        self.stack.needs_input_gradient = needs_input_gradient
        self.stack.bind(self._vectors)
        self._prepared = False

    def use(self, kernels: Kernels) -> None:
        """Compute all layers with these kernels from now on."""
        self.stack.use(kernels.for_network())
        self.bind(needs_input_gradient=self.stack.needs_input_gradient)

    def views(self, flat: Array) -> list[tuple[str, Array]]:
        """Return each parameter's name with its view of `flat`, a vector with the layout of `parameters`."""
        if flat.shape != self.parameters.shape:
            raise ValueError(f"a vector of shape {flat.shape} given, expected {self.parameters.shape}")
        return list(self._layout.views(flat).items())

    def named_parameters(self) -> list[tuple[str, Array]]:
        """Return each parameter's name and view, in the order of the layers."""
        return self.views(self.parameters)

    def named_gradients(self) -> list[tuple[str, Array]]:
        """Return each parameter's name and the view of its gradient, in the order of the layers."""
        return self.views(self.gradients)

    def named_buffers(self) -> list[tuple[str, Array]]:
        """Return each buffer's name and view, in the order of the layers."""
        return list(self._buffer_layout.views(self.buffers).items())

    def update_buffers(self, statistics: Array, *, share: float = 1.0) -> None:
        """Update `buffers` once per step, given the sum of `statistics` over all micro-batches of the batch.

        With a `share` below 1 they move only by this share of the way.
        """
        if self.statistics.size:
            np.copyto(self.statistics, statistics)
            before = self.buffers.copy() if share < 1 else None
            self.stack.update_buffers()
            if before is not None:
                self.buffers[...] = before + share * (self.buffers - before)

    def parts(self, samples: int) -> list[tuple[str, str, Products]]:
        """Return the name, the description and the matrix products of each part that `watch` hears of."""
        found = []
        for name, layer, _, fused in self.stack.segments:
            found += [(name, str(layer), layer.products(samples))] if fused is None else fused.parts(samples)
        return found

    def initialize(self, key: Key) -> None:
        """Set each parameter by its initializer, from the key ``key.of(name)``."""
        for (name, view), spec in zip(self.named_parameters(), self._parameter_specs, strict=True):
            view[...] = spec.initializer(key.of(name), spec.shape, spec.fan_in)

    @contextmanager
    def constant_parameters(self) -> Iterator[None]:
        """Promise that the parameters do not change inside the ``with`` block.

        The first `forward` inside prepares the data that layers derive from the parameters, such as transformed
        weights; the others reuse it. Outside, every `forward` prepares it. Uses may be nested; each prepares once.
        """
        self._promises += 1
        self._prepared = False
        try:
            yield
        finally:
            self._promises -= 1

    def forward(self, x: Array, *, training: bool = False, key: Key | None = None) -> Array:
        """Return the outputs (N, ...) for `x` (N, ...), which has the network's dtype.

        The layer called ``dropout_1`` draws from ``key.of("dropout_1")``. The next `forward` with the same N may
        overwrite the result. `x` must not change until `backward`.
        """
        if x.shape[1:] != self.input_shape or x.dtype != self.dtype:
            expected = ", ".join(str(n) for n in ("N", *self.input_shape))
            raise UserError(f"input is {x.dtype} {x.shape}; expected {self.dtype} ({expected})")
        if self.watch:
            self.watch("forward", None)
        if not (self._promises and self._prepared):
            self.stack.prepare()
            self._prepared = True
        return self.stack.forward(x, training=training, key=key, watch=self.watch)

    def every_layer(self) -> Iterator[Layer]:
        """Yield all layers, each one before the layers that it is made of."""
        return self.stack.every_layer()

    def backward(self, d_outputs: Array) -> Array | None:
        """Overwrite `gradients`, given the gradient of the loss with respect to the outputs of the latest `forward`.

        Return the gradient with respect to its input, (N, ...), after ``bind(needs_input_gradient=True)``, otherwise
        None. The next `backward` with the same N may overwrite it. This gradient connects two networks: pass it to the
        `backward` of the network that computed the input.
        """
        if self.watch:
            self.watch("backward", None)
        self.stack.kernels.begin_backward()
        return self.stack.backward(d_outputs, watch=self.watch)


def _checked_shape(given: Any) -> Shape:
    try:
        sizes = [as_whole(n, 1) for n in given]
    except TypeError:
        sizes = [None]
    if None in sizes:
        raise UserError(f"input shape {given} given, expected sizes of at least 1, such as (28, 28, 1)")
    return tuple(size for size in sizes if size is not None)
