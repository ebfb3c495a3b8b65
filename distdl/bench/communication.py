"""How long the reduction takes, by size: the canonical tree beside MPI's own Allreduce; and the agreement of a step.

Each call is timed on every rank, after a barrier; the rank that spent least came last and waited for nobody, so
its time is that of the reduction itself. The two take turns. Every rank holds one node of the tree, as it does
where shards are aligned.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distdl.bench.measure import Bench, oversubscribed
from distdl.parallel import REDUCTIONS, Communicator, Field, Layout

#: Vectors of float32, in bytes.
SIZES = tuple(2**power for power in range(10, 28, 2))
#: What the projection needs where no table was asked for.
FEW_SIZES = (2**12, 2**18, 2**21)

#: Each is called so often, and less often where that takes long.
MOST_CALLS, LEAST_CALLS = 20, 3
AGREEMENTS = 200
SECONDS_PER_SIZE = 0.5


@dataclass(frozen=True)
class Timed:
    """The seconds of each reduction of a vector of `nbytes` over `ranks`, by the name of the reduction."""

    ranks: int
    nbytes: int
    oversubscribed: bool
    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds of a reduction."""
        return statistics.median(self.seconds[name])


def measure_communication(bench: Bench, sizes: Sequence[int]) -> list[Timed]:
    """Time the reductions in every world of more than one rank. Whole on rank 0. Collective."""
    return [
        Timed(world.size, nbytes, oversubscribed(bench.places, world.size), time_reductions(world, nbytes))
        for world in _worlds_of_several(bench)
        for nbytes in sizes
    ]


def measure_agreement(bench: Bench) -> dict[int, float]:
    """Return the median seconds of the agreement that ends a step, by the number of ranks. Collective.

    Where no failure is survived there is none.
    """
    if not bench.communicator.survives_failures:
        return {}
    return {world.size: statistics.median(time_agreements(world, AGREEMENTS)) for world in _worlds_of_several(bench)}


def _worlds_of_several(bench: Bench) -> Iterator[Communicator]:
    """Go through the worlds of more than one rank; in each, those that are not of it sleep. Collective."""
    for count in sorted(bench.worlds):
        if count > 1:
            with bench.world(count) as world:
                if world is not None:
                    yield world


def time_agreements(world: Communicator, calls: int) -> list[float]:
    """Return the seconds of each agreement; the first is left out. Collective."""
    own = []
    for call in range(calls + 1):
        world.barrier()
        started = time.perf_counter()
        world.agree(True)
        if call:
            own.append(time.perf_counter() - started)
    return [min(call) for call in zip(*world.allgather_json(own), strict=True)]


def time_reductions(world: Communicator, nbytes: int) -> dict[str, list[float]]:
    """Return the seconds of each call, by the name of the reduction; the first makes buffers and is left out.

    Collective.
    """
    layout = Layout([Field("gradient", "f4", nbytes // 4)])
    values = {"gradient": np.ones(nbytes // 4, np.float32)}
    reductions = {name: kind(world, layout) for name, kind in REDUCTIONS.items()}
    own: dict[str, list[float]] = {name: [] for name in reductions}
    begun = time.perf_counter()
    for call in range(MOST_CALLS + 1):
        if call > LEAST_CALLS and world.bcast_json(time.perf_counter() - begun > SECONDS_PER_SIZE):
            break
        for name, reduction in reductions.items():
            reduction.begin([range(rank, rank + 1) for rank in range(world.size)])
            reduction.add(world.rank, values)
            world.barrier()
            started = time.perf_counter()
            reduction.total()
            if call:
                own[name].append(time.perf_counter() - started)
    everyone = world.allgather_json(own)
    return {name: [min(call) for call in zip(*(of[name] for of in everyone), strict=True)] for name in own}
