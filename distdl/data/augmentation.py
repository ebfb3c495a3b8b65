"""Random changes of training images, which give a network more images than the dataset has (section 8.1.2).

For each image one affine map is drawn (mirror, then turn and enlarge about the center, then move), and a factor of
brightness. A pixel of the new image is mapped back to a place in the old image. Its value is the bilinear mean of the
four pixels around that place. The background beyond the edge is zero before normalization.

Places are fixed-point numbers in steps of 1/256 pixel. So means of bytes are exact, and turns by 90 degrees, mirroring
and moves by whole pixels copy the pixels. Labels of pixels move by the same map, from the nearest pixel.

Dimensions: N samples, H height, W width, C channels; y grows downward, x to the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import NO_LABEL, aligned_empty, aligned_zeros
from distdl.elementary import sine_and_cosine
from distdl.rng import Key
from distdl.transforms import Transforms

STEPS_PER_PIXEL = 256
#: Pixels of background before an image, and before and after it together. So each place has four pixels around it.
BEFORE, AROUND = 1, 3
#: Random numbers of an image. All are always drawn, so that one more transform does not change the others.
NUMBERS = 8


@dataclass(frozen=True, eq=False)
class Draws:
    """The changes of N images; all (N,) float64."""

    angle: NDArray[np.float64]
    """Radians, counterclockwise."""
    scale: NDArray[np.float64]
    down: NDArray[np.float64]
    """Pixels."""
    right: NDArray[np.float64]
    mirror: NDArray[np.float64]
    """-1 if the image is mirrored left to right, else 1."""
    brightness: NDArray[np.float64]


class Augmentation:
    """Changes the images of a micro-batch by `transforms`; keeps work arrays for each number of samples.

    >>> flip = Augmentation.parse("flip,crop=1")
    >>> images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    >>> first, again = (flip.apply(images, Key(0).of("training", 5, 3)) for _ in range(2))
    >>> first.dtype.name, first.shape, bool((first == again).all())
    ('float32', (2, 2, 2, 1), True)
    """

    def __init__(self, transforms: Transforms) -> None:
        self.transforms = transforms
        self._work: dict[tuple[int, ...], _Work] = {}

    @staticmethod
    def parse(text: str) -> Augmentation:
        """Return the augmentation for a text such as ``rotate=10,shift=2,flip``: see `Transforms.parse`.

        Raises `UserError`, which names the wrong part.
        """
        return Augmentation(Transforms.parse(text))

    def apply(self, images: NDArray[Any], key: Key, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return the changed images (N, H, W, C) float32, in `out` if it is given: a function of images and key.

        `images` (N, H, W, C) are uint8 or float32, not yet normalized. They stay unchanged unless they are `out`.
        """
        return self.change(images, self.draw(key, len(images)), out)

    def apply_to_labels(self, labels: NDArray[np.int64], key: Key) -> NDArray[np.int64]:
        """Return the labels of pixels (N, H, W), moved as `apply` moves the images with the same key.

        Each is the label of the nearest pixel, or `NO_LABEL` if that is outside of the image.
        """
        return self.move_labels(labels, self.draw(key, len(labels))) if self.transforms.moves else labels

    def move_labels(self, labels: NDArray[np.int64], draws: Draws) -> NDArray[np.int64]:
        """Return the labels, moved by the given draws."""
        N, H, W = labels.shape
        row_y, column_y, row_x, column_x = _places(draws, H, W)
        y, x = ((terms + STEPS_PER_PIXEL // 2) // STEPS_PER_PIXEL for terms in (row_y + column_y, row_x + column_x))
        inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
        places = (np.arange(N).reshape(N, 1, 1) * H + y) * W + x
        return np.where(inside, labels.reshape(-1).take(places, mode="clip"), NO_LABEL)

    def draw(self, key: Key, count: int) -> Draws:
        """Return random changes for `count` images, uniform within the limits of `transforms`."""
        asked = self.transforms
        numbers = key.uniform(count * NUMBERS).reshape(count, NUMBERS)
        turn, grow, down, right, crop_y, crop_x, mirror, brighten = numbers.T
        pieces = 2 * asked.crop + 1  # positions of a piece along an axis
        return Draws(
            angle=np.deg2rad(asked.rotate * (2 * turn - 1)),
            scale=1 + asked.scale * (2 * grow - 1),
            down=asked.shift * (2 * down - 1) + np.floor(crop_y * pieces) - asked.crop,
            right=asked.shift * (2 * right - 1) + np.floor(crop_x * pieces) - asked.crop,
            mirror=np.where(asked.flip & (mirror < 0.5), -1.0, 1.0),
            brightness=1 + asked.brightness * (2 * brighten - 1),
        )

    def change(self, images: NDArray[Any], draws: Draws, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return the images (N, H, W, C) float32, changed by the given draws, in `out` if it is given."""
        if out is None:
            out = np.empty(images.shape, np.float32)
        moved = self._moved(images, draws) if self.transforms.moves else images
        np.multiply(moved, draws.brightness.astype(np.float32)[:, None, None, None], out=out)
        return out

    def _moved(self, images: NDArray[Any], draws: Draws) -> NDArray[np.float32]:
        """Return the images under their affine maps, in a work array."""
        N, H, W, C = images.shape
        work = self._work.get(images.shape)
        if work is None:
            work = self._work[images.shape] = _Work(N, H, W, C)
        work.framed[:, BEFORE : BEFORE + H, BEFORE : BEFORE + W] = images
        y, x = work.y, work.x
        terms = row_y, column_y, row_x, column_x = _places(draws, H, W)
        np.add(row_y, column_y, out=y)
        np.add(row_x, column_x, out=x)
        np.clip(y, -STEPS_PER_PIXEL, H * STEPS_PER_PIXEL, out=y)
        np.clip(x, -STEPS_PER_PIXEL, W * STEPS_PER_PIXEL, out=x)
        between = any(np.any(term % STEPS_PER_PIXEL) for term in terms)
        if between:
            work.parts(y, work.part_y)
            work.parts(x, work.part_x)

        # The index of the upper left of the four pixels, in the sequence of all framed images.
        line = W + AROUND
        y //= STEPS_PER_PIXEL
        x //= STEPS_PER_PIXEL
        y *= line
        y += x
        work.index[...] = y
        work.index += work.first
        pixels, places = work.framed.reshape(-1, C), work.index.reshape(-1)
        upper, upper_right, lower, lower_right = work.corners
        np.take(pixels, places, axis=0, out=upper, mode="wrap")  # no index wraps; the mode "raise" would copy
        if between:
            np.take(pixels[1:], places, axis=0, out=upper_right, mode="wrap")
            np.take(pixels[line:], places, axis=0, out=lower, mode="wrap")
            np.take(pixels[line + 1 :], places, axis=0, out=lower_right, mode="wrap")
            _mean(upper, upper_right, work.part_x)
            _mean(lower, lower_right, work.part_x)
            _mean(upper, lower, work.part_y)
        return upper.reshape(images.shape)


def _places(draws: Draws, H: int, W: int) -> tuple[NDArray[np.int32], ...]:
    """Return the place that each pixel is mapped back to, in steps: terms of y, (N, H, 1) and (N, 1, W); then of x.

    A place is the sum of a term of the pixel's row and a term of its column.
    """
    center_y, center_x = (H - 1) / 2, (W - 1) / 2
    each = (*sine_and_cosine(draws.angle), draws.scale, draws.mirror)
    sine, cosine, scale, mirror = (one[:, None, None] for one in each)
    cosine, sine = cosine / scale, sine / scale
    dy = np.arange(H)[:, None] - center_y - draws.down[:, None, None]
    dx = np.arange(W) - center_x - draws.right[:, None, None]
    return (
        _in_steps(cosine * dy + center_y),
        _in_steps(sine * dx),
        _in_steps(-mirror * sine * dy),
        _in_steps(mirror * cosine * dx + center_x),
    )


def _in_steps(pixels: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.rint(pixels * STEPS_PER_PIXEL).astype(np.int32)  # the range is eight million pixels each way


def _mean(first: NDArray[np.float32], second: NDArray[np.float32], part: NDArray[np.float32]) -> None:
    """Write ``first + part (second - first)`` into `first`; overwrite `second`."""
    second -= first
    second *= part
    first += second


class _Work:
    """Work arrays for images (N, H, W, C)."""

    def __init__(self, N: int, H: int, W: int, C: int) -> None:
        frame = (H + AROUND) * (W + AROUND)
        self.framed: NDArray[np.float32] = aligned_zeros((N, H + AROUND, W + AROUND, C))
        self.y, self.x, self.rest = (aligned_empty((N, H, W), np.int32) for _ in range(3))
        self.index = aligned_empty((N, H, W), np.intp)
        self.first = (np.arange(N) * frame + BEFORE * (W + AROUND) + BEFORE).reshape(N, 1, 1)
        self.part_y, self.part_x = (aligned_empty((N * H * W, 1), np.float32) for _ in range(2))
        self.corners = [aligned_empty((N * H * W, C), np.float32) for _ in range(4)]

    def parts(self, places: NDArray[np.int32], part: NDArray[np.float32]) -> None:
        """Set `part` to the fraction of a pixel in each place, 0 .. 255/256."""
        np.bitwise_and(places, STEPS_PER_PIXEL - 1, out=self.rest)
        part[...] = self.rest.reshape(-1, 1)
        part *= np.float32(1 / STEPS_PER_PIXEL)
