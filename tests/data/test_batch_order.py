"""The order of samples: each epoch sees every sample exactly once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distdl.data.batch_order import batch_rows, epoch_order, micro_batch, micro_batch_count, steps_per_epoch
from distdl.data.split import split
from distdl.rng import Key

seeds = st.integers(0, 2**64 - 1)
sizes = st.integers(1, 60)


@given(seed=seeds, epoch=st.integers(0, 10**6), count=st.integers(1, 300), batch_size=sizes)
def test_each_epoch_sees_every_sample_exactly_once(seed, epoch, count, batch_size):
    order = epoch_order(Key(seed), epoch, count)
    assert order.dtype == np.int64
    steps = steps_per_epoch(count, batch_size)
    batches = [batch_rows(order, step, batch_size) for step in range(steps)]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (steps - 1)
    assert 1 <= len(batches[-1]) <= batch_size
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(count))


@given(count=st.integers(1, 300), micro_batch_size=sizes)
def test_micro_batches_cut_a_batch_into_contiguous_pieces(count, micro_batch_size):
    rows = np.arange(1000, 1000 + count)
    pieces = micro_batch_count(count, micro_batch_size)
    micro_batches = [micro_batch(rows, index, micro_batch_size) for index in range(pieces)]
    assert [len(piece) for piece in micro_batches[:-1]] == [micro_batch_size] * (pieces - 1)
    assert len(micro_batches[-1]) >= 1
    np.testing.assert_array_equal(np.concatenate(micro_batches), rows)


def test_order_depends_on_seed_and_epoch_alone():
    orders = {(seed, epoch): epoch_order(Key(seed), epoch, 50) for seed in range(4) for epoch in range(4)}
    for (seed, epoch), order in reversed(orders.items()):
        np.testing.assert_array_equal(order, epoch_order(Key(seed), epoch, 50))
    assert len({tuple(order.tolist()) for order in orders.values()}) == 16


def test_order_and_split_draw_from_different_streams():
    shuffled = epoch_order(Key(0), 0, 1000)
    assert set(split(np.zeros(1100), 1000, Key(0)).validation.tolist()) != set(shuffled[:100].tolist())
