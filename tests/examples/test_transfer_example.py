"""The example of transfer learning: the images of each network, and the tensors that the second one takes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from distdl.data import sources, split
from distdl.rng import Key

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = np.arange(40)
#: The pixel of an image is its row.
DIGITS = sources.Dataset("rows", ROWS.astype(np.float32).reshape(-1, 1, 1, 1), ROWS % 10, 10, None)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason="the figure needs matplotlib: pip install 'distdl-mpi[plots]'",
)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return __import__("chapter_8_transfer")


def rows_of(dataset):
    return dataset.images[:, 0, 0, 0].astype(int).tolist()


@pytest.mark.parametrize("test_start", [None, 30])
def test_the_second_network_trains_on_a_few_images_of_its_digits_and_is_tested_on_others(example, test_start):
    data = sources.Dataset("rows", DIGITS.images, DIGITS.labels, 10, test_start)
    first = example.of_digits(data, range(5)).checked()
    assert rows_of(first) == [row for row in ROWS if row % 10 < 5]
    assert (first.classes, first.test_start) == (5, None if test_start is None else 15)
    few = example.with_few(example.of_digits(data, range(5, 10)), 11, Key(0)).checked()
    parts = split.split(few.labels, few.test_start, Key(0))
    assert (few.classes, len(parts.training), len(parts.validation)) == (10, 10, 1)
    assert few.labels.tolist() == [row % 10 for row in rows_of(few)]
    rows, theirs = np.array(rows_of(few)), [row for row in ROWS if row % 10 >= 5]
    if test_start is None:
        assert sorted(rows) == theirs
    else:
        assert rows[parts.test].tolist() == [row for row in theirs if row >= 30]
        assert rows[:11].max() < 30
    assert len(set(rows)) == len(rows)
    other = example.with_few(example.of_digits(data, range(5, 10)), 11, Key(1))
    assert rows_of(other)[:11] != rows_of(few)[:11], "another seed draws other images"
