"""The reduction gives the bits of the plainest sum in the canonical order, on any number of ranks."""

import itertools
import random

import numpy as np
import pytest

from distdl.parallel import REDUCTIONS, Field, Layout, OneProcess, contiguous_shards, deal, share

LENGTHS = (1, 5, 16, 17, 1000)
LAYOUTS = [Layout([Field("gradient", "f4", n), Field("loss_sum", "f8", 1), Field("counts", "i8", 3)]) for n in LENGTHS]


def leaf(layout, index):
    generator = np.random.default_rng(index)
    return {
        "gradient": (generator.standard_normal(layout.fields[0].length) * 10.0 ** generator.integers(-4, 4)).astype(
            "f4"
        ),
        "loss_sum": generator.standard_normal(1) * 1e3,
        "counts": generator.integers(0, 100, 3),
    }


def oracle(leaves):
    """Gather all leaves, then add them as the definition of the tree says."""
    if len(leaves) == 1:
        return leaves[0]
    power = 2 ** ((len(leaves) - 1).bit_length() - 1)
    left, right = oracle(leaves[:power]), oracle(leaves[power:])
    return {name: left[name] + right[name] for name in left}


def assert_sums_are_exact(communicator, layout, shards, *, steps=2, reduction=None):
    reduction = reduction or REDUCTIONS["tree"](communicator, layout)
    leaves = sum(map(len, shards))
    for step in range(steps):  # buffers are reused, and must not remember
        reduction.begin(shards)
        for index in shards[communicator.rank]:
            values = leaf(layout, 1000 * step + index)
            reduction.add(index, values)
            for array in values.values():
                array[...] = 0  # the caller may reuse what it gave
        total = reduction.total()
        expected = oracle([leaf(layout, 1000 * step + index) for index in range(leaves)])
        for name, array in expected.items():
            assert total[name].tobytes() == array.tobytes(), (name, leaves, shards)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LENGTHS)
def test_one_process_adds_in_the_canonical_order(layout):
    for leaves in (1, 2, 3, 7, 8, 13, 32):
        assert_sums_are_exact(OneProcess(), layout, contiguous_shards(leaves, 1))


def test_the_order_of_additions_shows_in_the_bits():
    """The oracle can fail: a plain running sum has other bits."""
    leaves = [leaf(LAYOUTS[-1], index) for index in range(8)]
    running = sum((values["gradient"] for values in leaves[1:]), leaves[0]["gradient"])
    assert running.tobytes() != oracle(leaves)["gradient"].tobytes()


def sub_worlds(communicator, sizes):
    for size in sizes:
        if size <= communicator.size:
            part = communicator.split(0 if communicator.rank < size else None)
            if part is not None:
                yield part


@pytest.mark.mpi(min_size=2)
def test_any_number_of_ranks_gives_the_bits_of_gathering_all_leaves(communicator):
    for part in sub_worlds(communicator, range(1, 9)):
        for layout in LAYOUTS:
            for leaves in (1, 2, 5, 8, 13):  # fewer leaves than ranks too: their shards are empty
                assert_sums_are_exact(part, layout, contiguous_shards(leaves, part.size))


@pytest.mark.mpi(min_size=2)
def test_uneven_shards_and_empty_ones_give_the_same_bits(communicator):
    chance = random.Random(7)
    reduction = REDUCTIONS["tree"](communicator, LAYOUTS[-1])
    for _ in range(20):
        leaves = chance.randrange(1, 20)
        cuts = sorted(chance.randrange(leaves + 1) for _ in range(communicator.size - 1))
        shards = [range(a, b) for a, b in zip([0, *cuts], [*cuts, leaves], strict=True)]
        chance.shuffle(shards)  # who computes what does not matter either
        assert_sums_are_exact(communicator, LAYOUTS[-1], shards, reduction=reduction, steps=1)


@pytest.mark.mpi(min_size=2)
def test_shards_dealt_by_speed_give_the_same_bits(communicator):
    reduction = REDUCTIONS["tree"](communicator, LAYOUTS[-1])
    for leaves, seed in itertools.product((1, 2, 5, 8, 13, 31, 64), range(3)):
        chance = random.Random(seed)
        speeds = tuple(10 ** chance.uniform(-1, 1) for _ in range(communicator.size))
        shards = deal(share(leaves, speeds))
        assert_sums_are_exact(communicator, LAYOUTS[-1], shards, reduction=reduction, steps=1)


@pytest.mark.mpi(min_size=2)
def test_leaves_dealt_by_chance_give_the_same_bits(communicator):
    """Any sets will do; and one reduction may be given other shards in each step."""
    chance = random.Random(3)
    reduction = REDUCTIONS["tree"](communicator, LAYOUTS[-1])
    for _ in range(20):
        owners = [chance.randrange(communicator.size) for _ in range(chance.randrange(1, 20))]
        shards = [tuple(i for i, owner in enumerate(owners) if owner == r) for r in range(communicator.size)]
        assert_sums_are_exact(communicator, LAYOUTS[-1], shards, reduction=reduction, steps=1)


@pytest.mark.mpi(min_size=2)
def test_allreduce_gives_the_same_sum_up_to_rounding(communicator):
    for leaves in (1, 5, 8):
        layout = LAYOUTS[-1]
        shards = contiguous_shards(leaves, communicator.size)
        reduction = REDUCTIONS["allreduce"](communicator, layout)
        for _ in range(2):
            reduction.begin(shards)
            for index in shards[communicator.rank]:
                reduction.add(index, leaf(layout, index))
            total = reduction.total()
            expected = oracle([leaf(layout, index) for index in range(leaves)])
            assert (total["counts"] == expected["counts"]).all()
            np.testing.assert_allclose(total["gradient"], expected["gradient"], rtol=1e-4, atol=1e-2)


def test_shards_that_miss_a_leaf_are_a_defect():
    reduction = REDUCTIONS["tree"](OneProcess(), LAYOUTS[0])
    reduction.begin([range(1, 3)])
    reduction.add(1, leaf(LAYOUTS[0], 1))
    reduction.add(2, leaf(LAYOUTS[0], 2))
    with pytest.raises(AssertionError, match="once each"):
        reduction.total()


@pytest.mark.parametrize("layout", LAYOUTS, ids=LENGTHS)
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 40])
def test_the_owners_slices_cover_each_byte_once(layout, parts):
    cuts = layout.cuts(parts)
    assert cuts[0] == 0
    assert cuts[-1] == layout.nbytes
    assert cuts == sorted(cuts)
    for lo, hi in itertools.pairwise(cuts):
        pieces = layout.pieces(lo, hi)
        assert [piece[0] for piece in pieces] == [0, *[piece[1] for piece in pieces]][: len(pieces)]
        assert (pieces[-1][1] if pieces else 0) == hi - lo
