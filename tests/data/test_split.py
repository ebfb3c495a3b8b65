"""The rows of the training, validation and test part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.data.batch_order import epoch_order
from distdl.data.split import split
from distdl.errors import UserError
from distdl.rng import Key

# Of five classes in twenty rows at least one has four rows, enough for every part.
labels_of_some_rows = st.lists(st.integers(0, 4), min_size=20, max_size=300).map(np.array)
seeds = st.integers(0, 2**64 - 1)


def parts_of(result):
    return {"training": result.training, "validation": result.validation, "test": result.test}


def assert_same_split(one, other):
    for name, rows in parts_of(one).items():
        np.testing.assert_array_equal(rows, parts_of(other)[name])


@given(labels=labels_of_some_rows, seed=seeds, data=st.data())
def test_every_row_falls_in_exactly_one_part(labels, seed, data):
    test_start = data.draw(st.none() | st.integers(10, len(labels) - 1))
    parts = parts_of(split(labels, test_start, Key(seed)))
    assert all(rows.dtype == np.int64 and rows.size for rows in parts.values())
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(labels)))


@given(labels=labels_of_some_rows, seed=seeds)
def test_each_class_is_split_70_15_15(labels, seed):
    result = split(labels, None, Key(seed))
    for label in np.unique(labels):
        count = np.sum(labels == label)
        assert abs(np.sum(labels[result.validation] == label) - 0.15 * count) <= 0.5
        assert abs(np.sum(labels[result.test] == label) - 0.15 * count) <= 0.5


@given(labels=labels_of_some_rows, seed=seeds, data=st.data())
def test_an_own_test_part_is_kept_and_validation_is_a_tenth_of_the_rest(labels, seed, data):
    test_start = data.draw(st.integers(10, len(labels) - 1))
    result = split(labels, test_start, Key(seed))
    np.testing.assert_array_equal(result.test, np.arange(test_start, len(labels)))
    assert len(result.validation) == test_start // 10


@pytest.mark.parametrize("test_start", [None, 80])
def test_split_depends_on_the_seed_alone(test_start):
    labels = np.arange(100) % 5
    first = split(labels, test_start, Key(7))
    np.random.seed(1)  # noqa: NPY002  the global state must not matter
    assert_same_split(first, split(labels.astype(np.uint8), test_start, Key(7)))
    others = [split(labels, test_start, Key(seed)).validation.tolist() for seed in range(20)]
    assert len({tuple(rows) for rows in others}) == 20


def test_the_split_of_a_seed_never_changes():
    """Published receipts depend on these numbers."""
    stratified = split(np.arange(20) % 2, None, Key(0))
    assert stratified.validation.tolist() == [2, 5, 12, 15]
    assert stratified.test.tolist() == [1, 8, 14, 19]
    assert split(np.zeros(40), 30, Key(0)).validation.tolist() == [6, 10, 26]
    assert epoch_order(Key(0), 1, 8).tolist() == [2, 0, 7, 4, 1, 6, 5, 3]


@pytest.mark.parametrize(
    ("count", "test_start", "empty"),
    [
        (0, None, "training"),
        (3, None, "validation"),
        (10, 0, "training"),
        (10, 9, "validation"),
        (10, 10, "test"),
    ],
)
def test_a_part_that_would_be_empty_is_named(count, test_start, empty):
    with pytest.raises(UserError, match=f"the {empty} part would be empty") as caught:
        split(np.zeros(count, np.int64), test_start, Key(0))
    assert f"{count} samples" in str(caught.value)
    assert "\n" not in str(caught.value)
