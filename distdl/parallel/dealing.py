"""Dealing micro-batches to ranks of different speed. The bits do not depend on it.

Both functions are pure. `loads_by_speed` returns how many micro-batches each rank gets, so that the slowest rank
finishes as early as possible. `deal` chooses which ones: canonical blocks, largest first, so that each rank has few
partial sums to send. The tree alone (`parallel/tree.py`) fixes the order of the additions.
"""

from functools import lru_cache
from heapq import heapify, heappop, heappush, heapreplace

from distdl.parallel.tree import Shard, contiguous_shards


@lru_cache(maxsize=64)
def loads_by_speed(leaves: int, speeds: tuple[float, ...]) -> tuple[int, ...]:
    """Return the number of leaves for each rank, with the smallest possible maximum of load / speed.

    Each leaf goes to the rank that would finish it first. Ties are resolved so that equal speeds give the loads of
    `contiguous_shards`. A rank that is far slower than the others may get no leaf. (This is D'Hondt's method, with
    speeds for votes.)

    >>> loads_by_speed(8, (1.0, 1.0, 1.0)), loads_by_speed(8, (3.0, 1.0)), loads_by_speed(8, (1.0, 1.0, 0.01))
    ((2, 3, 3), (6, 2), (4, 4, 0))
    """
    assert all(speed > 0 for speed in speeds), f"speeds must be above 0, not {speeds}"
    even = [len(shard) for shard in contiguous_shards(leaves, len(speeds))]
    loads = [0] * len(speeds)
    next_done = [(1 / speed, even[rank] < 1, rank) for rank, speed in enumerate(speeds)]
    heapify(next_done)
    for _ in range(leaves):
        rank = next_done[0][2]
        loads[rank] += 1
        heapreplace(next_done, ((loads[rank] + 1) / speeds[rank], loads[rank] >= even[rank], rank))
    return tuple(loads)


@lru_cache(maxsize=64)
def deal(loads: tuple[int, ...]) -> tuple[Shard, ...]:
    """Return shards of these lengths that hold each leaf 0 .. sum(loads) - 1 once, in few tree nodes.

    The largest remaining block of the tree goes to the rank that still needs the most leaves. If the block is too
    large for every rank, it is halved. So each rank gets at most one block of each power of two: the binary digits of
    its load. The block with the last leaf may have any length; its rank gets the digits of the rest of its load.

    >>> deal((5, 3))
    ((0, 1, 2, 3, 6), (4, 5, 7))
    """
    shards: list[list[int]] = [[] for _ in loads]
    leaves = sum(loads)
    needed = [(-load, rank) for rank, load in enumerate(loads)]
    heapify(needed)
    blocks = [(-leaves, 0)] if leaves else []  # (minus the length, first leaf)
    while blocks:
        length, lo = heappop(blocks)
        most, rank = needed[0]
        if most <= length:
            shards[rank].extend(range(lo, lo - length))
            heapreplace(needed, (most - length, rank))
        else:
            left = 1 << (-length - 1).bit_length() - 1
            heappush(blocks, (-left, lo))
            heappush(blocks, (length + left, lo + left))
    return tuple(tuple(sorted(shard)) for shard in shards)
