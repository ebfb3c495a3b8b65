"""Shapes of images: a layout that is not (N, H, W, C) is refused with the transposition that fixes it."""

import numpy as np
import pytest

from distdl.data.image_shapes import canonical_images
from distdl.data.labels import Unfit


@pytest.mark.parametrize(
    "shape",
    [
        (5, 28, 28, 1),
        (5, 3, 9, 3),
        (5, 1, 60, 1),
        (5, 4, 4, 4),
        (5, 12, 9, 30),
        (5, 40, 3, 40),
        (5, 9, 8, 8),
        (5, 1, 1, 30),
    ],
)
def test_a_plausible_shape_is_accepted(shape):
    images = np.zeros(shape, np.uint8)
    found, notes = canonical_images(images, 5)
    assert found is images
    assert notes == ()


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((5, 3, 40, 40), "numpy.moveaxis(images, 1, -1)"),
        ((5, 1, 28, 28), "numpy.moveaxis(images, 1, -1)"),
        ((5, 2, 28, 20), "numpy.moveaxis(images, 1, -1)"),
        ((5, 13, 64, 64), "numpy.moveaxis(images, 1, -1)"),
        ((32, 32, 3, 5), "numpy.moveaxis(images, -1, 0)"),
        ((32, 32, 5), "numpy.moveaxis(images, -1, 0)"),
    ],
)
def test_a_transposed_shape_is_refused_and_the_remedy_makes_it_acceptable(shape, remedy):
    images = np.zeros(shape, np.uint8)
    with pytest.raises(Unfit) as caught:
        canonical_images(images, 5)
    assert remedy in str(caught.value)
    first, second = (1, -1) if "1, -1" in remedy else (-1, 0)
    moved = np.moveaxis(images, first, second)
    assert canonical_images(moved[..., None] if moved.ndim == 3 else moved, 5)[0].shape[0] == 5
    if images.ndim == 4 and first == 1:
        assert canonical_images(images.swapaxes(1, 2), 5)[0].shape[0] == 5


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((5, 3072)), r"images.reshape\(-1, 32, 32, 3\) if .*reshape\(-1, 3, 32, 32\).transpose\(0, 2, 3, 1\)"),
        (np.zeros((5, 4)), r"images.reshape\(-1, height, width, channels\)"),
        (np.zeros((5, 8, 8)), r"images\[..., numpy.newaxis\]"),
        (np.zeros((5, 4, 4, 4, 1)), "correct the dataset"),
        (np.zeros((5, 8, 8, 1), bool), r"images.astype\(numpy.uint8\)"),
        (np.full((5, 8, 8, 1), 255), r"images.astype\(numpy.uint8\)"),
        (np.full((5, 8, 8, 1), 256), r"images.astype\(numpy.float32\)"),
        (np.zeros((5, 8, 8, 1), complex), r"images.astype\(numpy.float32\)"),
    ],
)
def test_other_forms_are_refused_with_the_conversion(images, said):
    with pytest.raises(Unfit, match=said):
        canonical_images(images, 5)


def test_flat_square_images_are_read_with_a_warning():
    images = np.arange(5 * 784.0).reshape(5, 784)
    found, notes = canonical_images(images, 5)
    np.testing.assert_array_equal(found, images.reshape(5, 28, 28, 1).astype(np.float32), strict=True)
    assert notes == ("images (5, 784) are read as 28x28 pixels with one channel",)
