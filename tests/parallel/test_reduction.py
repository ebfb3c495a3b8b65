"""The reduction gives the bits of the plain sum in the canonical order, on any number of ranks."""

import itertools
import os
import random
import time
import tracemalloc

import numpy as np
import pytest
from pretended_ranks import Rank, World

from distdl.errors import UserError
from distdl.parallel import REDUCTIONS, Field, Layout, OneProcess, contiguous_shards, deal, loads_by_speed
from distdl.parallel import record as record_module
from distdl.parallel import reduction as reduction_module
from distdl.parallel import shared as shared_module

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
    """Add all leaves by the definition of the tree."""
    if len(leaves) == 1:
        return leaves[0]
    power = 2 ** ((len(leaves) - 1).bit_length() - 1)
    left, right = oracle(leaves[:power]), oracle(leaves[power:])
    return {name: left[name] + right[name] for name in left}


def assert_sums_are_exact(communicator, layout, shards, *, steps=2, reduction=None):
    reduction = reduction or REDUCTIONS["tree"](communicator, layout)
    leaves = sum(map(len, shards))
    for step in range(steps):  # buffers are reused, and must not keep old values
        reduction.begin(shards)
        for index in shards[communicator.rank]:
            values = leaf(layout, 1000 * step + index)
            reduction.add(index, values)
            for array in values.values():
                array[...] = 0  # the caller may overwrite its arrays
        total = reduction.total()
        expected = oracle([leaf(layout, 1000 * step + index) for index in range(leaves)])
        for name, array in expected.items():
            assert total[name].tobytes() == array.tobytes(), (name, leaves, shards)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LENGTHS)
def test_one_process_adds_in_the_canonical_order(layout):
    for leaves in (1, 2, 3, 7, 8, 13, 32):
        assert_sums_are_exact(OneProcess(), layout, contiguous_shards(leaves, 1))


def test_the_order_of_additions_shows_in_the_bits():
    """The oracle can fail: a running sum has other bits."""
    leaves = [leaf(LAYOUTS[-1], index) for index in range(8)]
    running = sum((values["gradient"] for values in leaves[1:]), leaves[0]["gradient"])
    assert running.tobytes() != oracle(leaves)["gradient"].tobytes()


@pytest.fixture
def shared_memory(shared_tmp_path, monkeypatch):
    """Replace the kernel's shared memory by a folder, which holds no files of other jobs."""
    monkeypatch.setattr(shared_module, "SHARED_MEMORY", shared_tmp_path)
    return shared_tmp_path


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
            for leaves in (1, 2, 5, 8, 13):  # also fewer leaves than ranks: some shards are empty
                assert_sums_are_exact(part, layout, contiguous_shards(leaves, part.size))


def simulated_hosts(part):
    """Return ways to spread ranks over simulated hosts: the host number of each rank, by name."""
    size = part.size
    return {
        "one host": [0] * size,
        "a host each": list(range(size)),
        "pairs": [rank // 2 for rank in range(size)],
        "one alone": [0] + [1] * (size - 1),
        "round robin": [rank % 2 for rank in range(size)],
    }


def shuffled_shards(chance, leaves, ranks):
    cuts = sorted(chance.randrange(leaves + 1) for _ in range(ranks - 1))
    shards = [range(a, b) for a, b in itertools.pairwise([0, *cuts, leaves])]
    chance.shuffle(shards)  # the order of the owners does not matter either
    return shards


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("small_bytes", [0, 2**20], ids=["large", "small"])
def test_any_spread_over_hosts_gives_the_same_bits(communicator, small_bytes, shared_memory, monkeypatch):
    """Uneven, shuffled and empty shards, more and fewer partial sums than before, over simulated hosts."""
    monkeypatch.setattr(reduction_module, "SMALL_BYTES", small_bytes)
    monkeypatch.setattr(record_module, "BLOCK_BYTES", 1024)
    for part in sub_worlds(communicator, range(2, 9)):
        chance = random.Random(part.size)
        for host_of in simulated_hosts(part).values():
            reduction = REDUCTIONS["tree"](part, LAYOUTS[-1], host=part.split(host_of[part.rank]))
            for leaves in (1, 5, 13):
                shards = shuffled_shards(chance, leaves, part.size)
                assert_sums_are_exact(part, LAYOUTS[-1], shards, reduction=reduction, steps=1)
            assert_sums_are_exact(part, LAYOUTS[-1], contiguous_shards(8, part.size), reduction=reduction)
    communicator.barrier()
    assert not list(shared_memory.iterdir())


class Host(Rank):
    """A rank on a host of its own, simulated by a thread."""

    def alltoallv(self, send, send_spans, receive, receive_spans):
        sent = self._exchanged([send[start : start + length].copy() for start, length in send_spans])
        for of_host, (start, length) in zip(sent, receive_spans, strict=True):
            assert of_host[self.rank].size == length
            receive[start : start + length] = of_host[self.rank]


@pytest.mark.parametrize("small_bytes", [0, 2**30], ids=["by the leaders", "on every rank"])
@pytest.mark.parametrize("size", [2, 3])
def test_simulated_hosts_give_the_same_bits(size, small_bytes, monkeypatch):
    monkeypatch.setattr(reduction_module, "SMALL_BYTES", small_bytes)
    world, layout = World([0.0] * size), LAYOUTS[-1]
    world.ranks = [Host(rank, world) for rank in range(size)]
    dealings = [contiguous_shards(leaves, size) for leaves in (2, 5, 8)]
    dealings.append([tuple(range(rank, 7, size)) for rank in range(size)])

    def work(rank):
        reduction = REDUCTIONS["tree"](rank, layout, host=OneProcess())
        for shards in dealings:
            assert_sums_are_exact(rank, layout, shards, reduction=reduction)

    world.run(work)


@pytest.mark.mpi(min_size=2)
def test_uneven_shards_and_empty_ones_give_the_same_bits(communicator):
    chance = random.Random(7)
    reduction = REDUCTIONS["tree"](communicator, LAYOUTS[-1])
    for _ in range(20):
        leaves = chance.randrange(1, 20)
        shards = shuffled_shards(chance, leaves, communicator.size)
        assert_sums_are_exact(communicator, LAYOUTS[-1], shards, reduction=reduction, steps=1)


@pytest.mark.mpi(min_size=2)
def test_shards_dealt_by_speed_give_the_same_bits(communicator):
    reduction = REDUCTIONS["tree"](communicator, LAYOUTS[-1])
    for leaves, seed in itertools.product((1, 2, 5, 8, 13, 31, 64), range(3)):
        chance = random.Random(seed)
        speeds = tuple(10 ** chance.uniform(-1, 1) for _ in range(communicator.size))
        shards = deal(loads_by_speed(leaves, speeds))
        assert_sums_are_exact(communicator, LAYOUTS[-1], shards, reduction=reduction, steps=1)


@pytest.mark.mpi(min_size=2)
def test_dropped_schedules_are_created_again(communicator, monkeypatch):
    monkeypatch.setattr(reduction_module, "SCHEDULES_KEPT", 2)
    reduction = REDUCTIONS["tree"](communicator, LAYOUTS[-1])
    for leaves in (8, 5, 3, 8, 5, 13):
        shards = contiguous_shards(leaves, communicator.size)
        assert_sums_are_exact(communicator, LAYOUTS[-1], shards, reduction=reduction, steps=1)


def test_the_memory_for_schedules_is_bounded():
    """Each step deals its shards in a new way; without a limit, each would keep a schedule."""
    reduction = REDUCTIONS["tree"](OneProcess(), LAYOUTS[0])
    kept = set()
    for leaves in range(300, 0, -1):
        reduction.begin(contiguous_shards(leaves, 1))
        kept.add(len(reduction._schedules))
    assert max(kept) == reduction_module.SCHEDULES_KEPT


@pytest.mark.mpi(min_size=2)
def test_leaves_dealt_at_random_give_the_same_bits(communicator):
    """A shard may be any set of leaves, and a reduction may get other shards in each step."""
    chance = random.Random(3)
    reduction = REDUCTIONS["tree"](communicator, LAYOUTS[-1])
    for _ in range(20):
        owners = [chance.randrange(communicator.size) for _ in range(chance.randrange(1, 20))]
        shards = [tuple(i for i, owner in enumerate(owners) if owner == r) for r in range(communicator.size)]
        assert_sums_are_exact(communicator, LAYOUTS[-1], shards, reduction=reduction, steps=1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("spread", ["one host", "a host each", "pairs"])
def test_a_slow_reader_still_sees_its_own_total(communicator, spread):
    """A rank's total stays valid until that rank begins the next step, however far the others are."""
    host = communicator.split(simulated_hosts(communicator)[spread][communicator.rank])
    layout = Layout([Field("gradient", "f4", 100_000)])
    reduction = REDUCTIONS["tree"](communicator, layout, host=host)
    shards = contiguous_shards(2 * communicator.size, communicator.size)
    for step in range(6):
        reduction.begin(shards)
        for index in shards[communicator.rank]:
            reduction.add(index, {"gradient": np.full(100_000, step * 100 + index, "f4")})
        total = reduction.total()
        if step % communicator.size == communicator.rank:
            time.sleep(0.02)  # meanwhile the others fill their slots for the next step
        assert (total["gradient"] == sum(step * 100 + index for index in range(2 * communicator.size))).all()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", sorted(REDUCTIONS))
def test_the_total_that_others_see_is_read_only(communicator, name):
    reduction = REDUCTIONS[name](communicator, LAYOUTS[-1])
    shards = contiguous_shards(8, communicator.size)
    reduction.begin(shards)
    for index in shards[communicator.rank]:
        reduction.add(index, leaf(LAYOUTS[-1], index))
    with pytest.raises(ValueError, match="read-only"):
        reduction.total()["gradient"] /= 2


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("spread", ["one host", "a host each", "pairs"])
def test_a_steady_step_allocates_almost_nothing(communicator, spread):
    host = communicator.split(simulated_hosts(communicator)[spread][communicator.rank])
    layout = Layout([Field("gradient", "f4", 1_000_000)])
    gradient = np.ones(1_000_000, "f4")
    reduction = REDUCTIONS["tree"](communicator, layout, host=host)
    dealings = [contiguous_shards(leaves, communicator.size) for leaves in (8, 5)]

    def step():
        for shards in dealings:
            reduction.begin(shards)
            for index in shards[communicator.rank]:
                reduction.add(index, {"gradient": gradient})
            reduction.total()

    step()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(3):
            step()
        assert tracemalloc.get_traced_memory()[1] - before < 65536
    finally:
        tracemalloc.stop()


@pytest.mark.mpi(min_size=2)
def test_no_room_for_the_partial_sums_is_an_error_on_every_rank(communicator, shared_memory, monkeypatch):
    def full(handle, start, length):
        raise OSError(28, "No space left on device")

    reduction = REDUCTIONS["tree"](communicator, LAYOUTS[-1])
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for .* MB of partial sums.*No space left on device") as caught:
        reduction.begin(contiguous_shards(8, communicator.size))
    assert caught.value.agreed
    assert not list(shared_memory.iterdir())


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


@pytest.mark.parametrize("shard", [range(4), (0, 1, 4, 6, 7), ()], ids=str)
def test_allreduce_gets_the_sum_of_all_tree_nodes_of_a_rank(shard, monkeypatch):
    """The other ranks of this simulated job have zeros."""
    layout, others, sent = LAYOUTS[-1], tuple(i for i in range(8) if i not in shard), []
    communicator = OneProcess()
    monkeypatch.setattr(communicator, "allreduce", lambda array: sent.append(array.copy()))
    reduction = REDUCTIONS["allreduce"](communicator, layout)
    for shards in ([range(8)], [shard, others]):  # buffers are reused
        reduction.begin(shards)
        for index in shards[0]:
            reduction.add(index, leaf(layout, index))
        sent.clear()
        total = reduction.total()
    expected = [leaf(layout, index) for index in shard]
    assert total["counts"].tolist() == sum((one["counts"] for one in expected), np.zeros(3, np.int64)).tolist()
    gradient = sum((one["gradient"] for one in expected), np.zeros(LENGTHS[-1]))
    np.testing.assert_allclose(total["gradient"], gradient, rtol=1e-4, atol=1e-2)
    assert [one.tobytes() for one in sent] == [field.tobytes() for field in total.values()]


def test_shards_that_miss_a_leaf_are_a_defect():
    reduction = REDUCTIONS["tree"](OneProcess(), LAYOUTS[0])
    with pytest.raises(AssertionError, match="once each"):
        reduction.begin([range(1, 3)])


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
