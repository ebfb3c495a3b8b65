"""Images change as requested, equal to a plain loop over pixels, and depend on the key alone."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distdl.data.augmentation import Augmentation, Draws
from distdl.errors import UserError
from distdl.rng import Key
from distdl.transforms import LARGEST, NAMES, Transforms

ALL = "rotate=10,shift=2,scale=0.1,crop=2,flip,brightness=0.1"
GEOMETRIC = "rotate=180,shift=3,scale=0.9,crop=2,flip"
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 3), (3, 5, 3, 1), (1, 1, 7, 2), (4, 28, 28, 1), (2, 6, 6, 4)]
KEY = Key(0).of("training", 3, 1, "augmentation")


def bytes_of(shape, seed=0):
    return Key(seed).of("pixels").words(math.prod(shape)).astype(np.uint8).reshape(shape)


def drawn(count, **given):
    """Return draws that change `count` images in the same way, only by the given values."""
    numbers = {"angle": 0, "scale": 1, "down": 0, "right": 0, "mirror": 1, "brightness": 1} | given
    return Draws(**{name: np.broadcast_to(np.float64(value), count) for name, value in numbers.items()})


def changed(images, **given):
    return Augmentation.parse(GEOMETRIC).change(images, drawn(len(images), **given))


# ------------------------------------------------------------------------------------------------------ the oracle


def bilinear(image, y, x):
    """Return the mean of the four pixels around a place of an image (H, W, C) with zeros around it."""
    H, W, C = image.shape
    total = np.zeros(C)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < H and 0 <= column < W:
                total += image[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def place(draws, n, i, j, H, W):
    """Undo the changes in reverse order: move, turn, enlarge, mirror."""
    y, x = i - draws.down[n] - (H - 1) / 2, j - draws.right[n] - (W - 1) / 2
    # y grows downward. The image turns counterclockwise for the viewer, so the place turns clockwise.
    turned = complex(x, -y) * complex(math.cos(draws.angle[n]), -math.sin(draws.angle[n])) / draws.scale[n]
    return -turned.imag + (H - 1) / 2, turned.real * draws.mirror[n] + (W - 1) / 2


def plainly_changed(images, draws):
    N, H, W, _ = images.shape
    result = np.zeros(images.shape)
    for n in range(N):
        for i in range(H):
            for j in range(W):
                result[n, i, j] = draws.brightness[n] * bilinear(images[n], *place(draws, n, i, j, H, W))
    return result


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("asked", [ALL, GEOMETRIC, "rotate=30", "scale=0.5", "shift=2", "crop=3,flip"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_pixel_equals_that_of_a_plain_loop(shape, asked, dtype):
    """Equal except for the rounding of places: twice half a step of 1/256 pixel, along each axis."""
    augmentation, images = Augmentation.parse(asked), bytes_of(shape).astype(dtype)
    for step in range(3):
        key = KEY.of(step)
        draws = augmentation.draw(key, len(images))
        found = augmentation.apply(images, key)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, plainly_changed(images, draws), rtol=0, atol=1.1 * 2 / 256 * 255)


@pytest.mark.parametrize("shape", SHAPES)
def test_means_are_exact_for_moves_by_fractions_of_a_pixel(shape):
    images = bytes_of(shape)
    for down, right in [(0.25, -0.5), (1.5, 1.75), (-0.00390625, 0), (-9.5, 0.5)]:
        draws = drawn(len(images), down=down, right=right)
        np.testing.assert_array_equal(changed(images, down=down, right=right), plainly_changed(images, draws))


# ------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_a_turn_by_right_angles_is_rot90(size, quarters):
    images = bytes_of((2, size, size, 3))
    found = changed(images, angle=quarters * math.pi / 2)
    np.testing.assert_array_equal(found, np.rot90(images, quarters, axes=(1, 2)))


@pytest.mark.parametrize("shape", SHAPES)
def test_mirrored_is_every_row_reversed(shape):
    images = bytes_of(shape)
    np.testing.assert_array_equal(changed(images, mirror=-1), images[:, :, ::-1])


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, 0), (0, -1), (-3, 4), (5, 5), (-7, 1), (400, -400)])
def test_moved_by_whole_pixels_is_a_slice_with_zeros_around(down, right):
    images = bytes_of((2, 6, 5, 3))
    padded = np.pad(images, ((0, 0), (400, 400), (400, 400), (0, 0)))
    expected = padded[:, 400 - down : 406 - down, 400 - right : 405 - right]
    np.testing.assert_array_equal(changed(images, down=down, right=right), expected)


def test_images_are_enlarged_and_reduced_about_the_center():
    row = np.array([0, 8, 16, 24], np.uint8).reshape(1, 1, 4, 1)
    assert changed(row, scale=2).ravel().tolist() == [6, 10, 14, 18]
    assert changed(row, scale=0.5).ravel().tolist() == [0, 4, 20, 0]
    column = row.reshape(1, 4, 1, 1)
    assert changed(column, scale=2).ravel().tolist() == [6, 10, 14, 18]


def test_mirrored_first_then_turned_then_moved():
    images = bytes_of((1, 4, 4, 2))
    expected = np.zeros(images.shape)
    expected[:, 1:, :3] = np.rot90(images[:, :, ::-1], axes=(1, 2))[:, :3, 1:]
    found = changed(images, mirror=-1, angle=math.pi / 2, down=1, right=-1)
    np.testing.assert_array_equal(found, expected)


def test_brightness_is_one_factor_for_all_pixels_of_an_image():
    images = bytes_of((3, 4, 5, 3)) | 1
    found = Augmentation.parse("brightness=0.5").apply(images, KEY)
    factors = [set(np.unique(np.round(one, 5))) for one in found / images]
    assert all(len(one) == 1 and 0.5 <= min(one) <= 1.5 for one in factors)
    assert len(set.union(*factors)) == 3


# ---------------------------------------------------------------------------------------------- no change


@pytest.mark.parametrize("asked", [Transforms(), Transforms.parse("rotate=0,crop=0,shift=0,scale=0,brightness=0.0")])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_transform_keeps_the_bits(asked, dtype):
    images = bytes_of((2, 3, 5, 3)).astype(dtype)
    if dtype == np.float32:
        images[0, 0, 0] = -0.0
    assert Augmentation(asked).apply(images, KEY).tobytes() == images.astype(np.float32).tobytes()


def test_an_image_that_is_not_moved_keeps_its_bits():
    """Of 200 images, mirrored or not and moved by -1, 0 or 1 pixel along each axis, about one in eighteen stays."""
    augmentation = Augmentation.parse("crop=1,flip")
    images = np.concatenate([Key(0).normal(200 * 20).astype(np.float32).reshape(-1, 5, 4, 1), np.zeros((50, 5, 4, 1))])
    images = images.astype(np.float32)
    images[::3] *= -1  # some zeros become -0.0
    draws = augmentation.draw(KEY, len(images))
    stay = (draws.down == 0) & (draws.right == 0) & (draws.mirror == 1)
    found = augmentation.apply(images, KEY)
    assert 5 < stay.sum() < 30
    assert found[stay].tobytes() == images[stay].tobytes()
    assert [bool((a != b).any()) for a, b in zip(found[:200], images, strict=False)] == (~stay[:200]).tolist()


def test_images_stay_unchanged_and_out_may_be_the_images():
    images = bytes_of((3, 6, 6, 2)).astype(np.float32)
    before = images.copy()
    for asked in (ALL, "flip", "brightness=0.3"):
        augmentation = Augmentation.parse(asked)
        expected, out = augmentation.apply(images, KEY), np.empty_like(images)
        assert augmentation.apply(images, KEY, out) is out
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(images, before)
        assert not np.shares_memory(expected, augmentation.apply(images, KEY)), "a result is overwritten by the next"
        out[...] = images
        np.testing.assert_array_equal(augmentation.apply(out, KEY, out), expected)


# ---------------------------------------------------------------------------------------------------------- the key


def test_the_same_key_gives_the_same_bits_after_any_other_call():
    images = bytes_of((16, 8, 8, 1))
    fresh, used = Augmentation.parse(ALL), Augmentation.parse(ALL)
    for other in ((16, 8, 8, 1), (5, 8, 8, 1), (16, 9, 7, 2), (0, 8, 8, 1)):
        used.apply(bytes_of(other, seed=1), KEY.of(7))
    assert used.apply(images, KEY).tobytes() == fresh.apply(images, KEY).tobytes()
    assert used.apply(images, KEY).tobytes() == fresh.apply(images.astype(np.float32), KEY).tobytes()


def test_another_micro_batch_step_or_seed_gives_other_images():
    images, augmentation = bytes_of((16, 8, 8, 1)), Augmentation.parse(ALL)
    keys = [Key(seed).of("training", step, index) for seed in (0, 1) for step in (0, 1) for index in (0, 1)]
    found = {augmentation.apply(images, key).tobytes() for key in keys}
    assert len(found) == len(keys)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_micro_batch_is_the_same_on_every_rank(ranks):
    """Each rank has its own augmentation, and computes its micro-batches one by one, as the trainer does."""
    rows, size = bytes_of((37, 8, 8, 1)), 8  # five micro-batches; the last one is ragged
    step = Key(0).of("training", 12)
    alone = Augmentation.parse(ALL)
    expected = [alone.apply(rows[i * size : (i + 1) * size], step.of(i)) for i in range(5)]
    for rank in range(ranks):
        own = Augmentation.parse(ALL)
        for index in reversed(range(rank, 5, ranks)):
            images = own.apply(rows[index * size : (index + 1) * size], step.of(index))
            assert images.tobytes() == expected[index].tobytes()


def test_one_more_transform_does_not_change_the_others():
    some, more = (Augmentation.parse(asked).draw(KEY, 9) for asked in ("rotate=10,crop=2", ALL))
    np.testing.assert_array_equal(some.angle, more.angle)
    assert (np.abs(some.down - more.down) <= 2).all()
    assert not (some.brightness == more.brightness).any()


# ----------------------------------------------------------------------------------------------------------- ranges


def test_the_draws_are_uniform_within_the_limits():
    count = 20_000
    draws = Augmentation.parse("rotate=10,shift=2,scale=0.1,flip,brightness=0.3").draw(KEY, count)
    for values, middle, most in [
        (np.rad2deg(draws.angle), 0, 10),
        (draws.down, 0, 2),
        (draws.right, 0, 2),
        (draws.scale, 1, 0.1),
        (draws.brightness, 1, 0.3),
    ]:
        normalized = (values - middle) / most
        assert -1 <= normalized.min() < -0.999
        assert 0.999 < normalized.max() <= 1
        quarters = np.histogram(normalized, bins=4, range=(-1, 1))[0] / count
        np.testing.assert_allclose(quarters, 0.25, atol=0.015)
    assert set(draws.mirror) == {-1, 1}
    assert abs(draws.mirror.mean()) < 0.03
    every = [draws.angle, draws.scale, draws.down, draws.right, draws.mirror, draws.brightness]
    np.testing.assert_allclose(np.corrcoef(every), np.eye(6), atol=0.03)


def test_a_crop_uses_every_place_of_the_padded_image_equally_often():
    draws = Augmentation.parse("crop=2").draw(KEY, 10_000)
    values, counts = np.unique(np.stack([draws.down, draws.right]), axis=1, return_counts=True)
    assert values.T.tolist() == [[down, right] for down in range(-2, 3) for right in range(-2, 3)]
    np.testing.assert_allclose(counts / 10_000, 1 / 25, atol=0.008)


shapes = st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
pixels = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    shapes.flatmap(lambda shape: arrays(np.uint8, shape) | arrays(np.float32, shape, elements=pixels)),
    st.integers(0, 2**32),
    st.sampled_from([GEOMETRIC, "rotate=180", "shift=0.7", "scale=0.9", "crop=1", "flip"]),
)
def test_moved_pixels_never_leave_the_range_of_the_image_and_the_background(images, seed, asked):
    found = Augmentation.parse(asked).apply(images, Key(seed))
    assert found.shape == images.shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    for before, after in zip(images, found, strict=True):
        assert min(0, before.min()) <= after.min()
        assert after.max() <= max(0, before.max())


@given(shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=pixels)), st.integers(0, 2**32))
def test_no_pixel_is_ever_nan(images, seed):
    most = ",".join(f"{name}={value}" for name, value in LARGEST.items())
    assert np.isfinite(Augmentation.parse(most + ",flip").apply(images, Key(seed))).all()


def test_a_repeated_call_allocates_less_than_one_array_of_pixels():
    images, out = bytes_of((16, 64, 64, 1)), np.empty((16, 64, 64, 1), np.float32)
    augmentation = Augmentation.parse(ALL)
    augmentation.apply(images, KEY, out)
    tracemalloc.start()
    try:
        for step in range(5):
            augmentation.apply(images, KEY.of(step), out)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < out.nbytes / 2
    assert after < 4096


# --------------------------------------------------------------------------------------------------------- the text


def test_transforms_are_read_in_any_order_and_with_spaces():
    expected = Transforms(rotate=10, shift=2.5, scale=0.1, crop=2, flip=True, brightness=0.1)
    assert Transforms.parse("rotate=10,shift=2.5,scale=0.1,crop=2,flip,brightness=.1") == expected
    assert Transforms.parse(" flip , brightness = 1e-1,crop=02,scale=0.10,shift=2.5, rotate=10.0 ") == expected
    assert Transforms.parse("rotate=180,scale=.9,brightness=1") == Transforms(rotate=180, scale=0.9, brightness=1)


BAD = [
    ("", "--augment '': unknown transform '': expected one of brightness, crop, flip, rotate, scale, shift"),
    ("rotate=10,", "--augment '': unknown transform ''"),
    ("rotates=10", "--augment 'rotates=10': unknown transform 'rotates'"),
    ("rotates=10", "did you mean 'rotate'?"),
    ("Flip", "did you mean 'flip'?"),
    ("flip,zoom=2", "--augment 'zoom=2': unknown transform 'zoom'"),
    ("rotate", "--augment 'rotate': rotate takes a number; write rotate=10, for example"),
    ("rotate=", "--augment 'rotate=': '' is not a number from 0 to 180"),
    ("rotate=ten", "'ten' is not a number from 0 to 180"),
    ("rotate=-10", "'-10' is not a number from 0 to 180"),
    ("rotate=181", "'181' is not a number from 0 to 180"),
    ("rotate=nan", "'nan' is not a number"),
    ("rotate=inf", "'inf' is not a number"),
    ("rotate=1e999", "'1e999' is not a number"),
    ("rotate=1_0", "'1_0' is not a number"),
    ("rotate=١", "is not a number"),
    ("rotate=10=20", "'10=20' is not a number"),
    ("scale=1", "'1' is not a number from 0 to 0.9"),
    ("brightness=1.5", "'1.5' is not a number from 0 to 1"),
    ("crop=2.5", "--augment 'crop=2.5': '2.5' is not a whole number from 0 to 1000"),
    ("crop=" + "9" * 5000, "is not a whole number"),
    ("shift=1001", "'1001' is not a number from 0 to 1000"),
    ("flip=1", "--augment 'flip=1': flip is a switch and takes no value; write flip alone"),
    ("flip,crop=1,flip", "--augment 'flip': flip is given twice"),
    ("rotate=1,rotate=1", "--augment 'rotate=1': rotate is given twice"),
    ("rotate:10", "unknown transform 'rotate:10'"),
    ("flip\ncrop=1", "unknown transform"),
    ("\x1b[31m", "unknown transform"),
    ("z" * 5000, "unknown transform 'zzz"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[repr(text[:12]) for text, _ in BAD])
def test_a_wrong_text_is_one_line_that_names_the_wrong_part(text, said):
    with pytest.raises(UserError) as caught:
        Augmentation.parse(text)
    message = str(caught.value)
    assert said in message
    assert message.startswith("--augment ")
    assert message.isprintable()
    assert len(message) < 300


@pytest.mark.parametrize(
    "given", [{"rotate": -1}, {"scale": math.nan}, {"crop": 1.5}, {"flip": 1}, {"shift": "2"}, {"brightness": True}]
)
def test_settings_of_a_script_are_also_checked(given):
    with pytest.raises(UserError, match=f"--augment {next(iter(given))}="):
        Transforms(**given)


def test_a_move_out_of_sight_is_refused_when_the_size_is_known():
    for text in ("shift=7.5", "crop=7", "shift=4.5,crop=3"):
        Transforms.parse(text).check_fit(8, 20)
    with pytest.raises(UserError, match=r"--augment shift=7.5,crop=7 together can move images of 8x20 pixels out of"):
        Transforms.parse("shift=7.5,crop=7").check_fit(8, 20)
    for text in ("shift=8", "crop=8"):
        with pytest.raises(UserError, match=f"--augment {text} can move images of 8x20 pixels out of sight"):
            Transforms.parse(text).check_fit(8, 20)


def test_every_transform_has_limits_or_is_a_switch():
    assert {*LARGEST, "flip"} == set(NAMES)
