"""A dataset in an .npz file: correct arrays are read as NumPy wrote them, wrong ones are refused in one line."""

import io
import struct
import zipfile

import numpy as np
import pytest

from distdl.data.sources import load
from distdl.errors import DamagedFileError, UserError

IMAGES = np.arange(12 * 3 * 4, dtype=np.uint8).reshape(12, 3, 4)
LABELS = np.arange(12) % 3


def loaded(path, save=np.savez, **arrays):
    save(path, **arrays)
    return load(f"npz:{path}", None)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "data.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_and_labels_are_read_as_numpy_wrote_them(save, file):
    data = loaded(file, save, images=IMAGES, labels=LABELS.astype(np.uint8))
    assert np.array_equal(data.images, IMAGES[..., None])
    assert (data.labels.dtype, data.labels.tolist()) == (np.int64, LABELS.tolist())
    assert (data.classes, data.test_start, data.name) == (3, None, f"npz:{file}")


@pytest.mark.parametrize(
    "names",
    [
        "images labels test_images test_labels",
        "x_train y_train x_test y_test",
        "X y X_test y_test",
        "train_images train_labels test_images test_labels",
        "data target test_data test_target",
        "images labels val_images val_labels test_images test_labels",
        "x_train y_train x_val y_val x_test y_test",
        "X_train Y_train X_valid Y_valid X_test Y_test",
        "train_images train_labels validation_images validation_labels test_images test_labels",
    ],
)
def test_the_parts_follow_each_other_under_all_usual_names(names, file):
    starts = [0, 6, 9] if len(names.split()) == 6 else [0, 9]
    pairs = [(IMAGES[rows], LABELS[rows]) for rows in np.split(np.arange(12), starts[1:])]
    arrays = dict(zip(names.split(), [array for pair in pairs for array in pair], strict=True))
    data = loaded(file, **dict(sorted(arrays.items())))
    assert np.array_equal(data.images, IMAGES[..., None])
    assert (data.labels.tolist(), data.test_start) == (LABELS.tolist(), 9)
    assert data.validation_start == (6 if len(starts) == 3 else None)


def test_a_part_may_hold_another_type_of_integer_labels(file):
    data = loaded(file, x_train=IMAGES[:9], y_train=LABELS[:9, None], x_test=IMAGES[9:], y_test=LABELS[9:, None] % 256)
    assert data.labels.tolist() == LABELS.tolist()
    arrays = {"images": IMAGES[:9], "labels": LABELS[:9], "test_images": IMAGES[9:]}
    for dtype in (np.uint8, np.uint64):
        assert loaded(file, **arrays, test_labels=LABELS[9:].astype(dtype)).labels.tolist() == LABELS.tolist()


def test_names_of_classes_are_kept(file):
    names = np.array(["cone", "cowrie", "whelk"])
    assert loaded(file, images=IMAGES, labels=LABELS, class_names=names).class_names == ("cone", "cowrie", "whelk")
    data = loaded(file, x_train=IMAGES[:9], y_train=names[LABELS[:9]], x_test=IMAGES[9:], y_test=names[LABELS[9:]])
    assert (data.class_names, data.labels.tolist()) == (("cone", "cowrie", "whelk"), LABELS.tolist())
    data = loaded(file, images=IMAGES, labels=LABELS, class_names=np.append(names, "zebra"))
    assert data.classes == 4


def test_one_part_with_other_pixels_is_a_warning(file):
    arrays = {"images": IMAGES[:9] / 255, "labels": LABELS[:9], "test_labels": LABELS[9:]}
    [note] = loaded(file, **arrays, test_images=IMAGES[9:] * 1.0).notes
    assert note == "the test images reach 143 and the training images 0.419608: divide all by the same number"
    assert loaded(file, **arrays, test_images=IMAGES[9:] / 255).notes == ()


def test_every_byte_order_and_memory_order_gives_the_same_numbers(file):
    pixels = IMAGES / 255
    for stored in (pixels, pixels.astype(">f8"), np.asfortranarray(pixels), pixels.astype(np.float32)):
        data = loaded(file, images=stored, labels=LABELS.astype(">i4"))
        assert data.images.dtype == np.float32
        assert np.array_equal(data.images, pixels.astype(np.float32)[..., None])
        assert data.images.flags.c_contiguous
        assert data.labels.tolist() == LABELS.tolist()


def test_float_labels_are_regression_and_labels_of_pixels_are_segmentation(file):
    assert loaded(file, images=IMAGES, labels=LABELS / 2).labels.shape == (12, 1)
    data = loaded(file, images=IMAGES, labels=np.ones((12, 5)))
    assert (data.labels.dtype, data.labels.shape, data.classes) == (np.float32, (12, 5), 5)
    assert loaded(file, images=IMAGES, labels=IMAGES % 4).classes == 4


REFUSED = {
    "no labels": ({"images": IMAGES}, "holds 'images'; expected the arrays images and labels"),
    "no names": ({"arr_0": IMAGES, "arr_1": LABELS}, "holds 'arr_0', 'arr_1'; expected .*numpy.savez.file, images=…, "),
    "two ways of naming": (
        {"images": IMAGES, "labels": LABELS, "x_test": IMAGES},
        "has images and x_test, named in two",
    ),
    "two training parts": (
        {"images": IMAGES, "labels": LABELS, "train_images": IMAGES, "train_labels": LABELS},
        "has images and train_images, named in two ways: rename or remove one",
    ),
    "an array without meaning": (
        {"images": IMAGES, "labels": LABELS, "weights": LABELS},
        "has the array 'weights': remove it, or rename it",
    ),
    "images of a part that is named twice": (
        {"images": IMAGES, "labels": LABELS, "val_images_test": IMAGES},
        "has the array 'val_images_test'",
    ),
    "no labels of a part in capitals": (
        {"X_train": IMAGES, "y_train": LABELS, "X_VAL": IMAGES},
        "has X_VAL but no y_VAL: give both, or neither",
    ),
    "names that are no texts": (
        {"images": IMAGES, "labels": LABELS, "class_names": np.arange(3)},
        r"class_names of .* is int64 \(3,\); expected texts, one for each class",
    ),
    "names of fewer classes": (
        {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b"])},
        "labels 0 to 2; expected 0 to 1 for 2 classes",
    ),
    "channels first": (
        {"images": np.zeros((12, 3, 9, 9), np.uint8), "labels": LABELS},
        "3 pixels high and 9 wide with 9 channels; expected .*numpy.moveaxis.images, 1, -1.",
    ),
    "half a test part": ({"images": IMAGES, "labels": LABELS, "test_images": IMAGES}, "no test_labels"),
    "fewer labels": ({"images": IMAGES, "labels": LABELS[1:]}, "12 images and 11 labels"),
    "fewer test labels": (
        {"images": IMAGES, "labels": LABELS, "test_images": IMAGES, "test_labels": LABELS[1:]},
        "test part .* 12 images and 11 labels",
    ),
    "another size in the test part": (
        {"images": IMAGES, "labels": LABELS, "test_images": IMAGES[:, 1:], "test_labels": LABELS},
        "for training and uint8",
    ),
    "complex labels": (
        {"images": IMAGES, "labels": LABELS + 0j},
        "labels complex128 .*; expected integers, floats",
    ),
    "a single image": ({"images": IMAGES[0], "labels": LABELS[:3]}, r"flat images \(3, 4\)"),
    "labels below 0": ({"images": IMAGES, "labels": LABELS - 1}, "labels -1 to 1"),
    "images of int64": ({"images": IMAGES.astype(int), "labels": LABELS}, "images int64"),
    "an infinite pixel": ({"images": IMAGES + np.inf, "labels": LABELS}, "NaN or infinity in images"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_dataset_is_one_line(what, file):
    arrays, said = REFUSED[what]
    with pytest.raises(UserError, match=said) as caught:
        loaded(file, **arrays)
    assert "\n" not in str(caught.value)


def npy(shape, dtype="|u1", content=b""):
    head = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + content


OBJECTS = r"holds Python objects instead of numbers \(arrays of different sizes cause this\): give one array"


def test_nothing_is_unpickled(file):
    with pytest.raises(UserError, match=f"labels of .* {OBJECTS}"):
        loaded(file, images=IMAGES, labels=np.array([print] * 12, dtype=object))


@pytest.mark.parametrize(
    "images",
    [
        npy((2**40, 3, 4)),
        npy((2**62, 2**62, 4)),
        npy((-1, 3, 4)),
        npy((1, 1)),
        b"",
        b"\x93NUMPY\3\0",
    ],
)
def test_a_wrong_declared_size_is_refused_before_the_allocation(images, file):
    write_images(file, images)
    with pytest.raises(DamagedFileError, match="is damaged"):
        load(f"npz:{file}", None)


def test_an_array_header_that_declares_objects_is_refused(file):
    write_images(file, npy((12, 3, 4), "|O"))
    with pytest.raises(UserError, match=f"images of .* {OBJECTS}"):
        load(f"npz:{file}", None)


def test_an_array_that_is_not_stored_as_numpy_does_is_named(file):
    write_images(file, npy((12, 3, 4), content=IMAGES.tobytes()), name="images")
    with pytest.raises(UserError, match=r"has images in another form than numpy.savez writes it \(images.npy\)"):
        load(f"npz:{file}", None)


def write_images(file, images, name="images.npy"):
    """Write a dataset whose images have these bytes."""
    labels = io.BytesIO()
    np.save(labels, LABELS)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, images)
        archive.writestr("labels.npy", labels.getvalue())


def test_a_missing_or_other_file_is_named(tmp_path, file):
    np.save(tmp_path / "array.npz.npy", LABELS)
    file.write_bytes(b"PK\3\4 and the end")
    for name, said in (
        ("nowhere.npz", "does not exist"),
        (".", "is not a regular file"),
        ("array.npz.npy", "is not an .npz file"),
        ("data.npz", "is damaged"),
    ):
        with pytest.raises((UserError, DamagedFileError), match=said):
            load(f"npz:{tmp_path / name}", None)
