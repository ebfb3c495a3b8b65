"""Where the time of a micro-batch goes: each part of the network, beside this machine's own matrix products.

The network says itself which parts it has and which products they stand for (`Sequential.parts`), and calls
its `watch` after each of them in real training steps. Operations are those of the plain form of a layer, so an
algorithm that needs fewer may well show a higher rate than the products themselves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from distdl.arrays import aligned_empty
from distdl.bench.measure import Bench, Setup
from distdl.engine.trainer import Trainer
from distdl.nn.layers import Product
from distdl.parallel import Communicator

#: A product is timed this often, and until so many seconds have gone.
PRODUCT_CALLS = 7
PRODUCT_SECONDS = 0.005


@dataclass(frozen=True)
class TimedPass:
    """What one part takes in one direction, for one micro-batch."""

    seconds: float
    operations: int
    product_seconds: float
    """What its matrix products alone take."""

    @property
    def rate(self) -> float | None:
        """Operations a second; None for a part without products."""
        return self.operations / self.seconds if self.operations else None

    @property
    def product_rate(self) -> float | None:
        """Operations a second of the products alone."""
        return self.operations / self.product_seconds if self.operations else None


@dataclass(frozen=True)
class PartTime:
    """One part of the network."""

    name: str
    description: str
    forward: TimedPass
    backward: TimedPass


@dataclass(frozen=True)
class LayerTimes:
    """All parts, and what else a micro-batch takes, on one rank; medians each, so that hiccups do not show."""

    samples: int
    loss_seconds: float
    outside_seconds: float
    """Between two micro-batches: adding to the partial sum, getting the next pictures."""
    update_seconds: float
    """The optimizer's, for this one micro-batch of the step."""
    parts: list[PartTime]

    @property
    def seconds(self) -> float:
        """The whole micro-batch."""
        network = sum(part.forward.seconds + part.backward.seconds for part in self.parts)
        return network + self.loss_seconds + self.outside_seconds + self.update_seconds


class Stopwatch:
    """The `watch` of a network: notes the seconds since the mark before, by direction and part.

    The part None of a direction is what came before that pass.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str | None], list[float]] = {}
        self._done: set[tuple[str, str | None]] = set()
        self._last: float | None = None

    def new_step(self) -> None:
        """Forget the mark before: what lies between two steps belongs to no part."""
        self._last = None

    def __call__(self, direction: str, name: str | None) -> None:
        """Note that a part is done, or, without a name, that a pass begins."""
        part = (direction, name)
        if self._last is not None:
            passes = self.seconds.setdefault(part, [])
            if part in self._done:  # another tile of the same pass
                passes[-1] += time.perf_counter() - self._last
            else:
                passes.append(time.perf_counter() - self._last)
        self._done = {part} | (self._done if name is not None else set())
        self._last = time.perf_counter()

    def median(self, direction: str, name: str | None) -> float:
        """Return the median seconds of a part; 0 if it never ran."""
        return statistics.median(self.seconds.get((direction, name), [0.0]))


def measure_layers(bench: Bench) -> LayerTimes | None:
    """Time the parts of the network on rank 0; None on the others, which sleep meanwhile. Collective."""
    with bench.world(1) as world:
        return None if world is None else _layer_times(bench, world)


def _layer_times(bench: Bench, world: Communicator) -> LayerTimes:
    settings = bench.settings
    size, micro_batches = settings.micro_batch_size, max(2, settings.micro_batches)
    trainer = bench.trainer(Setup("share", 1, size * micro_batches, micro_batches), world)
    bench.start_again(trainer)
    for _ in range(bench.warm_up_steps):
        trainer.step()
    bench.network.watch = watch = Stopwatch()
    for _ in range(bench.steps):
        watch.new_step()
        trainer.step()
    bench.network.watch = None
    return LayerTimes(
        size,
        watch.median("backward", None),
        watch.median("forward", None),
        _update_seconds(trainer, bench.steps) / micro_batches,
        [
            PartTime(
                name,
                description,
                _timed_pass(watch.median("forward", name), products.forward),
                _timed_pass(watch.median("backward", name), products.backward),
            )
            for name, description, products in bench.network.parts(size)
        ],
    )


def _update_seconds(trainer: Trainer, calls: int) -> float:
    """Return the median seconds of the optimizer's update."""
    state, network = trainer.state, trainer.state.network
    gradient = aligned_empty(network.gradients.shape)
    seconds = []
    for call in range(calls):
        gradient[...] = network.gradients
        started = time.perf_counter()
        state.optimizer.update(network.parameters, gradient, 0.0, state.step + call + 1)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _timed_pass(seconds: float, products: Sequence[Product]) -> TimedPass:
    operations = sum(product.operations for product in products)
    return TimedPass(seconds, operations, sum(product_seconds(product) for product in products))


@lru_cache(maxsize=256)
def product_seconds(product: Product) -> float:
    """Return what one float32 product of this shape takes, out of aligned arrays into one that exists."""
    left, right = aligned_empty((product.M, product.K)), aligned_empty((product.K, product.N))
    out = aligned_empty((product.M, product.N))
    left.fill(0.5)
    right.fill(0.5)
    np.matmul(left, right, out=out)
    seconds: list[float] = []
    while len(seconds) < PRODUCT_CALLS or sum(seconds) < PRODUCT_SECONDS:
        started = time.perf_counter()
        np.matmul(left, right, out=out)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
