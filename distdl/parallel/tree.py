"""The canonical tree: the order in which the micro-batches of a step are summed.

The leaves are the micro-batches 0 .. V-1. The tree node ``[lo, hi)`` is leaf `lo` if it holds one leaf. Otherwise it is
the sum of ``[lo, mid)`` and ``[mid, hi)``, with ``mid = lo +`` the largest power of two below ``hi - lo``.
Floating-point addition is commutative but not associative. The tree fixes the association, so the sum has the same bits
however the leaves are spread over ranks.

It follows that a tree node ``[lo, hi)`` starts at a multiple of a power of two ``s`` and ends at ``min(lo + s, V)``.
Two neighbours are siblings exactly if `are_siblings` returns True. So tree nodes in order of `lo` are folded like
a binary counter: merge the last two as long as they are siblings.

This file is pure integer arithmetic; it touches no array.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias, TypeVar

K = TypeVar("K")
#: The micro-batches that one rank computes in a step, in increasing order.
Shard: TypeAlias = range | tuple[int, ...]
#: The place of a tree node: the rank that holds it, and the number of its slot.
Place: TypeAlias = tuple[int, int]
#: Additions, in order, as (into, from): the sum stays at the first place.
Merges: TypeAlias = Sequence[tuple[Place, Place]]


class TreeNode(NamedTuple):
    """The sum of micro-batches `lo` .. `hi` - 1."""

    lo: int
    hi: int


def are_siblings(left: TreeNode, right: TreeNode, leaves: int) -> bool:
    """Return whether `left` and `right` are the two children of one tree node, in the tree over `leaves`.

    >>> are_siblings(TreeNode(4, 6), TreeNode(6, 7), 7), are_siblings(TreeNode(2, 4), TreeNode(4, 6), 8)
    (True, False)
    """
    size = left.hi - left.lo
    return (
        left.hi == right.lo
        and size & (size - 1) == 0
        and left.lo % (2 * size) == 0
        and right.hi == min(left.lo + 2 * size, leaves)
    )


def fold(held: Mapping[K, TreeNode], leaves: int) -> tuple[dict[K, TreeNode], list[tuple[K, K]]]:
    """Merge disjoint tree nodes, each held at a place, until no siblings remain.

    Returns the remaining tree nodes by place, in order of `lo`, and the merges in order. A merge ``(into, from)`` adds
    the values at two places; the sum stays at `into`.

    >>> fold({"a": TreeNode(0, 1), "b": TreeNode(1, 2), "c": TreeNode(2, 3)}, leaves=3)
    ({'a': TreeNode(lo=0, hi=3)}, [('a', 'b'), ('a', 'c')])
    """
    stack: list[tuple[TreeNode, K]] = []
    merges: list[tuple[K, K]] = []
    for place, node in sorted(held.items(), key=lambda item: item[1].lo):
        stack.append((node, place))
        while len(stack) > 1 and are_siblings(stack[-2][0], stack[-1][0], leaves):
            right, from_ = stack.pop()
            left, into = stack.pop()
            stack.append((TreeNode(left.lo, right.hi), into))
            merges.append((into, from_))
    return {place: node for node, place in stack}, merges


def maximal_nodes(shard: Shard, leaves: int) -> list[TreeNode]:
    """Return the fewest tree nodes that together hold exactly the leaves of `shard`.

    >>> maximal_nodes(range(3, 8), leaves=8)
    [TreeNode(lo=3, hi=4), TreeNode(lo=4, hi=8)]
    """
    return list(fold({leaf: TreeNode(leaf, leaf + 1) for leaf in shard}, leaves)[0].values())


def contiguous_shards(leaves: int, ranks: int) -> list[range]:
    """Deal the leaves to the ranks in order, in shards whose lengths differ by at most one.

    >>> contiguous_shards(8, 3)
    [range(0, 2), range(2, 5), range(5, 8)]
    """
    return [range(leaves * rank // ranks, leaves * (rank + 1) // ranks) for rank in range(ranks)]


@dataclass(frozen=True)
class Plan:
    """The places of the tree nodes of a step, and the additions that complete the tree."""

    nodes: list[list[TreeNode]]
    """For each rank: its tree nodes after its own additions, one per slot."""
    within: list[Merges]
    """For each host: the additions on that host."""
    remaining: list[list[Place]]
    """For each host: the places of the tree nodes that remain after these."""
    between: Merges
    """The additions between hosts."""
    root: Place
    """The place of the sum of all leaves."""

    @property
    def count(self) -> int:
        """The number of tree nodes of all ranks."""
        return sum(map(len, self.nodes))


@lru_cache(maxsize=64)
def plan_sum(shards: tuple[Shard, ...], leaves: int, hosts: tuple[tuple[int, ...], ...]) -> Plan:
    """Return the plan for shards that hold all leaves once, with the ranks of each host."""
    nodes = [maximal_nodes(shard, leaves) for shard in shards]
    held = {(rank, slot): node for rank, of_rank in enumerate(nodes) for slot, node in enumerate(of_rank)}
    folded = [fold({place: node for place, node in held.items() if place[0] in ranks}, leaves) for ranks in hosts]
    roots, between = fold({place: node for rest, _ in folded for place, node in rest.items()}, leaves)
    assert list(roots.values()) == [TreeNode(0, leaves)], (
        f"shards {shards} do not hold the leaves 0..{leaves - 1} once each"
    )
    return Plan(nodes, [merges for _, merges in folded], [list(rest) for rest, _ in folded], between, next(iter(roots)))
