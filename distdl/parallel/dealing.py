"""Dealing micro-batches to ranks of different speed. Who computes them does not show in the bits.

Two steps, both pure. `share` says how many each rank gets: the shares that are done first if every rank keeps
its speed. `deal` says which: canonical blocks, largest first, so that each rank ends with few partial sums to
send. The order of the additions is the tree's own (`parallel/tree.py`), whoever holds the leaves.
"""

from __future__ import annotations

from functools import lru_cache
from heapq import heapify, heappop, heappush, heapreplace

from distdl.parallel.tree import Shard, TreeNode, contiguous_shards


@lru_cache(maxsize=64)
def share(leaves: int, speeds: tuple[float, ...]) -> tuple[int, ...]:
    """Return how many of the leaves each rank gets, so that the largest of load / speed is as small as it can be.

    Each leaf goes to the rank that would be done with it first; where ranks tie, as `contiguous_shards` has it,
    whose loads therefore come out for equal speeds. A rank that is far slower than the others may get none.
    (This is D'Hondt's method, with speeds for votes.)

    >>> share(8, (1.0, 1.0, 1.0)), share(8, (3.0, 1.0)), share(8, (1.0, 1.0, 0.01))
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
    """Return shards of these lengths that hold the leaves 0 .. sum(loads) - 1 once each, in few nodes.

    The largest block of the tree that is left goes to the rank that has most to get, or is halved if it is too
    large for every rank. So each rank gets at most one block of each power of two, as the binary digits of its
    load say, and one of them besides the block that ends with the last leaf, which may have any length.

    >>> deal((5, 3))
    ((0, 1, 2, 3, 6), (4, 5, 7))
    """
    shards: list[list[int]] = [[] for _ in loads]
    leaves = sum(loads)
    left = [(-load, rank) for rank, load in enumerate(loads)]
    heapify(left)
    blocks = [(-leaves, 0)] if leaves else []  # (minus the length, first leaf)
    while blocks:
        length, lo = heappop(blocks)
        most, rank = left[0]
        if most <= length:
            shards[rank].extend(range(lo, lo - length))
            heapreplace(left, (most - length, rank))
        else:
            for block in _halves(TreeNode(lo, lo - length)):
                heappush(blocks, (block.lo - block.hi, block.lo))
    return tuple(tuple(sorted(shard)) for shard in shards)


def _halves(node: TreeNode) -> tuple[TreeNode, TreeNode]:
    middle = node.lo + (1 << (node.hi - node.lo - 1).bit_length() - 1)
    return TreeNode(node.lo, middle), TreeNode(middle, node.hi)
