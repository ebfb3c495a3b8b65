"""How image files become pixels: the values of `--resize`, `--skip-damaged` and `--csv-columns`, parsed and checked.

`data/sources/images.py` applies them. This module imports neither NumPy nor MPI. So the config can check the flags
before they are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from distdl.errors import UserError, one_line, unknown_name

ResizeMode = Literal["crop", "pad", "stretch"]
MODES: tuple[str, ...] = get_args(ResizeMode)
#: The longest side of a resized image.
MOST_PIXELS = 4096
SIZE = re.compile("([0-9]{1,9})(?:x([0-9]{1,9}))?")


@dataclass(frozen=True)
class Resize:
    """The size that every image gets.

    >>> Resize.parse("32x48:pad")
    Resize(height=32, width=48, mode='pad')
    >>> str(Resize.parse("32"))
    '32x32:crop'
    """

    height: int
    width: int
    mode: ResizeMode = "crop"
    """crop: scale until the image covers the size, and cut off what is beyond, equally on both sides; pad: scale until
    the image fits into the size, and fill the rest with black; stretch: scale height and width on their own."""

    @staticmethod
    def parse(text: str) -> Resize:
        """Return the size and mode in a text such as ``32``, ``32x48`` (height x width) or ``32x48:pad``.

        Raises `UserError`, which names the wrong part.
        """
        size, colon, mode = (part.strip(" ") for part in text.partition(":"))
        shown = f"--resize {one_line(text)[:40]!r}"
        found = SIZE.fullmatch(size)
        if not found:
            raise UserError(
                f"{shown}: expected the height and width in pixels, such as 32x48, or one number for both, and "
                f"optionally one of {', '.join(':' + one for one in MODES)}"
            )
        height, width = int(found[1]), int(found[2] or found[1])
        if not (1 <= height <= MOST_PIXELS and 1 <= width <= MOST_PIXELS):
            raise UserError(f"{shown}: expected a height and a width from 1 to {MOST_PIXELS} pixels")
        if colon and mode not in MODES:
            raise UserError(f"{shown}: {unknown_name('mode', mode[:40], MODES)}")
        return Resize(height, width, mode or "crop")  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.height}x{self.width}:{self.mode}"


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The settings of a run for image files."""

    resize: str | None = None
    """A text for `Resize.parse`; None: all images must have one size."""
    skip_damaged: bool = False
    """Leave out files that cannot be used; otherwise they are refused."""
    cache: Path | None = None
    """The folder for decoded images, which are mapped instead of loaded into memory; None: load them."""
    csv_columns: str | None = None
    """The columns of a CSV file with the path and the label, separated by commas; None: by their usual names."""
    channels: int | None = None
    """1 for gray images, 3 for colors; None: 1 if all files are gray, otherwise 3."""
    data_gigabytes: float | None = None
    """The most memory for the data; see `data.room.Room`."""
    say: Callable[[str], None] | None = None
    """It gets a line on what the cache does; None: nothing is said."""
    least_classes: int = 2
    """The fewest folders of classes; a network that knows the class can be scored on one."""
