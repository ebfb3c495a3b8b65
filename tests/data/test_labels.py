"""Labels as people save them: a task is never guessed, names are kept, and classes without samples are reported."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distdl.data import Dataset, PreparedDataset
from distdl.data.labels import natural_order
from distdl.errors import UserError

CLASSES = np.arange(40) % 4
ONE_HOT = np.eye(4, dtype=int)[CLASSES]
WORDS = np.array(["dog 2", "cat", "dog 10", "eel"])
IN_ORDER = ("cat", "dog 2", "dog 10", "eel")
NUMBERS = CLASSES / 2 + 0.25
IMAGES = np.arange(40 * 16, dtype=np.uint8).reshape(40, 4, 4, 1)
MASKS = np.arange(40 * 16).reshape(40, 4, 4) % 3


def dataset(labels, **more):
    return Dataset.from_labels("mine", IMAGES, np.asarray(labels), **more)


def prepared(labels, loss="auto", **more):
    return PreparedDataset.prepare(dataset(labels, **more).for_training(loss), seed=0)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (CLASSES, None),
        (CLASSES.astype(np.uint8)[:, None], None),
        (WORDS[[1, 0, 2, 3]][CLASSES], IN_ORDER),
        (WORDS[[1, 0, 2, 3]][CLASSES][:, None], IN_ORDER),
        (np.char.encode(WORDS[[1, 0, 2, 3]])[CLASSES], IN_ORDER),
    ],
    ids=["integers", "a column", "texts", "a column of texts", "bytes"],
)
def test_labels_of_one_meaning_become_classes_with_the_users_names(labels, names):
    data = prepared(labels)
    assert (data.task, data.classes, data.class_names, data.notes) == ("classification", 4, names, ())
    assert data.labels.tolist() == CLASSES.tolist()


def test_true_and_false_become_two_named_classes():
    for labels in (CLASSES > 1, MASKS > 1):
        data = prepared(labels)
        assert (data.classes, data.class_names) == (2, ("False", "True"))
        assert np.array_equal(data.labels, labels.astype(int))


@pytest.mark.parametrize(
    "labels", [MASKS[..., None], MASKS.astype(float), np.eye(3)[MASKS], np.eye(3, dtype=bool)[MASKS]]
)
def test_labels_of_pixels_can_only_be_classes(labels):
    data = prepared(labels)
    assert (data.task, data.classes) == ("segmentation", 3)
    assert np.array_equal(data.labels, MASKS)


AMBIGUOUS = {
    "whole floats": CLASSES.astype(float),
    "a column of whole floats": CLASSES.astype(np.float32)[:, None],
    "one-hot integers": ONE_HOT,
    "one-hot floats": ONE_HOT.astype(np.float64),
    "one-hot True/False": ONE_HOT.astype(bool),
}


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_labels_of_two_meanings_need_a_loss_that_decides(what):
    labels = AMBIGUOUS[what]
    with pytest.raises(UserError, match=r"give --loss cross_entropy .* or --loss mean_squared_error to predict"):
        prepared(labels)
    as_classes = prepared(labels, "cross_entropy")
    assert (as_classes.task, as_classes.classes) == ("classification", 4)
    assert as_classes.labels.tolist() == CLASSES.tolist()
    as_numbers = prepared(labels, "mean_squared_error")
    expected = labels.reshape(40, -1).astype(np.float32)
    assert (as_numbers.task, as_numbers.classes) == ("regression", expected.shape[1])
    np.testing.assert_array_equal(as_numbers.labels, expected, strict=True)


def test_the_number_of_classes_or_their_names_also_decide():
    given = Dataset("mine", IMAGES, CLASSES.astype(float), classes=4, test_start=None)
    assert given.checked().for_training("auto").labels.tolist() == CLASSES.tolist()
    assert prepared(CLASSES.astype(float), class_names=IN_ORDER).labels.tolist() == CLASSES.tolist()


def test_numbers_with_decimals_are_a_regression():
    for labels in (NUMBERS, NUMBERS[:, None], np.stack([NUMBERS, NUMBERS], axis=1)):
        data = prepared(labels)
        assert (data.task, data.labels.dtype) == ("regression", np.float32)
        assert np.array_equal(data.labels, labels.reshape(40, -1))


@pytest.mark.parametrize(
    ("labels", "loss", "said"),
    [
        (ONE_HOT + ONE_HOT[::-1], "auto", "4 whole numbers as labels of each image; expected one class for each image"),
        (ONE_HOT + ONE_HOT[::-1], "cross_entropy", "several are not supported"),
        (CLASSES, "mean_squared_error", r"leave --loss out, or save labels.astype\(numpy.float32\) to predict"),
        (CLASSES - 1.0, "cross_entropy", "labels -1 to 2; expected 0 to 2 .*numpy.unique"),
        (CLASSES * 1e30, "cross_entropy", "whole numbers as labels"),
        (CLASSES * 0, "auto", "the single class 0; expected samples of two classes"),
        (np.full(40, "cat"), "auto", "the single class 'cat'"),
        (MASKS * 0, "auto", "the single class 0"),
        (CLASSES * 10_000_019, "auto", r"labels that give 30000058 classes, of which 4 have samples \(0, 10000019, "),
        (np.where(CLASSES > 2, 2**31 - 2, CLASSES), "auto", "labels that give 2147483647 classes"),
        (np.where(CLASSES > 2, 2**62, CLASSES), "auto", "classes 4611686018427387905; expected an int"),
        (np.arange(40) + 7, "auto", r"40 different labels \(7 to 46\) for 40 samples"),
        (np.where(CLASSES, "cat", ""), "auto", "an empty label, first in sample 0"),
        (np.array([b"\xff", b"a"])[CLASSES % 2], "auto", "labels of bytes that are not UTF-8"),
        (WORDS[[CLASSES, CLASSES]].T, "auto", r"labels of texts \(40, 2\); expected one text for each image"),
        (CLASSES + 0j, "auto", "labels complex128"),
    ],
)
def test_labels_that_cannot_be_used_are_one_line_with_the_remedy(labels, loss, said):
    with pytest.raises(UserError, match=said) as caught:
        prepared(labels, loss)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (CLASSES + 1, "labels are 1 to 4, which gives 5 classes: class 0 has no sample; labels - 1 starts at 0"),
        (CLASSES * 2, "labels are 0, 2, 4, 6, which gives 7 classes: 3 classes have no sample; numpy.unique(labels, "),
        (CLASSES.astype(np.uint8) - 1, "255 may be the -1 of unsigned numbers (uint8); numpy.unique"),
        ((MASKS > 0) * 255, "labels are 0, 255, which gives 256 classes: 254 classes have no sample; labels // 255"),
        (np.where(MASKS > 1, 255, MASKS), "255 is a class here, because no label means 'ignore'"),
    ],
)
def test_classes_without_samples_are_a_warning_with_the_fix(labels, said):
    [note] = prepared(labels).notes
    assert said in note
    assert prepared(labels).classes == int(labels.max()) + 1


def test_a_script_may_state_more_classes_than_have_samples():
    stated = Dataset("mine", IMAGES, CLASSES + 5, classes=10, test_start=None)
    assert stated.checked().for_training("auto").notes == ()


def test_a_class_that_a_part_lacks_is_a_warning():
    labels = np.where(np.arange(40) < 30, CLASSES % 2, CLASSES)
    data = prepared(labels, test_start=30, class_names=IN_ORDER)
    assert data.notes == (
        "2 classes have no training sample (dog 10, eel): give more samples of each class",
        "2 classes have no validation sample (dog 10, eel): give more samples of each class",
    )
    [note] = prepared(np.append(CLASSES[:38] % 3, [3, 3])).notes[:1]
    assert note == "1 class has no validation sample (3): give more samples of each class"


def test_names_order_the_classes_and_must_fit():
    reverse = IN_ORDER[::-1]
    data = prepared(WORDS[[1, 0, 2, 3]][CLASSES], class_names=reverse)
    assert (data.class_names, data.labels.tolist()) == (reverse, (3 - CLASSES).tolist())
    for labels, names, said in (
        (WORDS[CLASSES], ("cat", "eel"), "labels dog 10, dog 2, which class_names does not list"),
        (CLASSES, ("cat", "eel"), "labels 0 to 3; expected 0 to 1 for 2 classes"),
        (CLASSES, ("a", "a", "b", "c"), "class_names with 'a' 2 times; expected different texts"),
    ):
        with pytest.raises(UserError, match=said):
            dataset(labels, class_names=names)
    [note] = prepared(CLASSES, class_names=(*IN_ORDER, "fox")).notes
    assert note == "class 4 has no sample (fox)"


@given(st.data())
def test_the_natural_order_depends_on_the_names_alone_and_counts(data):
    names = data.draw(st.lists(st.text(max_size=6), unique=True))
    shuffled = data.draw(st.permutations(names))
    assert sorted(names, key=natural_order) == sorted(shuffled, key=natural_order)
    assert sorted(map(str, range(12)), key=natural_order) == list(map(str, range(12)))


def test_a_dataset_of_one_source_may_be_prepared_for_several_losses():
    given = dataset(ONE_HOT)
    assert given.for_loss("cross_entropy").task == "classification"
    assert given.for_loss("mean_squared_error").task == "regression"
    assert replace(given).for_loss("cross_entropy").labels.tolist() == CLASSES.tolist()


def test_names_that_are_almost_equal_and_numbers_that_are_probabilities_are_warnings():
    [note] = prepared(np.array(["cat", "dog", "Cat ", "eel"])[CLASSES]).notes
    assert note == "the classes 'Cat ' and 'cat' differ only in spaces or capitals"
    smoothed = ONE_HOT * 0.9 + 0.025
    [note] = prepared(smoothed).notes
    assert "sum to 1 and are learned as numbers; for classes save labels.argmax(axis=1)" in note
    assert prepared(smoothed * 2).notes == ()
