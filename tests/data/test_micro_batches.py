"""Micro-batches are normalized, augmented if asked, and written into the same buffers."""

import numpy as np
import pytest

from distdl.data import MicroBatches, PreparedDataset
from distdl.data.augmentation import Augmentation
from distdl.rng import Key

IMAGES = np.arange(10 * 6 * 5 * 2, dtype=np.uint8).reshape(10, 6, 5, 2)
ROWS = np.array([7, 3, 9, 0, 4, 1, 8])
KEY = Key(0).of("training", 0)


def dataset_of(dtype=np.uint8, labels=None):
    labels = np.arange(10) if labels is None else labels
    return PreparedDataset.for_training_only(IMAGES.astype(dtype), labels, 10)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_micro_batch_has_the_normalized_images_and_the_labels_of_its_rows(dtype):
    data = dataset_of(dtype)
    batches = MicroBatches(data, 3)
    assert [batches.count(samples) for samples in (1, 3, 4, 7)] == [1, 1, 2, 3]
    for index in range(3):
        rows = ROWS[3 * index : 3 * index + 3]
        images, labels = batches.load(ROWS, index)
        assert images.dtype == np.float32
        np.testing.assert_array_equal(images, data.normalization.apply(data.images[rows]))
        assert labels.tolist() == rows.tolist()
    assert data.images.tobytes() == IMAGES.astype(dtype).tobytes(), "the dataset stays unchanged"


@pytest.mark.parametrize("shape", [(28, 28, 1), (11, 29, 3), (2, 2, 700), (2, 2, 1)])
def test_compiled_kernels_load_the_same_bits(shape):
    pytest.importorskip("numba")
    from distdl.nn.kernels.compiled import COMPILED

    images = np.random.default_rng(0).integers(0, 256, (9, *shape), dtype=np.uint8)
    images.flags.writeable = False
    data = PreparedDataset.for_training_only(images, np.arange(9), 10)
    moments = data.normalization.mean, data.normalization.deviation
    assert COMPILED.row_loader(data.images, *moments) is not None
    ours, theirs = MicroBatches(data, 4, row_loader=COMPILED.row_loader), MicroBatches(data, 4)
    for index in range(3):
        found, expected = (batches.load(np.arange(8, -1, -1), index) for batches in (ours, theirs))
        assert found[0].tobytes() == expected[0].tobytes()
        np.testing.assert_array_equal(found[1], expected[1])
    assert COMPILED.row_loader(images.astype(np.float32), *moments) is None
    assert COMPILED.row_loader(images[:, ::2], *moments) is None


def test_only_a_key_augments_and_labels_of_pixels_move_along():
    data, augmentation = dataset_of(labels=IMAGES[..., 0].astype(np.int64)), Augmentation.parse("crop=2,flip")
    batches = MicroBatches(data, 3, augmentation)
    plain = MicroBatches(data, 3).load(ROWS, 1, KEY)
    for found, expected in zip(batches.load(ROWS, 1), plain, strict=True):
        np.testing.assert_array_equal(found, expected)
    images, labels = batches.load(ROWS, 1, KEY)
    rows = ROWS[3:6]
    np.testing.assert_array_equal(images, data.normalization.apply(augmentation.apply(data.images[rows], KEY)))
    np.testing.assert_array_equal(labels, augmentation.apply_to_labels(data.labels[rows], KEY))
    assert (labels != data.labels[rows]).any()


def test_micro_batches_of_one_size_share_an_aligned_buffer():
    batches = MicroBatches(dataset_of(), 3)
    first, ragged, second = (batches.load(ROWS, index)[0] for index in (0, 2, 1))
    assert first is second
    assert not np.shares_memory(first, ragged)
    assert first.ctypes.data % 64 == ragged.ctypes.data % 64 == 0
