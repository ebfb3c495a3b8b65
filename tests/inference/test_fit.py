"""Other data gets the classes of the network by name, and the channels that it takes; anything else is refused."""

import dataclasses

import numpy as np
import pytest

from distdl.data import Dataset
from distdl.data.signature import Signature
from distdl.errors import UserError
from distdl.inference.fit import _arrays_of, _rows_of, fitted, fitted_labels
from distdl.inference.inputs import ImageFiles
from distdl.inference.options import EvaluateOptions

NAMED = Signature("classification", 3, ("cat", "dog", "eel"), (4, 5, 1), "uint8", (0.0,), (1.0,))
NUMBERED = dataclasses.replace(NAMED, names=None)
NUMBERS = dataclasses.replace(NAMED, task="regression", outputs=2, names=("row", "column"))


def data(labels, names=None, classes=None, **settings):
    labels = np.array(labels)
    labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)
    count = classes or (labels.shape[-1] if labels.ndim == 2 else int(labels.max()) + 1)
    images = np.zeros((len(labels), 4, 5, 1), np.uint8)
    return Dataset("new", images, labels, count, None, names, **settings)


@pytest.mark.parametrize(
    ("given", "signature", "expected"),
    [
        (data([0, 1, 2], ("cat", "dog", "eel")), NAMED, [0, 1, 2]),
        (data([0, 1, 2], ("eel", "cat", "dog")), NAMED, [2, 0, 1]),
        (data([0, 1, 1], ("eel", "dog")), NAMED, [2, 1, 1]),
        (data([2, 0, 0]), NAMED, [2, 0, 0]),
        (data([0, 1, 1], ("2", "1")), NUMBERED, [2, 1, 1]),
        (data([0, 1, 1]), NUMBERED, [0, 1, 1]),
        (data([[1.5, 2.0], [3.0, 4.0]], ("row", "column")), NUMBERS, [[1.5, 2.0], [3.0, 4.0]]),
        (data([[1.5, 2.0], [3.0, 4.0]], ("column", "row")), NUMBERS, [[2.0, 1.5], [4.0, 3.0]]),
        (data([[1.5, 2.0], [3.0, 4.0]]), NUMBERS, [[1.5, 2.0], [3.0, 4.0]]),
        (data([[1.0, 2.0], [3.0, 4.0]]), NUMBERS, [[1.0, 2.0], [3.0, 4.0]]),
    ],
    ids=[
        "same",
        "another order",
        "a subset",
        "no names",
        "digits as names",
        "numbers",
        "",
        "swapped",
        "floats",
        "whole",
    ],
)
def test_classes_are_matched_by_name_and_otherwise_by_number(given, signature, expected):
    assert fitted_labels(given, signature).tolist() == expected


@pytest.mark.parametrize(
    ("given", "signature", "words"),
    [
        (data([0, 1], ("cat", "fox")), NAMED, ["new", "'fox'", "cat, dog, eel"]),
        (data([0, 1], ("cat", "dog")), NUMBERED, ["'cat', 'dog'", "0, 1, 2"]),
        (data([0, 3]), NAMED, ["4 classes", "3"]),
        (data([0, 1]), NUMBERS, ["classification", "regression"]),
        (data([[1.5, 2.0, 0.0]]), NUMBERS, ["3 numbers", "2"]),
        (data([[1.5]]), NUMBERS, ["1 numbers", "2"]),
        (data([[1.5]], ("row",)), NUMBERS, ["1 numbers", "2"]),
        (data([[1.5, 2.0]], ("row", "depth")), NUMBERS, ["'depth'", "row, column"]),
        (data([[1.5, 2.0]]), NAMED, ["regression", "classification"]),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_name(given, signature, words):
    with pytest.raises(UserError) as raised:
        fitted_labels(given, signature)
    assert [word for word in words if word not in str(raised.value)] == []


def test_channels_are_converted_as_pillow_does():
    pillow = pytest.importorskip("PIL.Image")
    colours = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)
    gray = np.stack([np.asarray(pillow.fromarray(image).convert("L")) for image in colours])[..., np.newaxis]
    assert np.array_equal(fitted(colours, NAMED, "new"), gray)
    coloured = dataclasses.replace(NAMED, image_shape=(4, 5, 3), mean=(0.0,) * 3, deviation=(1.0,) * 3)
    expected = np.stack([np.asarray(pillow.fromarray(image[..., 0]).convert("RGB")) for image in gray])
    assert np.array_equal(fitted(gray, coloured, "new"), expected)
    assert fitted(colours, coloured, "new") is colours


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 5, 4, 1), np.uint8), ["5x4", "4x5"]),
        (np.zeros((2, 4, 5, 2), np.uint8), ["2 channels", "1"]),
        (np.zeros((2, 4, 5, 1), np.float32), ["float32", "uint8"]),
    ],
)
def test_images_that_do_not_fit_are_refused(images, words):
    with pytest.raises(UserError) as raised:
        fitted(images, NAMED, "new")
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("starts", "part", "expected"),
    [
        ({}, None, range(10)),
        ({"test_start": 7}, None, range(10)),
        ({"test_start": 7}, "test", range(7, 10)),
        ({"test_start": 7}, "training", range(7)),
        ({"test_start": 7, "validation_start": 4}, "training", range(4)),
        ({"test_start": 7, "validation_start": 4}, "validation", range(4, 7)),
        ({"validation_start": 4}, "validation", range(4, 10)),
        ({}, "test", None),
        ({}, "training", None),
        ({"test_start": 7}, "validation", None),
        ({"validation_start": 4}, "test", None),
    ],
)
def test_a_part_is_one_of_the_datas_own(starts, part, expected):
    given = dataclasses.replace(data(range(10)), **starts)
    if expected is None:
        with pytest.raises(UserError, match=f"--part {part}: new has no {part} part of its own"):
            _rows_of(given, part)
    else:
        assert _rows_of(given, part).tolist() == list(expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("source", ["folder", "csv"])
def test_image_files_are_scored_with_the_pixels_that_a_prediction_uses(source, channels, tmp_path):
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    files = []
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for kind in ("jpg", "png"):
            pixels = np.kron(random.integers(0, 256, (5, 7, 3), np.uint8), np.ones((20, 20, 1), np.uint8))
            files.append(tmp_path / label / f"a.{kind}")
            image.fromarray(pixels).save(files[-1])
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name},{n}" for n, path in enumerate(files)]
    (tmp_path / "table.csv").write_text("\n".join(["one,two,three", *lines]))
    given = {"folder": f"folder:{tmp_path}", "csv": f"csv:{tmp_path / 'table.csv'}"}[source]
    signature = dataclasses.replace(
        NAMED, image_shape=(9, 8, channels), mean=(0.0,) * channels, deviation=(1.0,) * channels, resize="9x8:crop"
    )
    columns = "one,two" if source == "csv" else None
    scored = _arrays_of(EvaluateOptions(runs=(), on=given, csv_columns=columns), signature)
    predicted = np.empty((4, 9, 8, channels), np.uint8)
    assert not ImageFiles([str(file) for file in files], signature).read(0, predicted)
    assert np.array_equal(scored["images"], predicted)
    assert scored["labels"].tolist() == [0, 0, 1, 1]
