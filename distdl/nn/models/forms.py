"""Which form of a network an image gets: the original one, made for large images, or one for 28x28 and 32x32."""

from __future__ import annotations

from distdl.errors import UserError
from distdl.nn.layers import Shape, show_shape

#: Least and largest side, in pixels, of the images that the small forms take.
SMALL_SIDES = (28, 64)
#: Least side of the images that the original forms take.
ORIGINAL_SIDE = 192


def is_original(model: str, input_shape: Shape, made_for: str = "224x224") -> bool:
    """Return whether images of this shape (H, W, C) get the original form; if not, they get the small one.

    The rule: sides of 28 to 64 pixels get the small form, sides of at least 192 the original. Raises `UserError` for
    whatever is no image, or fits neither.
    """
    if len(input_shape) != 3:
        raise UserError(
            f"{model} takes images: input {show_shape(input_shape)} given, expected height x width x channels"
        )
    sides, (least, most) = input_shape[:2], SMALL_SIDES
    if min(sides) >= ORIGINAL_SIDE:
        return True
    if least <= min(sides) and max(sides) <= most:
        return False
    raise UserError(
        f"{model} takes images with sides of {least} to {most} pixels (its form for small images) or of at least "
        f"{ORIGINAL_SIDE} (the original, made for {made_for}), not {show_shape(input_shape)}: resize the images, or "
        "give a model that takes any size, such as mlp or resnet20"
    )
