"""The signature of a network survives its way through JSON; a signature from a foreign file is checked."""

import json

import numpy as np
import pytest

from distdl.data import Dataset, PreparedDataset
from distdl.data.signature import Signature

GIVEN = Signature("classification", 2, ("cat", "dog"), (8, 9, 3), "uint8", (0.5, 1.0, 2.0), (1.0, 2.0, 3.0), "8x9:crop")


NUMBERS = {"task": "regression", "target_mean": (0.5, 1e6), "target_deviation": (1.0, 0.1)}


@pytest.mark.parametrize("changed", [{}, {"names": None}, NUMBERS])
def test_json_holds_the_whole_signature(changed):
    given = Signature(**{**vars(GIVEN), **changed})
    assert Signature.from_json(json.loads(json.dumps(given.to_json()))) == given


def test_fields_of_a_later_version_are_ignored():
    assert Signature.from_json(GIVEN.to_json() | {"later": 1}) == GIVEN


@pytest.mark.parametrize(
    "changed",
    [
        {"task": "guess"},
        {"outputs": 3},
        {"outputs": True},
        {"names": ["cat"]},
        {"names": ["cat", 1]},
        {"names": 5},
        {"image_shape": [8, 9]},
        {"image_shape": [8, 0, 3]},
        {"image_shape": None},
        {"pixels": "float64"},
        {"pixels": {}},
        {"task": []},
        {"mean": [0.5, 1.0]},
        {"mean": [0.5, 1.0, float("nan")]},
        {"deviation": [1.0, 2.0, 0.0]},
        {"deviation": ["1", "2", "3"]},
        {"resize": 8},
        {"target_mean": (0.0, 1.0), "target_deviation": (1.0, 1.0)},  # of labels
        {**NUMBERS, "target_mean": (0.0,), "target_deviation": (1.0,)},
        {**NUMBERS, "target_deviation": None},
        {**NUMBERS, "target_deviation": (1.0, 0.0)},
        {**NUMBERS, "target_mean": (float("inf"), 0.0)},
        {**NUMBERS, "target_mean": 5},
        {"resize": "8x9:zoom"},
    ],
)
def test_a_signature_that_cannot_be_used_is_refused(changed):
    with pytest.raises(ValueError, match="signature"):
        Signature.from_json(GIVEN.to_json() | changed)


@pytest.mark.parametrize("name", GIVEN.to_json().keys() - {"resize", "target_mean", "target_deviation"})
def test_an_incomplete_signature_is_refused(name):
    values = GIVEN.to_json()
    del values[name]
    with pytest.raises(ValueError, match="signature"):
        Signature.from_json(values)


def test_the_signature_of_a_dataset_has_its_exact_normalization_and_its_names():
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 5, 3), np.uint8)
    dataset = Dataset("mine", images, np.arange(40) % 2, 2, None, ("cat", "dog"), resize="4x5:pad").checked()
    data = PreparedDataset.from_arrays(PreparedDataset.prepare(dataset, seed=0).to_arrays())
    found = data.signature()
    assert (found.task, found.outputs, found.names) == ("classification", 2, ("cat", "dog"))
    assert (found.image_shape, found.pixels, found.resize) == ((4, 5, 3), "uint8", "4x5:pad")
    assert np.array_equal(np.array(found.mean, np.float32), data.normalization.mean)
    assert np.array_equal(np.array(found.deviation, np.float32), data.normalization.deviation)
