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
from distdl.benchmark.measure import WARM_UP_STEPS, Bench, Setup
from distdl.nn.layers import Product

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
    """All parts, and what a micro-batch takes as a whole, its share of the update included, on one rank."""

    samples: int
    seconds: float
    update_seconds: float
    """The optimizer's, for this one micro-batch of the step."""
    parts: list[PartTime]

    @property
    def rest(self) -> float:
        """Seconds of a micro-batch outside of the network and the update: pictures, loss, partial sums."""
        network = sum(part.forward.seconds + part.backward.seconds for part in self.parts)
        return self.seconds - network - self.update_seconds


class Stopwatch:
    """The `watch` of a network: notes the seconds since the mark before, by direction and part."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self._last = 0.0

    def __call__(self, direction: str, name: str | None) -> None:
        """Note that a part is done, or, without a name, that a pass begins."""
        if name is not None:
            self.seconds.setdefault((direction, name), []).append(time.perf_counter() - self._last)
        self._last = time.perf_counter()

    def median(self, direction: str, name: str) -> float:
        """Return the median seconds of a part; 0 if it never ran."""
        return statistics.median(self.seconds.get((direction, name), [0.0]))


def measure_layers(bench: Bench) -> LayerTimes | None:
    """Time the parts of the network on rank 0; None on the others, which sleep meanwhile. Collective."""
    world, settings = bench.worlds[1], bench.settings
    found = None
    if world is not None:
        trainer = bench.trainer(Setup("share", 1, settings.batch_size, settings.micro_batches), world)
        bench.start_again(trainer)
        for _ in range(WARM_UP_STEPS):
            trainer.step()
        watch = Stopwatch()
        step_seconds = []
        bench.network.watch = watch
        for _ in range(settings.steps):
            started = time.perf_counter()
            trainer.step()
            step_seconds.append(time.perf_counter() - started)
        bench.network.watch = None
        state, update_seconds = trainer.state, []
        gradient = aligned_empty(bench.network.gradients.shape)
        for step in range(settings.steps):
            gradient[...] = bench.network.gradients
            started = time.perf_counter()
            state.optimizer.update(bench.network.parameters, gradient, 0.0, state.step + step + 1)
            update_seconds.append(time.perf_counter() - started)
        size = settings.micro_batch_size
        found = LayerTimes(
            size,
            statistics.median(step_seconds) / settings.micro_batches,
            statistics.median(update_seconds) / settings.micro_batches,
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
    bench.idle()
    return found


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
