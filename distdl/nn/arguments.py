"""Checks of the numbers and shapes that layers are given."""

import operator
from typing import Any

from distdl.errors import UserError


def as_whole(given: Any, least: int) -> int | None:
    """Return a whole number of any integer type as an `int`; None if it is not whole, or below `least`."""
    if isinstance(given, bool):
        return None
    try:
        number = operator.index(given)
    except TypeError:
        return None
    return number if number >= least else None


def whole_number(layer: str, name: str, given: Any, least: int = 1) -> int:
    """Return the setting `name` of a layer as an `int`; raise `UserError` if it is not whole, or below `least`."""
    number = as_whole(given, least)
    if number is None:
        raise UserError(f"{layer}: {name} {given!r} given, expected a whole number of at least {least}")
    return number


def image_shape(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (H, W, C); raise `UserError` if the input is not an image."""
    if len(input_shape) != 3:
        raise UserError(f"input {show_shape(input_shape)} is not an image; expected height x width x channels")
    H, W, C = input_shape
    return H, W, C


def show_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as text.

    >>> show_shape((28, 28, 1))
    '28x28x1'
    """
    return "x".join(str(n) for n in shape)
