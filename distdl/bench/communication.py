"""Time the reduction by size, the canonical tree next to MPI's own Allreduce; and the agreement that ends a step.

Every rank times each call after a barrier. The rank with the shortest time entered last and waited for no other rank.
So its time is that of the reduction itself. The two reductions take turns. Every rank holds one tree node, as it does
if the shards are aligned with the tree.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distdl.bench.measure import Workbench, oversubscribed
from distdl.parallel import REDUCTIONS, Communicator, Field, Layout

#: Bytes of the float32 vectors.
SIZES = tuple(2**power for power in range(10, 28, 2))
#: Sizes that the projection needs.
FEW_SIZES = (2**12, 2**18, 2**21)

#: Calls per size: the most, and the least if they take more than `SECONDS_PER_SIZE`.
MOST_CALLS, LEAST_CALLS = 20, 3
AGREEMENTS = 200
SECONDS_PER_SIZE = 0.5


@dataclass(frozen=True)
class ReductionTimes:
    """Seconds of each call that reduces a vector of `nbytes` over `ranks`, by the name of the reduction."""

    ranks: int
    nbytes: int
    oversubscribed: bool
    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds of a reduction."""
        return statistics.median(self.seconds[name])


def measure_communication(bench: Workbench, sizes: Sequence[int]) -> list[ReductionTimes]:
    """Time the reductions in every world of several ranks. The result is complete on rank 0 only. Collective."""
    found = []
    for world in _worlds_of_several_ranks(bench):
        is_shared = oversubscribed(bench.cores_of_ranks, world.size)
        found += [ReductionTimes(world.size, nbytes, is_shared, time_reductions(world, nbytes)) for nbytes in sizes]
    return found


def measure_agreement(bench: Workbench) -> dict[int, float]:
    """Return the median seconds of the agreement that ends a step, by the number of ranks. Collective.

    The result is empty if the job cannot survive a failure, because steps then have no agreement.
    """
    if not bench.communicator.survives_failures:
        return {}
    worlds = _worlds_of_several_ranks(bench)
    return {world.size: statistics.median(time_agreements(world, AGREEMENTS)) for world in worlds}


def _worlds_of_several_ranks(bench: Workbench) -> Iterator[Communicator]:
    """Yield each world of several ranks, on its own ranks; the other ranks sleep. Collective."""
    for count in sorted(bench.worlds):
        if count > 1:
            with bench.world(count) as world:
                if world is not None:
                    yield world


def time_agreements(world: Communicator, calls: int) -> list[float]:
    """Return the seconds of each agreement, after one that is not counted. Collective."""
    own = []
    for call in range(calls + 1):
        world.barrier()
        started = time.perf_counter()
        world.agree(True)
        if call:
            own.append(time.perf_counter() - started)
    return [min(call) for call in zip(*world.allgather_json(own), strict=True)]


def time_reductions(world: Communicator, nbytes: int) -> dict[str, list[float]]:
    """Return the seconds of each call by the name of the reduction, after one that makes the buffers. Collective."""
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
