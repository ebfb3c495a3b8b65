"""Images as people save them: conversions without a choice, and shapes that cannot be images (N, H, W, C).

Dimensions: N samples, H height, W width, C channels.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.labels import Unfit

#: The most channels of an image that a person sees.
MOST_COLORS = 4
#: The smallest side of an image for which flat pixels (N, H * W) are accepted; fewer pixels may be measurements.
LEAST_SIDE = 8


def canonical_images(images: NDArray[Any], samples: int | None = None) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return images as uint8 or float32 (N, H, W, C), with warnings; raise `Unfit`. `samples` is N, if it is known.

    Flat images (N, D) of a square number D of pixels become square images with one channel.
    """
    if images.dtype.kind == "f":
        with np.errstate(over="ignore"):  # the check for finite pixels reports an overflow
            images = images.astype(np.float32, copy=False)
    what = f"images {images.dtype} {images.shape}"
    if images.ndim > 2 and len(images) != samples == images.shape[-1]:
        raise Unfit(what, "the samples on the first axis", "numpy.moveaxis(images, -1, 0) moves them there")
    notes: tuple[str, ...] = ()
    if images.ndim == 2 and images.size:
        images, notes = _from_flat(images)
    if images.ndim != 4 or not images.size or images.dtype not in (np.uint8, np.float32):
        raise Unfit(what, "uint8 or float32 (N, H, W, C)", _remedy(images))
    _, height, width, channels = images.shape
    is_square, is_pixel = height < width == channels, height == width == 1
    if channels > MOST_COLORS and (height <= MOST_COLORS or is_square) and not is_pixel:
        raise Unfit(
            f"images {images.shape}, which are {height} pixels high and {width} wide with {channels} channels",
            "(N, H, W, C)",
            "numpy.moveaxis(images, 1, -1) moves the channels to the end; if the height is right, "
            "images.swapaxes(1, 2) is accepted",
        )
    return images, notes


def _remedy(images: NDArray[Any]) -> str:
    if images.ndim == 3:
        return "images[..., numpy.newaxis] adds an axis for channels"
    if images.ndim != 4 or not images.size:
        return "correct the dataset"
    if images.dtype == bool or (images.dtype.kind in "iu" and 0 <= images.min() <= images.max() <= 255):
        return "images.astype(numpy.uint8) converts them"
    return "images.astype(numpy.float32) converts them"


def _from_flat(images: NDArray[Any]) -> tuple[NDArray[Any], tuple[str, ...]]:
    count, pixels = images.shape
    side = math.isqrt(pixels)
    if side**2 == pixels and side >= LEAST_SIDE:
        note = f"images {images.shape} are read as {side}x{side} pixels with one channel"
        return images.reshape(count, side, side, 1), (note,)
    side = math.isqrt(pixels // 3)
    if pixels % 3 == 0 and side**2 * 3 == pixels and side >= LEAST_SIDE:
        of_channels = f"images.reshape(-1, 3, {side}, {side}).transpose(0, 2, 3, 1)"
        remedy = f"images.reshape(-1, {side}, {side}, 3) if the colors of a pixel are adjacent, or {of_channels}"
    else:
        remedy = "images.reshape(-1, height, width, channels)"
    raise Unfit(f"flat images {images.shape}", "(N, H, W, C)", remedy)
