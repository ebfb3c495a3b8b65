"""Scores of classes and numbers equal their definitions, written out in plain Python."""

import numpy as np
import pytest

from distdl.engine.pictures import confusion_matrix
from distdl.inference import class_scores
from distdl.inference.class_scores import ClassScore, NumberScore
from distdl.rng import Key


def plain_scores(labels, predictions, classes):
    """Return samples, precision, recall and F1 of each class, by counting pairs."""
    found = []
    for k in range(classes):
        pairs = list(zip(labels, predictions, strict=True))
        true = sum(1 for actual, predicted in pairs if actual == predicted == k)
        wrongly = sum(1 for actual, predicted in pairs if predicted == k != actual)
        missed = sum(1 for actual, predicted in pairs if actual == k != predicted)
        precision = true / (true + wrongly) if true + wrongly else None
        recall = true / (true + missed) if true + missed else None
        f1 = 2 * true / (2 * true + wrongly + missed) if true + wrongly + missed else None
        found.append(ClassScore(true + missed, precision, recall, f1))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_class_scores_equal_the_count_of_pairs(seed):
    """Class 4 is absent, and class 3 is never predicted."""
    labels, predictions = Key(seed).permutation(60) % 4, Key(seed + 100).permutation(60) % 3
    expected = plain_scores(labels.tolist(), predictions.tolist(), 5)
    found = class_scores.class_scores(confusion_matrix(labels, predictions, 5))
    assert found == expected
    assert found[3].precision is None
    assert found[4] == ClassScore(0, None, None, None)
    recalls = [one.recall for one in expected[:4]]
    assert class_scores.balanced_accuracy(found) == pytest.approx(sum(recalls) / 4)
    assert class_scores.macro_f1(found) == pytest.approx(sum(one.f1 for one in expected[:4]) / 4)


def test_known_values():
    """scikit-learn's documentation of f1_score, precision_score and balanced_accuracy_score has these examples."""
    actual, predicted = [0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1]
    found = class_scores.class_scores(confusion_matrix(np.array(actual), np.array(predicted), 3))
    assert class_scores.macro_f1(found) == pytest.approx(0.26, abs=0.01)
    assert [one.f1 for one in found] == pytest.approx([0.8, 0, 0])
    assert found[0].precision == pytest.approx(0.66, abs=0.01)
    actual, predicted = [0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1]
    found = class_scores.class_scores(confusion_matrix(np.array(actual), np.array(predicted), 2))
    assert class_scores.balanced_accuracy(found) == 0.625


def test_number_scores_equal_their_definitions():
    """scikit-learn's documentation of r2_score has the first column: 0.948…"""
    labels = np.array([[3, 1], [-0.5, 1], [2, 1], [7, 1]], np.float32)
    predictions = np.array([[2.5, 1], [0.0, 2], [2, 1], [8, 1]])
    first, constant = class_scores.number_scores(labels, predictions)
    mean = sum([3, -0.5, 2, 7]) / 4
    residual = 0.5**2 + 0.5**2 + 0 + 1**2
    total = sum((target - mean) ** 2 for target in (3, -0.5, 2, 7))
    assert first.r2 == pytest.approx(1 - residual / total)
    assert first.r2 == pytest.approx(0.948, abs=0.001)
    assert first.mean_absolute_error == pytest.approx(0.5)
    assert constant == NumberScore(0.25, None)
    assert class_scores.mean_r2([first, constant]) == first.r2
    assert class_scores.mean_r2([constant]) is None
