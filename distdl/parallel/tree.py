"""The canonical tree: in which order the micro-batches of a step are summed, whoever computed them.

Leaves are the micro-batches 0 .. V-1. The node ``[lo, hi)`` is leaf `lo` if it holds one, else the sum of
``[lo, mid)`` and ``[mid, hi)`` with ``mid = lo +`` the largest power of two below ``hi - lo``. Floating-point
addition is commutative but not associative: the tree fixes the association, so the sum has the same bits
however the leaves are spread over ranks.

A node ``[lo, hi)`` therefore starts at a multiple of a power of two ``s`` and ends at ``min(lo + s, V)``, and
two neighbours are siblings exactly where `are_siblings` says so. Everything else follows: a list of nodes in
order of `lo` is folded like a binary counter, merging the last two as long as they are siblings.

Pure integer arithmetic; no array is touched here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

#: The micro-batches that one rank computes in a step, in increasing order.
Shard: TypeAlias = range | tuple[int, ...]


class TreeNode(NamedTuple):
    """The sum of micro-batches `lo` .. `hi` - 1."""

    lo: int
    hi: int


def are_siblings(left: TreeNode, right: TreeNode, leaves: int) -> bool:
    """Return whether `left` and `right` are the two children of one node of the tree over `leaves`.

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


def fold(nodes: Sequence[TreeNode], leaves: int) -> tuple[list[TreeNode], list[tuple[int, int]]]:
    """Merge siblings until none are left.

    Returns the nodes that remain, and the merges in order, each as ``(into, from)``: positions in `nodes`
    whose values are to be added, the sum staying at `into`. `nodes` must be disjoint and in order of `lo`.

    >>> fold([TreeNode(0, 1), TreeNode(1, 2), TreeNode(2, 3)], leaves=3)
    ([TreeNode(lo=0, hi=3)], [(0, 1), (0, 2)])
    """
    stack: list[tuple[TreeNode, int]] = []
    merges: list[tuple[int, int]] = []
    for position, node in enumerate(nodes):
        stack.append((node, position))
        while len(stack) > 1 and are_siblings(stack[-2][0], stack[-1][0], leaves):
            right, from_ = stack.pop()
            left, into = stack.pop()
            stack.append((TreeNode(left.lo, right.hi), into))
            merges.append((into, from_))
    return [node for node, _ in stack], merges


def maximal_nodes(shard: Shard, leaves: int) -> list[TreeNode]:
    """Return the fewest nodes of the tree over `leaves` that together hold just the leaves of `shard`.

    >>> maximal_nodes(range(3, 8), leaves=8)
    [TreeNode(lo=3, hi=4), TreeNode(lo=4, hi=8)]
    >>> maximal_nodes((0, 1, 5), leaves=8)
    [TreeNode(lo=0, hi=2), TreeNode(lo=5, hi=6)]
    """
    return fold([TreeNode(leaf, leaf + 1) for leaf in shard], leaves)[0]


def contiguous_shards(leaves: int, ranks: int) -> list[range]:
    """Deal the leaves to the ranks in order, in shares that differ by at most one.

    >>> contiguous_shards(8, 3)
    [range(0, 2), range(2, 5), range(5, 8)]
    """
    return [range(leaves * rank // ranks, leaves * (rank + 1) // ranks) for rank in range(ranks)]
