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
    test_start = data.draw(st.none() | st.integers(19, len(labels) - 1))
    validation_start = data.draw(st.none() | st.integers(16, (test_start or len(labels)) - 1))
    parts = parts_of(split(labels, test_start, Key(seed), validation_start=validation_start))
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


@given(labels=labels_of_some_rows, seed=seeds, data=st.data())
def test_an_own_validation_part_is_kept_and_the_test_part_is_drawn_from_the_training_rows(labels, seed, data):
    start = data.draw(st.integers(20, len(labels)))
    labels = np.append(labels, [0, 1, 2])
    result = split(labels, None, Key(seed), validation_start=start)
    np.testing.assert_array_equal(result.validation, np.arange(start, len(labels)))
    for label, count in zip(*np.unique(labels[:start], return_counts=True), strict=True):
        assert abs(np.sum(labels[result.test] == label) - 0.15 * count) <= 0.5
    start, test_start = len(labels) - 2, len(labels) - 1
    both = split(labels, test_start, Key(seed), validation_start=start)
    np.testing.assert_array_equal(both.training, np.arange(start))
    assert (both.validation.tolist(), both.test.tolist()) == ([start], [test_start])


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=seeds,
    percents=st.tuples(st.integers(1, 50), st.integers(1, 49)),
    own_test=st.booleans(),
)
def test_every_class_keeps_a_training_row_and_its_share_of_each_part(sizes, seed, percents, own_test):
    labels = Key(seed).of("labels").permutation(sum(sizes))
    labels = np.repeat(np.arange(len(sizes)), sizes)[labels]
    shares = (percents[0] / 100, None if own_test else percents[1] / 100)
    start, with_test = (len(labels), np.append(labels, 0)) if own_test else (None, labels)
    try:
        result = split(with_test, start, Key(seed), shares=shares)
    except UserError:
        return  # a part would be empty
    assert set(labels[result.training]) == set(range(len(sizes)))
    drawn = min(percents[0] * len(labels) // 100, len(labels) - len(sizes))
    for label, size in enumerate(sizes):
        of_validation = np.sum(labels[result.validation] == label)
        if not own_test:
            assert of_validation == min((percents[0] * size + 50) // 100, size - 1)
        elif len(set(sizes)) == 1:
            assert abs(of_validation - drawn / len(sizes)) < 1
    assert not own_test or len(result.validation) == drawn


def test_no_class_loses_all_its_training_rows_beside_an_own_test_part():
    """A tenth of two rows for each of 30 classes: drawn from all rows together, 61 of 200 seeds lose a class."""
    labels = np.concatenate([np.repeat(np.arange(30), 2), np.arange(30)])

    def seeds_that_lose_a_class(**rule):
        return sum(len(set(labels[split(labels, 60, Key(seed), **rule).training])) < 30 for seed in range(200))

    assert (seeds_that_lose_a_class(), seeds_that_lose_a_class(stratified=False)) == (0, 61)


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
