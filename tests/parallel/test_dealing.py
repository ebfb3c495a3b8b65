"""Micro-batches are dealt by speed: for the earliest end, each of them once, in few partial sums."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.parallel.dealing import deal, loads_by_speed
from distdl.parallel.tree import contiguous_shards, maximal_nodes

LOADS = st.lists(st.integers(0, 60), min_size=1, max_size=12)
SPEEDS = st.lists(st.floats(0.01, 100), min_size=1, max_size=12).map(tuple)


def slowest(loads, speeds):
    return max(load / speed for load, speed in zip(loads, speeds, strict=True))


def all_loads(leaves, ranks):
    if ranks == 1:
        yield (leaves,)
        return
    for first in range(leaves + 1):
        for rest in all_loads(leaves - first, ranks - 1):
            yield (first, *rest)


@given(st.integers(0, 9), st.lists(st.floats(0.05, 20), min_size=1, max_size=4).map(tuple))
def test_no_other_loads_would_end_sooner(leaves, speeds):
    best = min(slowest(loads, speeds) for loads in all_loads(leaves, len(speeds)))
    assert slowest(loads_by_speed(leaves, speeds), speeds) == best


@given(st.integers(0, 300), SPEEDS)
def test_loads_add_up_and_a_faster_rank_never_gets_fewer(leaves, speeds):
    loads = loads_by_speed(leaves, speeds)
    assert sum(loads) == leaves
    for one, other in itertools.permutations(range(len(speeds)), 2):
        if speeds[one] > speeds[other] * (1 + 1e-9):  # closer speeds may be rounded to the same time
            assert loads[one] >= loads[other]


@given(st.integers(0, 300), st.integers(1, 40), st.floats(0.01, 100))
def test_equal_speeds_give_the_loads_of_contiguous_shards(leaves, ranks, speed):
    assert list(loads_by_speed(leaves, (speed,) * ranks)) == [len(shard) for shard in contiguous_shards(leaves, ranks)]


def test_loads_follow_the_speeds():
    assert loads_by_speed(12, (2.0, 1.0, 1.0)) == (6, 3, 3)
    assert loads_by_speed(100, (1.0, 1.0, 0.5)) == (40, 40, 20)


def test_a_speed_of_zero_is_a_defect():
    with pytest.raises(AssertionError, match="above 0"):
        loads_by_speed(8, (1.0, 0.0))


@given(LOADS)
def test_every_micro_batch_is_dealt_once_and_shards_have_the_given_lengths(loads):
    shards = deal(tuple(loads))
    assert [len(shard) for shard in shards] == loads
    assert all(list(shard) == sorted(shard) for shard in shards)
    assert sorted(leaf for shard in shards for leaf in shard) == list(range(sum(loads)))


@given(LOADS)
def test_a_rank_holds_one_tree_node_per_binary_digit_of_its_load(loads):
    leaves = sum(loads)
    for shard in deal(tuple(loads)):
        nodes = maximal_nodes(shard, leaves)
        blocks = [node.hi - node.lo for node in nodes if node.hi < leaves]
        last = sum(node.hi - node.lo for node in nodes if node.hi == leaves)
        assert sorted(blocks) == [1 << bit for bit in range(10) if (len(shard) - last) >> bit & 1]
        assert len(nodes) <= len(shard).bit_length() + 1


@given(st.integers(0, 7), st.data())
def test_no_dealing_of_a_power_of_two_of_micro_batches_has_fewer_tree_nodes(power, data):
    """Any sum of powers of two that gives a rank's load has at least this many terms."""
    leaves, loads = 2**power, []
    while sum(loads) < leaves:
        loads.append(data.draw(st.integers(1, leaves - sum(loads))))
    for load, shard in zip(loads, deal(tuple(loads)), strict=True):
        assert len(maximal_nodes(shard, leaves)) == load.bit_count()


def test_the_largest_blocks_go_first():
    assert deal((3, 4, 1)) == ((4, 5, 6), (0, 1, 2, 3), (7,))
    assert deal((0, 0)) == ((), ())
