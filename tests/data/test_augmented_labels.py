"""Labels of pixels move with their pixels, as in a plain loop over pixels."""

import math

import numpy as np
import pytest
from test_augmentation import ALL, GEOMETRIC, KEY, bytes_of, drawn, place

from distdl.arrays import NO_LABEL
from distdl.data.augmentation import Augmentation

CLASSES = 5
SHAPES = [(1, 1, 1), (2, 3, 5), (3, 5, 3), (1, 1, 7), (4, 28, 28), (5, 6, 6)]


def labels_of(shape):
    return (bytes_of(shape, seed=2) % CLASSES).astype(np.int64)


def moved(labels, **given):
    return Augmentation.parse(GEOMETRIC).move_labels(labels, drawn(len(labels), **given))


def plainly_moved(labels, draws, n, i, j):
    """Return the label of the nearest pixel; several labels if the rounding of the place decides between them."""
    _, H, W = labels.shape
    y, x = place(draws, n, i, j, H, W)
    slack = 1.1 / 256  # places are rounded to half a step twice
    rows, columns = ({math.floor(v + sign * slack + 0.5) for sign in (-1, 1)} for v in (y, x))
    return {
        int(labels[n, row, column]) if 0 <= row < H and 0 <= column < W else NO_LABEL
        for row in rows
        for column in columns
    }


@pytest.mark.parametrize("asked", [ALL, GEOMETRIC, "rotate=30", "scale=0.5", "shift=2", "crop=3,flip"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_label_is_that_of_the_nearest_pixel_as_in_a_plain_loop(shape, asked):
    augmentation, labels = Augmentation.parse(asked), labels_of(shape)
    uncertain = 0
    for step in range(3):
        key = KEY.of(step)
        draws, found = augmentation.draw(key, len(labels)), augmentation.apply_to_labels(labels, key)
        assert (found.shape, found.dtype) == (labels.shape, labels.dtype)
        for where in np.ndindex(shape):
            possible = plainly_moved(labels, draws, *where)
            uncertain += len(possible) > 1
            assert found[where] in possible
    assert uncertain <= max(3, 3 * labels.size / 2), "most places are clearly nearer to one pixel"


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, 0), (0, -1), (-3, 4), (5, 5), (-7, 1), (400, -400)])
def test_moved_by_whole_pixels_is_a_slice_with_no_labels_around(down, right):
    labels = labels_of((2, 6, 5))
    padded = np.pad(labels, ((0, 0), (400, 400), (400, 400)), constant_values=NO_LABEL)
    expected = padded[:, 400 - down : 406 - down, 400 - right : 405 - right]
    np.testing.assert_array_equal(moved(labels, down=down, right=right), expected)


def test_mirroring_and_right_angles_copy_each_label():
    labels = labels_of((3, 7, 7))
    np.testing.assert_array_equal(moved(labels, mirror=-1), labels[:, :, ::-1])
    for quarters in (1, 2, 3):
        found = moved(labels, angle=quarters * math.pi / 2)
        np.testing.assert_array_equal(found, np.rot90(labels, quarters, axes=(1, 2)))


def test_less_than_half_a_pixel_moves_no_label_and_more_moves_all():
    labels = labels_of((2, 4, 4))
    np.testing.assert_array_equal(moved(labels, down=0.49, right=-0.49), labels)
    np.testing.assert_array_equal(moved(labels, down=0.51)[:, 1:], labels[:, :-1])


def test_no_transform_keeps_the_labels():
    labels = labels_of((2, 4, 6))
    assert Augmentation.parse("brightness=1,rotate=0").apply_to_labels(labels, KEY) is labels
    before = labels.copy()
    np.testing.assert_array_equal(moved(labels), before)
    Augmentation.parse(ALL).apply_to_labels(labels, KEY)
    np.testing.assert_array_equal(labels, before)


@pytest.mark.parametrize("asked", [ALL, GEOMETRIC, "rotate=30", "scale=0.5", "shift=2.5", "crop=3,flip"])
def test_image_and_labels_stay_aligned(asked):
    """The pixels of the image are its labels. So four equal pixels around a place give the same value as the label."""
    labels = np.kron(labels_of((6, 4, 4)), np.ones((1, 8, 8), np.int64)) + 1  # squares of eight pixels
    asked = asked.replace(",brightness=0.1", "")
    augmentation = Augmentation.parse(asked)
    images = np.stack([labels, labels * labels], axis=3).astype(np.float32)
    for step in range(3):
        found = augmentation.apply(images, KEY.of(step))
        where = augmentation.apply_to_labels(labels, KEY.of(step))
        inside = where != NO_LABEL
        value, square = found[..., 0], found[..., 1]
        # Between two labels a < b the mean of squares is above the square of the mean. Zeros surround the image.
        pure = (square == value * value) & (value > 0)
        assert pure.sum() > inside.sum() / 3
        np.testing.assert_array_equal(value[pure], where[pure])
        assert value[inside].min() >= 1 / 4, "a quarter at least of a pixel with a label is from inside, at a corner"
        assert value[~inside].max(initial=0) <= CLASSES / 2, "and half at most of a pixel without one"


def test_the_same_key_gives_the_same_labels_after_any_other_call():
    labels, used = labels_of((16, 8, 8)), Augmentation.parse(ALL)
    expected = Augmentation.parse(ALL).apply_to_labels(labels, KEY)
    used.apply(bytes_of((16, 8, 8, 1)), KEY.of(7))
    used.apply_to_labels(labels[:5], KEY.of(7))
    np.testing.assert_array_equal(used.apply_to_labels(labels, KEY), expected)
    assert (expected != labels).any()
    others = {used.apply_to_labels(labels, KEY.of(index)).tobytes() for index in range(3)}
    assert len(others | {expected.tobytes()}) == 4
