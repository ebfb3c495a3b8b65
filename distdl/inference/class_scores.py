"""Scores of each class from a confusion matrix, and of each number of a regression.

A score is None if its definition divides by zero. K classes, N samples, D numbers of a sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClassScore:
    """The scores of a class k; ``C[i, j]`` counts the samples of class i that are predicted as class j."""

    samples: int
    """``sum over j of C[k, j]``, also called the support."""
    precision: float | None
    """``C[k, k] / sum over i of C[i, k]``: the share of correct ones among the predictions of this class."""
    recall: float | None
    """``C[k, k] / sum over j of C[k, j]``: the share of the samples of this class that are found."""
    f1: float | None
    """``2 C[k, k] / (sum over i of C[i, k] + sum over j of C[k, j])``: the harmonic mean of both."""


@dataclass(frozen=True)
class NumberScore:
    """The scores of a number that a regression predicts."""

    mean_absolute_error: float
    r2: float | None
    """``1 - Σ(y - t)² / Σ(t - mean of t)²``: 1 is exact, 0 is no better than the mean of all targets."""


def class_scores(confusion: NDArray[np.int64]) -> list[ClassScore]:
    """Return the scores of each class of a confusion matrix (K, K).

    >>> class_scores(np.array([[3, 1], [0, 4]]))[0]
    ClassScore(samples=4, precision=1.0, recall=0.75, f1=0.8571428571428571)
    """
    correct, actual, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    counts = zip(correct.tolist(), actual.tolist(), predicted.tolist(), strict=True)
    return [ClassScore(a, _ratio(c, p), _ratio(c, a), _ratio(2 * c, a + p)) for c, a, p in counts]


def balanced_accuracy(scores: Iterable[ClassScore]) -> float | None:
    """Return the mean of the recalls of the classes that have samples. So a rare class counts as much as a common."""
    return _mean(one.recall for one in scores)


def macro_f1(scores: Iterable[ClassScore]) -> float | None:
    """Return the mean of the F1 scores of the classes that have samples or predictions."""
    return _mean(one.f1 for one in scores)


def number_scores(labels: NDArray[np.float32], predictions: NDArray[np.float64]) -> list[NumberScore]:
    """Return the scores of each number, for targets and predictions (N, D)."""
    targets = labels.astype(np.float64)
    errors = predictions - targets
    absolute = np.abs(errors).mean(axis=0)
    residual, total = (errors**2).sum(axis=0), ((targets - targets.mean(axis=0)) ** 2).sum(axis=0)
    return [
        NumberScore(float(a), float(1 - r / t) if t > 0 else None)
        for a, r, t in zip(absolute, residual, total, strict=True)
    ]


def mean_r2(scores: Iterable[NumberScore]) -> float | None:
    """Return the mean of R² over the numbers that have one."""
    return _mean(one.r2 for one in scores)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
