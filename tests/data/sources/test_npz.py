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
    "names", [("images", "labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test")]
)
def test_the_test_part_follows_the_training_part(names, file):
    arrays = (IMAGES[:9], LABELS[:9], IMAGES[9:], LABELS[9:])
    data = loaded(file, **dict(zip(names, arrays, strict=True)))
    assert np.array_equal(data.images, IMAGES[..., None])
    assert (data.labels.tolist(), data.test_start) == (LABELS.tolist(), 9)


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
        "labels complex128 .*; expected integers, floats, te",
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


def write_images(file, images):
    """Write a dataset whose images have these bytes."""
    labels = io.BytesIO()
    np.save(labels, LABELS)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", images)
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
