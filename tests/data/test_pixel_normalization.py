"""Mean and deviation of each channel, compared with those of NumPy in float64."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distdl.data import normalization
from distdl.data.normalization import Normalization, measure
from distdl.errors import UserError


def random_images(shape=(50, 6, 5, 3), dtype=np.uint8):
    pixels = np.random.default_rng(0).integers(0, 256, shape)
    # Channels differ, so that a swapped channel fails the test.
    return (pixels // (1 + np.arange(shape[-1]))).astype(dtype)


def some_rows(count=50):
    return np.arange(0, count, 3)


def same_bits(one, other):
    return one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("block_elements", [1, 200, 2**20])
def test_measure_equals_mean_and_deviation_in_float64(monkeypatch, dtype, channels, block_elements):
    monkeypatch.setattr(normalization, "BLOCK_ELEMENTS", block_elements)
    images = random_images((50, 6, 5, channels), dtype)
    measured = measure(images, some_rows())
    plain = images[some_rows()].astype(np.float64)
    assert measured.mean.dtype == measured.deviation.dtype == np.float32
    np.testing.assert_allclose(measured.mean, plain.mean(axis=(0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(measured.deviation, plain.std(axis=(0, 1, 2)), rtol=1e-7)


@settings(deadline=None)
@given(images=hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 4)))
def test_measure_of_bytes_is_exact(images):
    measured = measure(images, np.arange(len(images)))
    for channel in range(images.shape[-1]):
        pixels = [Fraction(value) for value in images[..., channel].ravel().tolist()]
        mean = sum(pixels) / len(pixels)
        variance = sum((value - mean) ** 2 for value in pixels) / len(pixels)
        assert measured.mean[channel] == np.float32(float(mean))
        assert measured.deviation[channel] == np.float32(float(variance) ** 0.5 or 1)


def test_normalization_is_measured_on_the_training_part_alone():
    images = random_images()
    before = measure(images, some_rows())
    others = np.setdiff1d(np.arange(50), some_rows())
    images[others] = 255 - images[others]
    after = measure(images, some_rows())
    assert same_bits(before.mean, after.mean)
    assert same_bits(before.deviation, after.deviation)
    images[some_rows()[0]] += 1
    assert not same_bits(before.mean, measure(images, some_rows()).mean)


def test_measure_of_bytes_does_not_depend_on_the_order_of_rows():
    images = random_images()
    one, other = measure(images, some_rows()), measure(images, some_rows()[::-1])
    assert same_bits(one.mean, other.mean)
    assert same_bits(one.deviation, other.deviation)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_constant_channel_of_bytes_becomes_zero(value):
    images = random_images()
    images[..., 1] = value
    measured = measure(images, some_rows())
    assert measured.deviation[1] == 1
    assert not measured.apply(images)[..., 1].any()


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 1e-40])
def test_a_constant_channel_of_floats_becomes_zero(value):
    """A sum of many 0.1 in float32 is no multiple of 0.1; the rounding error must not become a deviation."""
    images = random_images((1000, 6, 5, 3), np.float32)
    images[..., 1] = value
    measured = measure(images, some_rows(1000))
    assert measured.deviation[1] == 1
    assert not measured.apply(images)[..., 1].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_refused(value):
    images = random_images(dtype=np.float32)
    images[3, 2, 1, 0] = value
    with pytest.raises(UserError, match="NaN or infinite") as caught:
        measure(images, some_rows())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_memory_stays_small_for_a_large_dataset(dtype):
    images = np.zeros((2000, 128, 128, 3), dtype)
    tracemalloc.start()
    try:
        measure(images, np.arange(0, 2000, 2))
        assert tracemalloc.get_traced_memory()[1] < 48 * 2**20 < images[::2].nbytes * 2
    finally:
        tracemalloc.stop()


def test_the_normalized_training_part_has_mean_zero_and_deviation_one():
    images = random_images()
    training = measure(images, some_rows()).apply(images[some_rows()]).astype(np.float64)
    np.testing.assert_allclose(training.mean(axis=(0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(training.std(axis=(0, 1, 2)), 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_apply_is_one_subtraction_and_one_division_in_float32(dtype):
    images = random_images(dtype=dtype)
    before = images.copy()
    measured = measure(images, some_rows())
    out = np.full(images.shape, np.nan, np.float32)
    applied = measured.apply(images, out)
    assert applied is out
    assert same_bits(applied, (images.astype(np.float32) - measured.mean) / measured.deviation)
    assert same_bits(applied, measured.apply(images))
    assert same_bits(images, before)


@settings(deadline=None)
@given(data=st.data())
def test_a_row_gets_the_same_bits_in_every_batch(data):
    height, width, channels = (data.draw(st.integers(1, 9)) for _ in range(3))
    images = random_images((20, height, width, channels))
    measured = measure(images, np.arange(20))
    whole = measured.apply(images)
    rows = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=30))
    out = np.empty((40, height, width, channels), np.float32)[: len(rows)]
    assert same_bits(measured.apply(images[rows], out), whole[rows])


def test_apply_accepts_a_stored_measurement():
    stored = measure(random_images(), some_rows())
    again = Normalization(np.array(stored.mean.tolist(), np.float32), np.array(stored.deviation.tolist(), np.float32))
    assert same_bits(again.apply(random_images()), stored.apply(random_images()))
