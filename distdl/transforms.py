"""The value of `--augment`, parsed and checked; `data/augmentation.py` applies it.

This module imports neither NumPy nor MPI. So the config can check the flag before they are loaded.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from distdl.errors import UserError, one_line, unknown_name

#: The limit of each. A shift by more pixels than the image has is refused later, by `check_fit`.
LARGEST = {"rotate": 180, "shift": 1000, "scale": 0.9, "crop": 1000, "brightness": 1}
WHOLE = re.compile("[0-9]{1,9}")
NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """The limits of the random changes of each image in training; 0 means no change.

    Raises `UserError` for a value out of range.

    >>> Transforms.parse("rotate=10, shift=1.5, flip")
    Transforms(rotate=10.0, shift=1.5, scale=0.0, crop=0, flip=True, brightness=0.0)
    """

    rotate: float = 0.0
    """Degrees, up to 180: turn about the center by at most this angle, either way."""
    shift: float = 0.0
    """Pixels: move by at most this distance, down or up and right or left, also by fractions of a pixel."""
    scale: float = 0.0
    """Fraction, up to 0.9: enlarge about the center by a factor from 1 - scale to 1 + scale."""
    crop: int = 0
    """Pixels: pad every side, then cut out a piece of the old size; this moves the image by whole pixels."""
    flip: bool = False
    """Switch: mirror half of the images left to right."""
    brightness: float = 0.0
    """Fraction, up to 1: multiply all pixels by one factor from 1 - brightness to 1 + brightness."""

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise UserError(f"--augment {name}={value!r}: expected a number from 0 to {most}")
        if not isinstance(self.crop, int):
            raise UserError(f"--augment crop={self.crop!r}: expected a whole number of pixels")
        if not isinstance(self.flip, bool):
            raise UserError(f"--augment flip={self.flip!r}: expected True or False")

    @staticmethod
    def parse(text: str) -> Transforms:
        """Return the transforms in a text such as ``rotate=10,shift=2,flip``, in any order.

        Raises `UserError`, which names the wrong part.
        """
        found: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip(" ") for piece in part.partition("="))
            shown = "--augment " + repr(_short(part.strip(" ")))
            if name not in NAMES:
                raise UserError(f"{shown}: {unknown_name('transform', _short(name), NAMES)}")
            if name in found:
                raise UserError(f"{shown}: {name} is given twice; give it once")
            if name == "flip":
                if equals:
                    raise UserError(f"{shown}: flip is a switch and takes no value; write flip alone")
                found[name] = True
                continue
            if not equals:
                raise UserError(f"{shown}: {name} takes a number; write {name}={EXAMPLES[name]}, for example")
            pattern, kind = (WHOLE, "a whole number") if name == "crop" else (NUMBER, "a number")
            if not pattern.fullmatch(value) or not float(value) <= LARGEST[name]:
                raise UserError(f"{shown}: {_short(value)!r} is not {kind} from 0 to {LARGEST[name]}")
            found[name] = (int if name == "crop" else float)(value)
        return Transforms(**found)

    @property
    def moves(self) -> bool:
        """True if a transform moves pixels."""
        return bool(self.rotate or self.shift or self.scale or self.crop or self.flip)

    def check_fit(self, height: int, width: int) -> None:
        """Raise `UserError` if a move could take images of this size out of sight."""
        for name in ("shift", "crop"):
            if getattr(self, name) >= min(height, width):
                raise UserError(
                    f"--augment {name}={getattr(self, name):g} can move images of {height}x{width} pixels out of "
                    f"sight: give less than {min(height, width)}"
                )
        if self.shift + self.crop >= min(height, width):
            raise UserError(
                f"--augment shift={self.shift:g},crop={self.crop} together can move images of {height}x{width} pixels "
                f"out of sight: give a sum of less than {min(height, width)}"
            )


NAMES = tuple(field.name for field in dataclasses.fields(Transforms))
EXAMPLES = {"rotate": "10", "shift": "2", "scale": "0.1", "crop": "2", "brightness": "0.1"}


def _short(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= 40 else text[:37] + "..."
