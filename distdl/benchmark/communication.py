"""How long the reduction takes, by size: the canonical tree beside MPI's own Allreduce.

Each call is timed on every rank, after a barrier; the rank that spent least came last and waited for nobody, so
its time is that of the reduction itself. The two take turns. Every rank holds one node of the tree, as it does
where shards are aligned.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distdl.benchmark.measure import Bench, oversubscribed
from distdl.parallel import REDUCTIONS, Communicator, Field, Layout

#: Vectors of float32, in bytes.
SIZES = tuple(2**power for power in range(10, 28, 2))
#: What the projection needs where no table was asked for.
FEW_SIZES = (2**12, 2**18, 2**21)

#: Each is called so often, and less often where that takes long.
MOST_CALLS, LEAST_CALLS = 20, 3
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
    found = []
    for count in sorted(bench.worlds):
        if count > 1:
            with bench.world(count) as world:
                for nbytes in sizes if world is not None else ():
                    assert world is not None
                    seconds = time_reductions(world, nbytes)
                    found.append(Timed(count, nbytes, oversubscribed(bench.places, count), seconds))
    return found


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
