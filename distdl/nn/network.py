"""A network: layers in a row, with all parameters in one flat vector.

A layer's parameters and gradients are named views of two flat vectors, so whoever reduces, updates, saves
or hashes a network handles one array. Each parameter starts on a 64-byte boundary; the padding in between
stays zero. What layers keep besides (the running moments of batch normalization) is a third vector, `buffers`, and
the sums over the input that it is updated from are a fourth, `statistics`, which ranks add up as they do gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from distdl.arrays import ALIGNMENT_BYTES, aligned_zeros
from distdl.errors import UserError
from distdl.nn.composites import Composite
from distdl.nn.layers import Array, BufferSpec, Layer, ParameterSpec, Products, Shape, Vectors, as_whole, list_of_layers
from distdl.nn.path import Form, Path, Watch
from distdl.rng import Key

Spec = TypeVar("Spec", ParameterSpec, BufferSpec)


class _Places(Generic[Spec]):
    """Where named arrays lie in a flat vector, each on a 64-byte boundary; `lengths` has their sizes."""

    def __init__(self, specs: Sequence[Spec], lengths: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.specs: list[Spec] = list(specs)
        self.where: list[slice] = []
        stop = 0
        for length in lengths:
            start = _aligned(stop, dtype)
            stop = start + length
            self.where.append(slice(start, stop))
        self.size = _aligned(stop, dtype)

    def views(self, flat: Array, *, shaped: bool = True) -> dict[str, Array]:
        """Return the named views of a vector laid out so."""
        return {
            spec.name: flat[where].reshape(spec.shape) if shaped else flat[where]
            for spec, where in zip(self.specs, self.where, strict=True)
        }


class Sequential:
    """Layers in a row: what the networks of the book keep in an ordered dictionary (section 5.7).

    `input_shape` and `output_shape` are those of one sample, without N. A layer is named after its class
    and its number among its kind: ``conv2d_1``, ``affine_2``; a parameter after its layer:
    ``conv2d_1.weight``.

    In the fast form, which is the default, convolutions with the ReLU and 2x2 max-pooling behind them are run as chains
    of fused blocks (see `distdl.nn.fused`); in the plain form every layer runs as it is written, which is the oracle.

    `parameters` and `gradients` are the flat vectors, `decay_slices` the parts of them where weight decay
    applies, `slices` where each parameter lies, by name, `parameter_count` the number of parameters without padding.

    Raises `UserError`, naming the layer, if a layer's input does not fit.

    >>> from distdl.nn import Affine, ReLU
    >>> network = Sequential([Affine(3), ReLU(), Affine(2)], (4,))
    >>> [(name, view.shape) for name, view in network.named_parameters()][:2]
    [('affine_1.weight', (4, 3)), ('affine_1.bias', (3,))]
    >>> network.parameter_count, network.output_shape
    (23, (2,))
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        input_shape: Shape,
        *,
        dtype: DTypeLike = np.float32,
        form: Form = "fast",
    ) -> None:
        self.layers = list_of_layers("Sequential", layers)
        self.dtype = np.dtype(dtype)
        every = list(self.every_layer())
        if not every or len(set(map(id, every))) < len(every):
            raise UserError("a network needs at least one layer, and each layer only once; make a new one instead")
        self.input_shape = _checked_shape(input_shape)
        #: If set, it is called with "forward" or "backward" and the name of each part that has just been done,
        #: and with None for a name when a pass begins. Fused layers are one part, done once for each tile.
        self.watch: Watch | None = None
        self._promises = 0
        self.path = Path(self.layers, self.input_shape, self.dtype, form)
        self.layer_names = self.path.names
        self.output_shape = self.path.shapes[-1]

        specs = self.path.parameter_specs()
        self._places = _Places(specs, [math.prod(spec.shape) for spec in specs], self.dtype)
        self.parameters = aligned_zeros(self._places.size, self.dtype)
        self.gradients = aligned_zeros(self._places.size, self.dtype)
        self.parameter_count = sum(where.stop - where.start for where in self._places.where)
        self.slices = {spec.name: where for spec, where in zip(specs, self._places.where, strict=True)}
        self.decay_slices = [self.slices[spec.name] for spec in specs if spec.decay]
        kept = self.path.buffer_specs()
        self._buffer_places = _Places(kept, [math.prod(spec.shape) for spec in kept], self.dtype)
        self._statistics_places = _Places(kept, [spec.statistics for spec in kept], np.dtype(np.float64))
        self.buffers = aligned_zeros(self._buffer_places.size, self.dtype)
        self.statistics = aligned_zeros(self._statistics_places.size, np.float64)
        self._vectors = vectors = Vectors(
            dict(self.named_parameters()),
            dict(self.named_gradients()),
            self._buffer_places.views(self.buffers),
            self._statistics_places.views(self.statistics, shaped=False),
        )
        for spec in kept:
            vectors.buffers[spec.name][...] = spec.initial
        self.bind()

    def bind(self, *, needs_input_gradient: bool = False) -> None:
        """Give all layers their views; say whether the first needs the gradient by the network's input."""
        self.path.bind(self._vectors, needs_input_gradient=needs_input_gradient)
        self._prepared = False

    def views(self, flat: Array) -> list[tuple[str, Array]]:
        """Return each parameter's name with its view of `flat`, any vector laid out as `parameters` is."""
        if flat.shape != self.parameters.shape:
            raise ValueError(f"a vector of shape {flat.shape} given, expected {self.parameters.shape}")
        return list(self._places.views(flat).items())

    def named_parameters(self) -> list[tuple[str, Array]]:
        """Return each parameter's name and view, in the order of the layers."""
        return self.views(self.parameters)

    def named_gradients(self) -> list[tuple[str, Array]]:
        """Return each parameter's name and the view of its gradient, in the order of the layers."""
        return self.views(self.gradients)

    def named_buffers(self) -> list[tuple[str, Array]]:
        """Return each buffer's name and view, in the order of the layers."""
        return list(self._buffer_places.views(self.buffers).items())

    def update_buffers(self, statistics: Array) -> None:
        """Update `buffers` once a step, given the sum of `statistics` over all micro-batches of the batch."""
        if self.statistics.size:
            np.copyto(self.statistics, statistics)
            self.path.update_buffers()

    def parts(self, samples: int) -> list[tuple[str, str, Products]]:
        """Return the parts that `watch` hears of: name, description, and the products for so many samples."""
        found = []
        for stage in self.path.stages:
            if stage.chain is None:
                place = stage.layers.start
                layer = self.layers[place]
                found.append((self.layer_names[place], str(layer), layer.products(samples)))
            else:
                found += [(block.name, str(block), block.conv.products(samples)) for block in stage.chain.blocks]
        return found

    def initialize(self, key: Key) -> None:
        """Set each parameter by its initializer, from the key ``key.of(name)``."""
        for (name, view), spec in zip(self.named_parameters(), self._places.specs, strict=True):
            view[...] = spec.initializer(key.of(name), spec.shape, spec.fan_in)

    @contextmanager
    def constant_parameters(self) -> Iterator[None]:
        """Promise that the parameters stay as they are until the end of the ``with`` block.

        The first `forward` inside prepares what the layers derive from the parameters, such as transformed weights,
        and the others reuse it. Outside, every `forward` prepares it again. Uses may be nested; each prepares once.

        >>> from distdl.nn import Affine
        >>> network = Sequential([Affine(1)], (2,))
        >>> with network.constant_parameters():
        ...     outputs = [network.forward(np.full((1, 2), i, np.float32)) for i in range(3)]
        """
        self._promises += 1
        self._prepared = False
        try:
            yield
        finally:
            self._promises -= 1

    def forward(self, x: Array, *, training: bool = False, key: Key | None = None) -> Array:
        """Return the logits (N, ...) for `x` (N, ...), which has the network's dtype.

        The layer called ``dropout_1`` draws from ``key.of("dropout_1")``. The result may be a buffer that
        the next `forward` of the same N overwrites. `x` must stay as it is until `backward`.
        """
        if x.shape[1:] != self.input_shape or x.dtype != self.dtype:
            expected = ", ".join(str(n) for n in ("N", *self.input_shape))
            raise UserError(f"input is {x.dtype} {x.shape}; expected {self.dtype} ({expected})")
        if self.watch:
            self.watch("forward", None)
        if not (self._promises and self._prepared):
            self.path.prepare()
            self._prepared = True
        return self.path.forward(x, training=training, key=key, watch=self.watch)

    def every_layer(self) -> Iterator[Layer]:
        """Yield all layers, and behind each one those that it is made of."""
        return _with_those_inside(self.layers)

    def backward(self, d_logits: Array) -> None:
        """Overwrite `gradients`, given the gradient of the loss by the logits of the latest `forward`."""
        if self.watch:
            self.watch("backward", None)
        self.path.backward(d_logits, watch=self.watch)


def _with_those_inside(layers: Sequence[Layer]) -> Iterator[Layer]:
    """Yield the layers, and behind each one those that it is made of."""
    for layer in layers:
        yield layer
        if isinstance(layer, Composite):
            for _, way in layer.ways:
                yield from _with_those_inside(way)


def _checked_shape(given: Any) -> Shape:
    try:
        sizes = [as_whole(n, 1) for n in given]
    except TypeError:
        sizes = [None]
    if None in sizes:
        raise UserError(f"input shape {given} given, expected sizes of at least 1, such as (28, 28, 1)")
    return tuple(size for size in sizes if size is not None)


def _aligned(count: int, dtype: np.dtype[Any]) -> int:
    """Return the least multiple of a 64-byte line's elements that is at least `count`."""
    line = ALIGNMENT_BYTES // dtype.itemsize
    return -(-count // line) * line
