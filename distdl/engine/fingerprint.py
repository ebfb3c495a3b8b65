"""The fingerprint: short hashes of the bits of some operations, computed by each rank at the start of a run.

Equal fingerprints show what no name of a CPU can show: that these operations give the same bits. Fingerprints are
compared between the ranks, with the checkpoint that a run resumes from, and with golden receipts.

The operations are those that the results of the run consist of:

- the initial weights, the loss and the optimizer;
- with NumPy's kernels, the products in use (`MOST_ROWS` rows of them) and some others, and NumPy's functions;
- with kernels whose bits do not depend on the CPU, the layers in use on two samples. No product of BLAS is among them,
  unless the network has layers of the user.
"""

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.engine.objective import training_loss
from distdl.engine.state import TrainingState
from distdl.errors import UserError
from distdl.nn import Sequential
from distdl.nn.layer_stack import LayerGroup
from distdl.nn.layers import Layer
from distdl.optim import optimizer_class
from distdl.parallel import Communicator
from distdl.rng import Key

#: The hash of each operation by its name, in order.
Fingerprint: TypeAlias = dict[str, str]
Array: TypeAlias = NDArray[Any]

#: Limits of the products: rows, terms of a sum, columns, and how many different ones.
MOST_ROWS, MOST_TERMS, MOST_COLUMNS, MOST_PRODUCTS = 32, 2048, 128, 20
#: Terms of the products that every network gets: BLAS may sum each length in another order.
TERMS = (9, 64, 500, 1000, 2048)
#: Samples of a layer, and the most operations on them in all; a larger layer is left out.
SAMPLES, MOST_OPERATIONS = 2, 5e8
#: Elements of a result that are hashed.
MOST_ELEMENTS = 2**16
_KEY = Key(0).of("fingerprint")


def fingerprint(config: TrainConfig, data: PreparedDataset, state: TrainingState) -> Fingerprint:
    """Return the fingerprint of this rank; `state` has the initial weights. Its gradients are zero afterwards."""
    return {
        name: _hash(results)
        for name, results in (
            ("initial weights", [state.network.parameters]),
            ("loss", _loss(config, data, state.network)),
            (f"optimizer {config.optimizer}", _updates(config, state.network)),
            *_of_network(state.network, config.micro_batch_size),
        )
    }


def first_difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """Return the name of the first operation whose bits differ; None if all that both have are equal.

    >>> first_difference({"exp": "1f", "sum": "2e"}, {"sum": "2d", "exp": "1f"})
    'sum'
    """
    return next((name for name in ours if name in theirs and ours[name] != theirs[name]), None)


def compare_ranks(communicator: Communicator, ours: Fingerprint) -> tuple[Fingerprint, list[str]]:
    """Return the fingerprint of rank 0, and a text for each host with ranks that differ from it. Collective."""
    hosts = communicator.allgather_json(socket.gethostname())
    digests = communicator.allgather_json(blake2b(repr(ours).encode(), digest_size=16).hexdigest())
    if len(set(digests)) == 1:
        return ours, []
    first, *others = communicator.allgather_json(ours)
    of_host: dict[tuple[str, str], list[int]] = {}
    for rank, found in enumerate(others, start=1):
        name = first_difference(first, found)
        if name is not None:
            of_host.setdefault((hosts[rank], name), []).append(rank)
    return first, [
        f"{_counted(ranks)} on {host} and rank 0 on {hosts[0]} compute other bits, first in: {name}"
        for (host, name), ranks in of_host.items()
    ]


def check_same_bits(config: TrainConfig, different: Sequence[str], found: Mapping[str, Any] | None) -> None:
    """Raise `UserError` if `--require-same-bits` is given, and bits differ or the checkpoint `found` shows none."""


def _counted(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _hash(results: Iterable[Array]) -> str:
    digest = blake2b(digest_size=4)
    for array in results:
        digest.update(np.ascontiguousarray(array.reshape(-1)[:MOST_ELEMENTS]).tobytes())
    return digest.hexdigest()


def _numbers(name: str, *shape: int) -> NDArray[np.float32]:
    """Return pseudo-random numbers from -1 to 1; the same ones again after `MOST_ELEMENTS`."""
    size = int(np.prod(shape))
    words = _KEY.of(name).half_words(min(size, MOST_ELEMENTS))
    return np.resize((words >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1), shape)


def _loss(config: TrainConfig, data: PreparedDataset, network: Sequential) -> list[Array]:
    rows = data.parts.training[:8]
    loss = training_loss(config, data)
    outputs = _numbers("outputs", len(rows), *network.output_shape).astype(network.dtype)
    value = loss.forward(outputs, data.targets(rows))
    return [np.array(value, np.float64), loss.backward()]


def _updates(config: TrainConfig, network: Sequential) -> list[Array]:
    """Return the parameters and the state after three updates."""
    optimizer = optimizer_class(config.optimizer)(
        100,
        weight_decay=config.weight_decay,
        l1=config.l1_decay,
        decay_slices=[slice(0, 70)],
        fused=network.stack.kernels.optimizer_rule(config.optimizer),
        **config.optimizer_settings,
    )
    w = _numbers("parameters", 100)
    for step in range(1, 4):
        optimizer.update(w, _numbers(f"gradient {step}", 100), config.scaled_learning_rate, step)
    return [w, *optimizer.state.values()]


def _of_network(network: Sequential, samples: int) -> Iterator[tuple[str, list[Array]]]:
    kernels, own = network.stack.kernels, not any(map(_is_foreign, network.every_layer()))
    if kernels.norm is not None:
        yield "norm", [np.array(kernels.norm(_numbers("gradient", 5000)))]
    if kernels.portable:
        yield from _layers(network)
    if not (kernels.portable and own):
        yield from _products(network, samples)
        yield from _functions()


def _is_foreign(layer: Layer) -> bool:
    return not type(layer).__module__.startswith("distdl.nn.")


def _layers(network: Sequential) -> Iterator[tuple[str, list[Array]]]:
    """Yield the results of the layers: outputs, input gradient and gradients of the parameters."""
    left, shape = MOST_OPERATIONS, network.input_shape
    for name, layers, output_shape, run in network.stack.runs():
        inner = [inside for layer in layers for inside in _all_inside(layer)]
        cost = _operations(layers) + 20 * SAMPLES * (int(np.prod(shape)) + int(np.prod(output_shape)))
        if cost <= left and not any(map(_is_foreign, inner)):
            left -= cost
            run.prepare()
            x = _numbers(f"inputs of {name}", SAMPLES, *shape).astype(network.dtype)
            y = run.forward(x, training=True, key=_KEY)
            results = [y.copy()]
            dx = run.backward(_numbers(f"outputs of {name}", *y.shape).astype(network.dtype))
            results += [] if dx is None else [dx]
            results += [gradient for key, gradient in network.named_gradients() if key.startswith(f"{name}.")]
            yield f"{name} ({' + '.join(map(str, layers))})", results
        shape = output_shape
    network.gradients.fill(0)
    network.statistics.fill(0)
