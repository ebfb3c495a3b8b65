"""What `--augment` asks for, parsed and checked; `data/augmentation.py` does it.

This module imports neither NumPy nor MPI, so that the config can check the flag before either is loaded.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from distdl.errors import UserError, one_line, unknown_name

#: The most that each may ask for. A shift of more pixels than the image has is refused once its size is known.
LARGEST = {"rotate": 180, "shift": 1000, "scale": 0.9, "crop": 1000, "brightness": 1}
WHOLE = re.compile("[0-9]{1,9}")
NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """How far each image is changed at random in training; 0 is not at all.

    Raises `UserError` for a value out of range.

    >>> Transforms.parse("rotate=10, shift=1.5, flip")
    Transforms(rotate=10.0, shift=1.5, scale=0.0, crop=0, flip=True, brightness=0.0)
    """

    rotate: float = 0.0
    """Degrees, up to 180: turned about the center by up to so many, either way."""
    shift: float = 0.0
    """Pixels: moved by up to so many, down or up and right or left, in fractions of a pixel too."""
    scale: float = 0.0
    """Fraction, up to 0.9: enlarged about the center by a factor from 1 - scale to 1 + scale."""
    crop: int = 0
    """Pixels of padding on every side, out of which a piece of the old size is cut: moved by whole pixels."""
    flip: bool = False
    """Switch: mirrored left to right, half of the time."""
    brightness: float = 0.0
    """Fraction, up to 1: every pixel times one factor from 1 - brightness to 1 + brightness."""

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
        """Return what a text such as ``rotate=10,shift=2,flip`` says, in any order.

        Raises `UserError`, in one line that names the part at fault.
        """
        found: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip(" ") for piece in part.partition("="))
            shown = "--augment " + repr(_short(part.strip(" ")))
            if name not in NAMES:
                raise UserError(f"{shown}: {unknown_name('transform', _short(name), NAMES)}")
            if name in found:
                raise UserError(f"{shown}: {name} is there twice; give it once")
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
        """Whether any of them moves pixels."""
        return bool(self.rotate or self.shift or self.scale or self.crop or self.flip)

    def check_fit(self, height: int, width: int) -> None:
        """Raise `UserError` where images of so many pixels could be moved out of sight."""
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
