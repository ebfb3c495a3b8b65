"""The fingerprint: short hashes of the bits of some operations, computed by each rank at the start of a run.

Equal fingerprints show what no name of a CPU can show: that these operations give the same bits. Fingerprints are
compared between the ranks, with the checkpoint that a run resumes from, and with golden receipts.

The operations are those that the results of the run consist of:

- normal numbers, which initial weights consist of, the loss and the optimizer;
- with NumPy's kernels, the products in use (`MOST_ROWS` rows of them) and some others, and NumPy's functions;
- with kernels whose bits do not depend on the CPU, the layers in use on two samples. No product of BLAS is among them,
  unless the network has layers of the user.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.nn import Sequential, make_loss
from distdl.nn.layer_stack import LayerGroup
from distdl.nn.layers import Layer
from distdl.optim import optimizer_class
from distdl.rng import Key

#: The hash of each operation by its name, in order.
Fingerprint: TypeAlias = dict[str, str]
Array: TypeAlias = NDArray[Any]

#: Limits of the products: rows, terms of a sum, columns, and how many different ones.
MOST_ROWS, MOST_TERMS, MOST_COLUMNS, MOST_PRODUCTS = 16, 2048, 64, 16
#: Terms of the products that every network gets: BLAS may sum each length in another order.
TERMS = (9, 64, 500, 1000, 2048)
#: Samples of a layer, and the most operations on them in all; a larger layer is left out.
SAMPLES, MOST_OPERATIONS = 2, 2e8
#: Elements of a result that are hashed, and different pseudo-random numbers.
MOST_ELEMENTS, NUMBERS = 2**14, 2**16
_KEY = Key(0).of("fingerprint")


def fingerprint(config: TrainConfig, data: PreparedDataset, network: Sequential) -> Fingerprint:
    """Return the fingerprint of this rank. It does not depend on the weights, and leaves zeros in the gradients."""
    return {
        name: _hash(results)
        for name, results in (
            ("normal numbers", [_KEY.normal(1000)]),
            ("loss", _loss(config, data, network)),
            (f"optimizer {config.optimizer}", _updates(config, network)),
            *_of_network(network, config.micro_batch_size),
        )
    }


def first_difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """Return the name of the first operation whose bits differ; None if all that both have are equal.

    >>> first_difference({"exp": "1f", "sum": "2e"}, {"sum": "2d", "exp": "1f"})
    'sum'
    """
    return next((name for name in ours if name in theirs and ours[name] != theirs[name]), None)


def _hash(results: Iterable[Array]) -> str:
    digest = blake2b(digest_size=4)
    for array in results:
        digest.update(np.ascontiguousarray(array.reshape(-1)[:MOST_ELEMENTS]).tobytes())
    return digest.hexdigest()


def _numbers(start: int, *shape: int) -> NDArray[np.float32]:
    """Return the pseudo-random numbers from position `start` on; they repeat from there."""
    return np.resize(_pool()[start:], shape)


@cache
def _pool() -> NDArray[np.float32]:
    """Return numbers from -1 to 1, with 24 random bits each."""
    words = _KEY.half_words(NUMBERS)
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


def _loss(config: TrainConfig, data: PreparedDataset, network: Sequential) -> list[Array]:
    rows = data.parts.training[:8]
    loss = network.stack.kernels.loss(make_loss(data.loss_named(config.loss)))
    outputs = _numbers(0, len(rows), *network.output_shape).astype(network.dtype)
    value = loss.forward(outputs, data.targets(rows))
    return [np.array(value, np.float64), loss.backward()]


def _updates(config: TrainConfig, network: Sequential) -> list[Array]:
    """Return the parameters and the state after three updates."""
    settings: dict[str, Any] = config.optimizer_settings
    optimizer = optimizer_class(config.optimizer)(
        100,
        weight_decay=config.weight_decay,
        l1=config.l1_decay,
        decay_slices=[slice(0, 70)],
        fused=network.stack.kernels.optimizer_rule(config.optimizer),
        **settings,
    )
    w = _numbers(0, 100)
    for step in range(1, 4):
        optimizer.update(w, _numbers(100 * step, 100), config.scaled_learning_rate, step)
    return [w, *optimizer.state.values()]


def _of_network(network: Sequential, samples: int) -> Iterator[tuple[str, list[Array]]]:
    kernels, own = network.stack.kernels, not any(map(_is_foreign, network.every_layer()))
    if kernels.norm is not None:
        yield "norm", [np.array(kernels.norm(_numbers(0, 5000)))]
    if kernels.portable:
        yield from _layers(network)
    if not (kernels.portable and own):
        yield from _products(network, samples)
        yield from _functions()


def _is_foreign(layer: Layer) -> bool:
    return not type(layer).__module__.startswith("distdl.nn.")


def _layers(network: Sequential) -> Iterator[tuple[str, list[Array]]]:
    """Yield the results of the layers: outputs, input gradient and gradients of the parameters."""
    stack, left, shape = network.stack, MOST_OPERATIONS, network.input_shape
    starts = [stack.names.index(name) for name, *_ in stack.segments]
    for (name, layer, first_shape, fused), start, stop in zip(
        stack.segments, starts, [*starts[1:], len(stack.layers)], strict=True
    ):
        layers, names = stack.layers[start:stop], stack.names[start:stop]
        output_shape = first_shape if fused is None else fused.output_shape
        cost = _operations(layers) + 20 * SAMPLES * (math.prod(shape) + math.prod(output_shape))
        if cost <= left and not any(map(_is_foreign, _inside(layers))):
            left -= cost
            x, dy = (
                _numbers(start, SAMPLES, *sizes).astype(network.dtype, copy=False)
                for start, sizes in ((0, shape), (7, output_shape))
            )
            run = fused or layer
            key = _KEY if fused is not None else _KEY.of(name)
            parameters, gradients = (
                [one for at, one in found if at.startswith(tuple(f"{n}." for n in names))]
                for found in (network.named_parameters(), network.named_gradients())
            )
            with _pseudo_random(parameters):
                for one in (*layers, run):  # also the stacks inside of composites
                    one.prepare()
                y, dx = run.forward(x, training=True, key=key).copy(), run.backward(dy)
            yield f"{name} ({' + '.join(map(str, layers))})", [y, *([] if dx is None else [dx]), *gradients]
            for gradient in gradients:
                gradient.fill(0)
            stack.kernels.begin_backward()
        shape = output_shape
    network.statistics.fill(0)


@contextmanager
def _pseudo_random(parameters: Sequence[Array]) -> Iterator[None]:
    """Give the parameters other values inside the block."""
    before = [parameter.copy() for parameter in parameters]
    for parameter in parameters:
        parameter[...] = _numbers(11, *parameter.shape)
    yield
    for parameter, values in zip(parameters, before, strict=True):
        parameter[...] = values


def _inside(layers: Sequence[Layer]) -> Iterator[Layer]:
    for layer in layers:
        yield layer
        if isinstance(layer, LayerGroup):
            yield from layer.every_layer()


def _operations(layers: Sequence[Layer]) -> int:
    """Return the operations of the products of these layers."""
    each = [layer.products(SAMPLES) for layer in layers]
    return sum(product.operations for products in each for product in (*products.forward, *products.backward))


def _products(network: Sequential, samples: int) -> Iterator[tuple[str, list[Array]]]:
    """Yield products with the sizes in use and with `TERMS`, each of plain and transposed matrices."""
    sizes = dict.fromkeys(
        (min(product.M, MOST_ROWS), min(product.K, MOST_TERMS), min(product.N, MOST_COLUMNS))
        for *_, products in network.parts(samples)
        for product in (*products.forward, *products.backward)
    )
    for M, K, N in dict.fromkeys([*((16, K, 16) for K in TERMS), *list(sizes)[:MOST_PRODUCTS]]):
        a, b = _numbers(0, M, K), _numbers(7, K, N)
        a_, b_ = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        yield f"product ({M},{K})×({K},{N})", [a @ b, a_.T @ b, a @ b_.T]


def _functions() -> Iterator[tuple[str, list[Array]]]:
    """Yield the results of NumPy's functions whose bits may depend on the CPU."""
    x = _numbers(0, 5000)
    positive = np.abs(x) + np.float32(0.01)
    yield "exp", [np.exp(x), np.exp(x.astype(np.float64))]
    yield "log", [np.log(positive), np.log(positive.astype(np.float64))]
    yield "tanh", [np.tanh(x)]
    yield "power", [np.power(positive, np.float32(-0.75))]
    yield "sum", [x.sum(keepdims=True), x.reshape(50, 100).sum(axis=0), x.reshape(50, 100).mean(axis=1)]
    yield "sum of squares", [np.array(np.vdot(x, x))]
