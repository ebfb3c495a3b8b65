"""The split: the rows of the training, validation and test part. Pure index arithmetic, the same on every rank.

A row is an index into the whole dataset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.errors import UserError
from distdl.rng import Key

Rows = NDArray[np.int64]
#: The shares of the validation and the test part that the user gives; None: the default.
Shares = tuple[float | None, float | None]
DEFAULT_SHARE = 0.15


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


def split(
    labels: NDArray[Any],
    test_start: int | None,
    key: Key,
    *,
    validation_start: int | None = None,
    shares: Shares = (None, None),
    stratified: bool = True,
) -> Split:
    """Split the rows of a dataset with these labels (N, ...).

    - The dataset's own parts are kept: validation from row `validation_start`, then test from row `test_start`.
    - If it has its own test part alone, a tenth of the other rows (rounded down) is the validation part.
    - Other missing parts get 15 % of each class (rounded to the nearest, halves up). The rest is for training.
    - `shares` replaces these shares. The seed draws the rows.

    Every class keeps its share of each part, and at least one row for training. Samples with a label for each pixel, or
    with numbers, count as one class. `stratified=False` ignores the classes, as earlier versions did beside an own test
    part.

    Raises `UserError` if a part would be empty.

    >>> parts = split(np.zeros(20, np.int64), None, Key(0))
    >>> len(parts.training), len(parts.validation), len(parts.test)
    (14, 3, 3)
    """
    count, own = len(labels), {"validation": validation_start, "test": test_start}
    test_from = count if test_start is None else test_start
    own_from = test_from if validation_start is None else validation_start
    classes = labels[:own_from] if labels.ndim == 1 and stratified else np.zeros(own_from, np.int64)
    if test_start is not None and validation_start is None:
        drawn = _drawn_beside_test(classes, 0.1 if shares[0] is None else shares[0], key)
    else:
        drawn = _drawn_by_class(
            classes, [share if start is None else 0 for start, share in zip(own.values(), shares, strict=True)], key
        )
    parts = Split(
        drawn.training,
        np.concatenate([drawn.validation, np.arange(own_from, test_from, dtype=np.int64)]),
        np.concatenate([drawn.test, np.arange(test_from, count, dtype=np.int64)]),
    )
    for name, rows in (("training", parts.training), ("validation", parts.validation), ("test", parts.test)):
        if not rows.size:
            whole = f"{count} samples" + "".join(f", the {n} part from row {own[n]}" for n in own if own[n] is not None)
            raise UserError(
                f"the {name} part would be empty: the dataset has {whole}; "
                "expected enough for training, validation and test; give a larger dataset, or other shares"
            )
    return parts


def _drawn_beside_test(classes: NDArray[Any], share: float, key: Key) -> Split:
    """Draw the validation part of a dataset with its own test part.

    Row r of the m shuffled rows of a class is drawn in the order of (r + 1/2) / m (the method of Sainte-Lague). So each
    class gets its share, and the sum is exact. The rows of a single class are drawn in the order of the permutation.
    """
    shuffled = key.of("split").permutation(classes.size)
    _, of_class, sizes = np.unique(classes[shuffled], return_inverse=True, return_counts=True)
    rank = np.empty(classes.size, np.int64)
    rank[np.argsort(of_class, kind="stable")] = np.concatenate([np.arange(0), *map(np.arange, sizes)])
    is_last = rank == sizes[of_class] - 1
    order = np.argsort(np.where(is_last, 1, (rank + 0.5) / sizes[of_class]), kind="stable")
    drawn = min(math.floor(Fraction(str(share)) * classes.size), classes.size - sizes.size)
    return Split(np.sort(shuffled[order[drawn:]]), np.sort(shuffled[order[:drawn]]), np.empty(0, np.int64))


def _drawn_by_class(classes: NDArray[Any], shares: Sequence[float | None], key: Key) -> Split:
    """Draw the validation and the test part from each class by itself."""
    exact = [Fraction(str(DEFAULT_SHARE if share is None else share)) for share in shares]
    training, validation, test = [], [], []
    for label in np.unique(classes).tolist():
        rows = np.flatnonzero(classes == label).astype(np.int64, copy=False)
        shuffled = rows[key.of("split", label).permutation(rows.size)]
        of_validation, of_test = (math.floor(share * rows.size + Fraction(1, 2)) for share in exact)
        of_validation = min(of_validation, rows.size - 1)
        of_test = min(of_test, rows.size - 1 - of_validation)
        validation.append(shuffled[:of_validation])
        test.append(shuffled[of_validation : of_validation + of_test])
        training.append(shuffled[of_validation + of_test :])
    return Split(_ascending(training), _ascending(validation), _ascending(test))


def _ascending(of_each_class: list[Rows]) -> Rows:
    return np.sort(np.concatenate([np.empty(0, np.int64), *of_each_class]))
