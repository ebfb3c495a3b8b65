"""Settings and results are values: given by name, never changed, and compared without an error."""

from dataclasses import replace

import numpy as np
import pytest

from distdl.bench.settings import BenchSettings
from distdl.config import TrainConfig
from distdl.data import Dataset, PreparedDataset
from distdl.engine.summary import Summary
from distdl.inference.options import EvaluateOptions, ReportOptions
from distdl.inference.score import Evaluation, Score
from distdl.search.settings import SearchSettings
from distdl.transforms import Transforms
from distdl.verify import VerifyOptions

SETTINGS = (TrainConfig, BenchSettings, SearchSettings, EvaluateOptions, ReportOptions, VerifyOptions, Transforms)


@pytest.mark.parametrize("kind", [*SETTINGS, Summary, Score, Evaluation, Dataset, PreparedDataset])
def test_settings_and_results_cannot_be_changed(kind):
    with pytest.raises(AttributeError, match="cannot assign to field"):
        setattr(object.__new__(kind), next(iter(kind.__dataclass_fields__)), None)


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_are_given_by_name(kind):
    with pytest.raises(TypeError, match="positional"):
        kind("mlp")


def test_results_that_hold_arrays_are_compared_as_objects():
    numbers = np.zeros(3)
    score = Score(loss=0.5, correct=1, targets=3)
    one = Evaluation(numbers.astype(np.int64), numbers, [score], score, numbers, numbers)
    assert one == one
    assert one != replace(one, labels=numbers + 1)
    assert len({one, replace(one)}) == 2
