"""Mean and deviation of each channel, measured on the training part alone; also those of the numbers to predict.

For bytes the measurement is exact: it uses integer sums alone. A row gets the same bits in every batch.

Dimensions: N samples, H height, W width, C channels; n rows of a block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.errors import UserError
from distdl.mapped_files import release_pages

BLOCK_ELEMENTS = 2**20
#: Mean and variance of each channel.
Moments = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Normalization:
    """``y = (x - mean) / deviation``, per channel; both are (C,) float32."""

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]

    def apply(self, images: NDArray[Any], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return the normalized images (n, H, W, C) float32, in `out` if it is given.

        `images` are (n, H, W, C), uint8 or float32, and stay unchanged.

        >>> ones = np.ones(1, np.float32)
        >>> Normalization(mean=ones, deviation=2 * ones).apply(np.full((1, 1, 2, 1), 7, np.uint8)).ravel()
        array([3., 3.], dtype=float32)
        """
        if out is None:
            out = np.empty(images.shape, np.float32)
        np.subtract(images, self.mean, out=out, dtype=np.float32)
        return np.divide(out, self.deviation, out=out)

    def undo(self, normalized: NDArray[Any]) -> NDArray[Any]:
        """Return ``deviation · normalized + mean`` in the dtype of `normalized`: the opposite of `apply`."""
        restored: NDArray[Any] = normalized * self.deviation.astype(normalized.dtype)
        restored += self.mean.astype(normalized.dtype)
        return restored


def measure(images: NDArray[Any], rows: NDArray[np.int64]) -> Normalization:
    """Return mean and deviation of each channel over the given rows of `images` (N, H, W, C), uint8 or float32.

    ``mean = Σx / m`` and ``deviation = √(Σ(x - mean)² / m)`` over the m pixels of a channel. For uint8 both sums are
    exact. A constant channel gets deviation 1, so it becomes zero. Raises `UserError` if a pixel is not finite.
    """
    moments = _moments_of_bytes if images.dtype == np.uint8 else _moments_of_floats
    with np.errstate(invalid="ignore"):  # infinite pixels are refused below
        mean, variance = moments(images, rows)
    if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        raise UserError("the images hold NaN or infinite pixels: expected finite numbers; correct the dataset")
    deviation = np.sqrt(variance).astype(np.float32)
    deviation[deviation == 0] = 1
    return Normalization(mean.astype(np.float32), deviation)


def constant_channels(images: NDArray[Any], rows: NDArray[np.int64], normalization: Normalization) -> list[int]:
    """Return the channels that have one value in all the given rows; `normalization` is their measurement."""
    candidates = np.flatnonzero(normalization.deviation == 1).tolist()
    value = images[rows[0], 0, 0]
    return [
        channel
        for channel in candidates
        if all((block[:, channel] == value[channel]).all() for block in _blocks(images, rows))
    ]


def _blocks(images: NDArray[Any], rows: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """Yield the given rows as blocks (n·H·W, C): one image, or as many as fit into `BLOCK_ELEMENTS`."""
    channels = images.shape[-1]
    size = max(1, BLOCK_ELEMENTS // math.prod(images.shape[1:]))
    for start in range(0, len(rows), size):
        yield images[rows[start : start + size]].reshape(-1, channels)
        release_pages(images)


def _moments_of_bytes(images: NDArray[np.uint8], rows: NDArray[np.int64]) -> Moments:
    """Return mean and variance from the histogram of each channel; each is rounded once."""
    histograms = np.zeros((images.shape[-1], 256), np.int64)
    for block in _blocks(images, rows):
        histograms += [np.bincount(pixels, minlength=256) for pixels in block.T]
    mean, variance = [], []
    for occurrences in histograms.tolist():
        # Integers of Python do not overflow, and their division rounds once.
        count = sum(occurrences)
        total = sum(value * n for value, n in enumerate(occurrences))
        squares = sum(value * value * n for value, n in enumerate(occurrences))
        mean.append(total / count)
        variance.append((count * squares - total * total) / (count * count))
    return np.array(mean, np.float64), np.array(variance, np.float64)


def _moments_of_floats(images: NDArray[np.float32], rows: NDArray[np.int64]) -> Moments:
    """Return mean and variance from two passes in float64.

    The sum of half a billion equal float32 numbers fits into its 53 bits. So a constant channel has variance zero.
    """
    count = len(rows) * math.prod(images.shape[1:-1])
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in _blocks(images, rows)) / count
    variance = sum(np.square(block - mean).sum(axis=0) for block in _blocks(images, rows)) / count
    return np.asarray(mean), np.asarray(variance)
