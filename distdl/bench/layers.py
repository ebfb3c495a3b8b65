"""Time each part of the network in training steps, next to this machine's own matrix products.

The network names its parts and their matrix products (`Sequential.parts`), and calls its `watch` after each part.
The number of operations is that of a layer's plain form. So an algorithm that needs fewer operations can show a
higher rate than the products themselves.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from distdl.arrays import aligned_empty
from distdl.bench.measure import ScalingCase, Workbench
from distdl.engine.state import TrainingState
from distdl.nn.layers import Product

#: Least calls and seconds of a timed product.
PRODUCT_CALLS = 7
PRODUCT_SECONDS = 0.005


@dataclass(frozen=True)
class TimedPass:
    """One direction of one part, for one micro-batch."""

    seconds: float
    operations: int
    product_seconds: float
    """Seconds of its matrix products alone."""


@dataclass(frozen=True)
class PartTime:
    """One part of the network."""

    name: str
    description: str
    forward: TimedPass
    backward: TimedPass


@dataclass(frozen=True)
class LayerTimes:
    """Median seconds of a micro-batch on one rank: all parts of the network, and the rest."""

    samples: int
    loss_seconds: float
    outside_seconds: float
    """Between two micro-batches: adding to the partial sums, and reading the next images."""
    update_seconds: float
    """The optimizer's update, divided by the micro-batches of a step."""
    parts: list[PartTime]

    @property
    def seconds(self) -> float:
        """Seconds of the whole micro-batch."""
        network = sum(part.forward.seconds + part.backward.seconds for part in self.parts)
        return network + self.loss_seconds + self.outside_seconds + self.update_seconds


class Stopwatch:
    """The `watch` of a network: the seconds of each part, by direction and name.

    A name of None stands for the time before the pass of that direction.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str | None], list[float]] = {}
        self._done: set[tuple[str, str | None]] = set()
        self._last: float | None = None

    def new_step(self) -> None:
        """Start a step: the time between two steps belongs to no part."""
        self._last = None

    def __call__(self, direction: str, name: str | None) -> None:
        """Note the end of a part, or, without a name, the start of a pass."""
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


def measure_layers(bench: Workbench) -> LayerTimes | None:
    """Time the parts of the network on rank 0; return None on the other ranks, which sleep. Collective."""
    settings = bench.settings
    size, micro_batches = settings.micro_batch_size, max(2, settings.micro_batches)
    with bench.world(1) as world:
        if world is None:
            return None
        steps = bench.warmed_up(ScalingCase("share", 1, size * micro_batches, micro_batches), world)
        bench.network.watch = watch = Stopwatch()
        for _ in range(bench.steps):
            watch.new_step()
            steps.take(1)
        bench.network.watch = None
        update_seconds = _update_seconds(steps.state, bench.steps) / micro_batches
        parts = [
            PartTime(
                name,
                description,
                _timed_pass(watch.median("forward", name), products.forward),
                _timed_pass(watch.median("backward", name), products.backward),
            )
            for name, description, products in bench.network.parts(size)
        ]
        return LayerTimes(size, watch.median("backward", None), watch.median("forward", None), update_seconds, parts)


def _update_seconds(state: TrainingState, calls: int) -> float:
    """Return the median seconds of the optimizer's update."""
    network = state.network
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
    """Return the median seconds of one float32 product of this shape, of aligned arrays into an existing one."""
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
