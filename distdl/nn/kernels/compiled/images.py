"""Loading of images: rows of bytes become normalized numbers in one pass.

``(x - mean) / deviation`` in float32, as `distdl.data.normalization` defines it: the bits are those of the NumPy form.
"""

from collections.abc import Callable

import numpy as np

from distdl.nn.kernels.compiled.arrays import KeptArrays
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.kernels.compiled.simd import WIDTH, load, load_pixels, prefetch, store
from distdl.nn.layers import Array

#: Numbers of an image that one inner loop normalizes, at least.
BLOCK = 512
#: Bytes of a line of the cache, and bytes of the next image that are fetched ahead, so that it fits with this one.
LINE, AHEAD = 64, 4096


@kernel
def load_rows(images_, rows_, mean_, deviation_, period, out_):
    """Write the normalized `rows` of the images (I, n). `mean` and `deviation` have those of `period` + 16 numbers."""
    images, mean, deviation, out = images_.ctypes.data, mean_.ctypes.data, deviation_.ctypes.data, out_.ctypes.data
    n = images_.shape[1]
    for i in range(len(rows_)):
        if i + 1 < len(rows_):
            next_ = images + rows_[i + 1] * n
            for line in range(0, min(n, AHEAD), LINE):
                prefetch(next_ + line)
        x, y = images + rows_[i] * n, out + 4 * i * n
        if n < WIDTH:
            for j in range(n):
                out_[i, j] = (np.float32(images_[rows_[i], j]) - mean_[j % period]) / deviation_[j % period]
            continue
        for start in range(0, n, period):
            for j in range(0, min(period, n - start), WIDTH):
                at, p = start + j, j
                if at > n - WIDTH:  # the last vector overlaps the one before
                    at = n - WIDTH
                    p = at % period
                store(y, at, (load_pixels(x + at) - load(mean, p)) / load(deviation, p))


def row_loader(images: Array, mean: Array, deviation: Array) -> Callable[[Array, Array], Array] | None:
    """Return a function of rows (N,) and an array (N, ...) that writes the normalized images there and returns it.

    Return None unless the images (I, ...) are contiguous bytes. No row may be out of range.
    """
    if images.dtype != np.uint8 or not images.flags.c_contiguous:
        return None
    flat = images.view(np.ndarray).reshape(len(images), -1)
    flat.flags.writeable = False
    channels = len(mean)
    period = -(-BLOCK // channels) * channels
    mean, deviation = np.resize(mean, period + WIDTH), np.resize(deviation, period + WIDTH)
    kept = KeptArrays()

    def write(rows: Array, out: Array) -> Array:
        numbers = kept.array("rows", rows.shape, np.int64)
        numbers[...] = rows
        load_rows(flat, numbers, mean, deviation, period, out.reshape(len(out), -1))
        return out

    return write
