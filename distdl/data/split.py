"""The split: the rows of the training, validation and test part. Pure index arithmetic, the same on every rank.

A row is an index into the whole dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.errors import UserError
from distdl.rng import Key

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of each part, ascending. Every row of the dataset is in exactly one part."""

    training: Rows
    validation: Rows
    test: Rows

    @classmethod
    def training_only(cls, rows: Rows) -> Split:
        """Return a split whose validation and test parts are empty."""
        return cls(rows, rows[:0], rows[:0])


def split(labels: NDArray[Any], test_start: int | None, key: Key) -> Split:
    """Split the rows of a dataset with these labels (N, ...).

    - If the dataset has its own test part, that part starts at row `test_start`. A tenth of the other rows (rounded
      down), drawn by the seed, is the validation part.
    - Otherwise each class is split by itself: 15 % validation, 15 % test (both rounded to the nearest, halves up),
      drawn by the seed; the rest is for training. Samples with a label for each pixel, or with numbers, count as one
      class.

    Raises `UserError` if a part would be empty.

    >>> parts = split(np.zeros(20, np.int64), None, Key(0))
    >>> len(parts.training), len(parts.validation), len(parts.test)
    (14, 3, 3)
    """
    classes = labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)
    parts = _stratified(classes, key) if test_start is None else _with_own_test(len(labels), test_start, key)
    for name, rows in (("training", parts.training), ("validation", parts.validation), ("test", parts.test)):
        if not rows.size:
            whole = f"{len(labels)} samples" + ("" if test_start is None else f", the test part from row {test_start}")
            raise UserError(
                f"the {name} part would be empty: the dataset has {whole}; "
                "expected enough for training, validation and test; give a larger dataset"
            )
    return parts


def _with_own_test(count: int, test_start: int, key: Key) -> Split:
    shuffled = key.of("split").permutation(test_start)
    validation_count = test_start // 10
    return Split(
        training=np.sort(shuffled[validation_count:]),
        validation=np.sort(shuffled[:validation_count]),
        test=np.arange(test_start, count, dtype=np.int64),
    )


def _stratified(labels: NDArray[Any], key: Key) -> Split:
    training, validation, test = [], [], []
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label).astype(np.int64, copy=False)
        shuffled = rows[key.of("split", label).permutation(rows.size)]
        share = (15 * rows.size + 50) // 100
        validation.append(shuffled[:share])
        test.append(shuffled[share : 2 * share])
        training.append(shuffled[2 * share :])
    return Split(_ascending(training), _ascending(validation), _ascending(test))


def _ascending(of_each_class: list[Rows]) -> Rows:
    return np.sort(np.concatenate([np.empty(0, np.int64), *of_each_class]))
