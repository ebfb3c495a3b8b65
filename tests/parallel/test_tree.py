"""The canonical tree fixes the order of every addition, for any distribution of the leaves over ranks."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.parallel.tree import TreeNode, are_siblings, contiguous_shards, fold, maximal_nodes


def expression(lo, hi):
    """Return the sum as nested pairs, by the definition."""
    if hi - lo == 1:
        return lo
    power = 1
    while 2 * power < hi - lo:
        power *= 2
    return (expression(lo, lo + power), expression(lo + power, hi))


def folded(nodes, leaves):
    values = [expression(*node) for node in nodes]
    rest, merges = fold(dict(enumerate(nodes)), leaves)
    for into, from_ in merges:
        values[into] = (values[into], values[from_])
    return list(rest.values()), values[0]


@given(st.integers(1, 300))
def test_folding_all_leaves_adds_in_the_order_of_the_definition(leaves):
    rest, value = folded([TreeNode(i, i + 1) for i in range(leaves)], leaves)
    assert rest == [TreeNode(0, leaves)]
    assert value == expression(0, leaves)


@given(st.integers(1, 200), st.integers(1, 50))
def test_folding_the_tree_nodes_of_any_number_of_ranks_gives_the_same_expression(leaves, ranks):
    held = [node for shard in contiguous_shards(leaves, ranks) for node in maximal_nodes(shard, leaves)]
    rest, value = folded(held, leaves)
    assert rest == [TreeNode(0, leaves)]
    assert value == expression(0, leaves)


@pytest.mark.parametrize("seed", range(20))
def test_any_set_of_tree_nodes_gives_the_same_expression(seed):
    chance = random.Random(seed)
    leaves = chance.randrange(2, 100)

    def cut(lo, hi):
        tree = expression(lo, hi)
        if hi - lo == 1 or chance.random() < 0.3:
            return [TreeNode(lo, hi)]
        mid = lo + sum(1 for _ in iter_leaves(tree[0]))
        return cut(lo, mid) + cut(mid, hi)

    def iter_leaves(tree):
        if isinstance(tree, int):
            yield tree
        else:
            for part in tree:
                yield from iter_leaves(part)

    assert folded(cut(0, leaves), leaves) == ([TreeNode(0, leaves)], expression(0, leaves))


@given(st.integers(1, 300), st.integers(1, 40))
def test_a_rank_keeps_few_partial_sums(leaves, ranks):
    for shard in contiguous_shards(leaves, ranks):
        assert len(maximal_nodes(shard, leaves)) <= max(1, 2 * len(shard).bit_length())


@given(st.integers(1, 300), st.integers(1, 40))
def test_every_leaf_is_dealt_once_and_loads_differ_by_at_most_one(leaves, ranks):
    shards = contiguous_shards(leaves, ranks)
    assert [leaf for shard in shards for leaf in shard] == list(range(leaves))
    lengths = [len(shard) for shard in shards]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(2, 200))
def test_siblings_are_the_two_halves_of_a_tree_node_and_nothing_else(leaves):
    pairs = set()

    def collect(lo, hi):
        if hi - lo > 1:
            mid = lo + 2 ** ((hi - lo - 1).bit_length() - 1)
            pairs.add((TreeNode(lo, mid), TreeNode(mid, hi)))
            collect(lo, mid)
            collect(mid, hi)

    collect(0, leaves)
    nodes = {node for pair in pairs for node in pair}
    found = {
        (left, right) for left in nodes for right in nodes if left.hi == right.lo and are_siblings(left, right, leaves)
    }
    assert found == pairs
