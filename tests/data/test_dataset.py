"""Datasets: the checks of a script's dataset, and the prepared form that all ranks share."""

import json
from dataclasses import replace

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.data import Dataset, PreparedDataset
from distdl.data.normalization import measure
from distdl.data.sources import load
from distdl.data.split import split
from distdl.engine import train
from distdl.engine.storage.checkpoints import LARGEST_HEADER_BYTES
from distdl.errors import UserError
from distdl.parallel import OneProcess
from distdl.rng import Key

IMAGES = np.zeros((6, 4, 3, 1), np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.uint8)
GIVEN = Dataset("mine", IMAGES, LABELS, classes=3, test_start=4)
NAN = IMAGES.copy()
NAN[2, 1, 1] = np.nan
NUMBERS = np.zeros((6, 3), np.float32)
NUMBERS[5, 1] = np.inf


def test_a_correct_dataset_is_accepted_with_int64_labels():
    for given in (GIVEN, replace(GIVEN, images=IMAGES.astype(np.uint8), classes=LABELS.max() + 1, test_start=None)):
        checked = given.checked()
        assert checked.images is given.images
        assert checked.labels.dtype == np.int64
        assert checked.labels.tolist() == LABELS.tolist()
        assert (checked.classes, type(checked.classes)) == (3, int)
        assert checked.test_start == given.test_start


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"images": IMAGES.tolist()}, "images of type list; expected a NumPy array"),
        ({"labels": [0, 1]}, "labels of type list; expected a NumPy array"),
        ({"images": IMAGES[..., 0]}, "images float32 (6, 4, 3); expected uint8 or float32 (N, H, W, C)"),
        ({"images": IMAGES.astype(np.int64)}, "images int64 (6, 4, 3, 1); expected uint8 or float32"),
        ({"images": np.zeros((6, 3, 9, 8))}, "images (6, 3, 9, 8), which are 3 pixels high and 9 wide with 8 channels"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images float32 (0, 4, 3, 1); expected"),
        ({"images": NAN}, "NaN or infinity in images, first in sample 2; expected finite"),
        ({"labels": LABELS[:5]}, "labels uint8 (5,); expected 6 integers"),
        ({"labels": LABELS[:, None, None]}, "labels uint8 (6, 1, 1); expected 6 integers"),
        ({"labels": LABELS / 2}, "labels float32 (6, 1); expected (6, 3), as many numbers for each image"),
        ({"labels": LABELS + 0j}, "labels complex128 (6,); expected integers, floats, texts or True/False"),
        (
            {"labels": NUMBERS[:, :2]},
            "labels float32 (6, 2); expected (6, 3), as many numbers for each image",
        ),
        ({"labels": NUMBERS[:5]}, "labels float32 (5, 3); expected (6, 3)"),
        ({"labels": NUMBERS}, "NaN or infinity in labels, first in sample 5; expected finite numbers"),
        ({"labels": LABELS + 1}, "labels 1 to 3; expected 0 to 2 for 3 classes"),
        ({"labels": LABELS.astype(np.int64) - 1}, "labels -1 to 1; expected 0 to 2"),
        ({"classes": 2}, "labels 0 to 2; expected 0 to 1"),
        ({"classes": 3.0}, "classes 3.0; expected an int"),
        ({"classes": 0}, "classes 0; expected an int"),
        ({"test_start": 6}, "test_start 6; expected None, or the first row of the test part, 1 to 5"),
        ({"test_start": 0}, "test_start 0; expected None"),
        ({"test_start": -1}, "test_start -1; expected None"),
        ({"test_start": 4.0}, "test_start 4.0; expected None"),
        ({"validation_start": 4}, "validation_start 4; expected None, or the first row of the validation part, 1 to 3"),
        ({"validation_start": True}, "validation_start True; expected None"),
    ],
    ids=str,
)
def test_a_wrong_dataset_is_one_line_before_anything_is_written(wrong, said, tmp_path):
    config = TrainConfig(run_dir=tmp_path / "run")
    with pytest.raises(UserError) as error:
        train(config, OneProcess(), dataset=replace(GIVEN, **wrong))
    assert str(error.value).startswith(f"the dataset 'mine' has {said}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"images": IMAGES.astype(np.float64)}, {}),
        ({"labels": LABELS[:, None]}, {}),
        ({"labels": LABELS.astype(np.float64)}, {}),
        ({"labels": np.array(["a", "b", "c"])[LABELS]}, {"class_names": ("a", "b", "c")}),
        ({"labels": np.eye(3)[LABELS]}, {"labels": np.eye(3, dtype=np.float32)[LABELS]}),
    ],
    ids=str,
)
def test_a_script_may_give_arrays_in_the_forms_of_an_npz_file(given, expected):
    checked = replace(GIVEN, **given).checked()
    assert checked.images.dtype == np.float32
    np.testing.assert_array_equal(checked.labels, expected.get("labels", LABELS), strict=False)
    assert checked.class_names == expected.get("class_names")


# ------------------------------------------------------------------------------------------------- the prepared form


def test_a_dataset_is_split_by_the_seed_and_measured_on_its_training_part():
    digits = load("digits", None)
    prepared = PreparedDataset.prepare(digits, seed=3)
    expected = split(digits.labels, None, Key(3))
    for name, rows in vars(expected).items():
        np.testing.assert_array_equal(getattr(prepared.parts, name), rows)
    measured = measure(digits.images, expected.training)
    assert prepared.normalization.mean.tobytes() == measured.mean.tobytes()
    assert prepared.normalization.deviation.tobytes() == measured.deviation.tobytes()
    assert prepared.images is digits.images
    assert prepared.labels is digits.labels


def test_arrays_of_several_seeds_hold_one_copy_of_the_images_and_each_seeds_dataset():
    digits = load("digits", None)
    prepared = {seed: PreparedDataset.prepare(digits, seed) for seed in (0, 1)}
    arrays = prepared[0].to_arrays("0 ") | prepared[1].to_arrays("1 ")
    assert sum(array is digits.images for array in arrays.values()) == 1
    for seed, one in prepared.items():
        again = PreparedDataset.from_arrays(arrays, f"{seed} ")
        assert again.sha256() == one.sha256()
        assert again.normalization.mean.tobytes() == one.normalization.mean.tobytes()
        assert (again.classes, type(again.classes)) == (10, int)
    assert prepared[0].sha256() != prepared[1].sha256()


def test_the_hash_of_the_digits_never_changes():
    """Checkpoints hold it, as ``data_sha256``."""
    digits = load("digits", None)
    assert digits.sha256() == "9fb36cd711043c1d15c1c29c64d1b4a4af9a66175a26c24e40b53f4dc7a8e9a6"
    split_by_0 = "915ed660f99ca1d568e6e2146f9c95a4e580490fb0b58b44d91cac7d370c5979"
    assert PreparedDataset.prepare(digits, seed=0).sha256() == split_by_0


@pytest.mark.parametrize(
    ("labels", "targets", "loss"),
    [
        (np.zeros(6, np.int64), 1, "cross_entropy"),
        (np.zeros((6, 4, 3), np.int64), 12, "cross_entropy"),
        (np.zeros((6, 2), np.float32), 0, "mean_squared_error"),
    ],
)
def test_the_labels_define_the_task(labels, targets, loss):
    dataset = replace(GIVEN, labels=labels)
    for one in (dataset, PreparedDataset.for_training_only(IMAGES, labels, 3)):
        assert (one.targets_per_sample, one.default_loss) == (targets, loss)
        assert (one.loss_named("auto"), one.loss_named("other")) == (loss, "other")


def test_rows_for_training_may_repeat_and_the_other_parts_are_empty():
    data = PreparedDataset.for_training_only(IMAGES, LABELS, 3).with_training_rows(np.arange(9) % 6)
    assert data.parts.training.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert data.parts.validation.size == data.parts.test.size == 0
    assert data.samples(np.array([4, 1]))["labels"].tolist() == [1, 1]


def mixed(channels, kind):
    """Return images of 20 samples whose channels are constant or vary, in the given order."""
    images = np.random.default_rng(0).integers(0, 9, (20, 4, 3, len(channels))).astype(kind)
    images[..., [channel == "constant" for channel in channels]] = 7
    return Dataset("mine", images, np.arange(20) % 2, 2, None).checked()


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_images_without_any_difference_are_refused(kind):
    with pytest.raises(UserError, match=r"every pixel of every training image has the value 7, 7: expected"):
        PreparedDataset.prepare(mixed(["constant"] * 2, kind), seed=0)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_channel_without_any_difference_is_noted(kind):
    [note] = PreparedDataset.prepare(mixed(["varies", "constant", "varies"], kind), seed=0).notes
    assert note.startswith("channel 1 (of 0 to 2) of the images holds one value")
    assert PreparedDataset.prepare(mixed(["varies", "varies"], kind), seed=0).notes == ()


def test_a_channel_of_deviation_one_is_not_taken_for_a_constant_one():
    images = np.tile(np.array([3, 5], np.uint8), (20, 4, 1)).reshape(20, 4, 2, 1)
    data = PreparedDataset.prepare(Dataset("mine", images, np.arange(20) % 2, 2, None).checked(), seed=0)
    assert data.normalization.deviation.tolist() == [1]
    assert data.notes == ()


@pytest.mark.parametrize("letter", ["a", "\x01", "é", '"', "\\", "\udcff", "𝄞"])
def test_names_that_are_accepted_fit_into_the_header_of_a_checkpoint(letter):
    """The header holds them as JSON within JSON, which writes most letters longer."""
    images, labels = np.zeros((4, 8, 8), np.uint8)[..., np.newaxis], np.array([0, 1, 0, 1])
    accepted = []
    for length in (2**power for power in range(20)):
        names = (letter * length, "b")
        given = Dataset("x", images, labels, 2, None, names)
        if len(json.dumps(json.dumps(names))) <= LARGEST_HEADER_BYTES // 2:
            accepted.append(given.checked())
        else:
            with pytest.raises(UserError, match="long class_names"):
                given.checked()
    assert len(accepted) > 14
