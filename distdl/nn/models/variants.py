"""The variants of a network: the original one, for large images, and a small one, for 28x28 and 32x32."""

from distdl.errors import UserError
from distdl.nn.arguments import show_shape
from distdl.nn.layers import Shape

#: Smallest and largest side, in pixels, of the images for the small variants.
SMALL_SIDES = (28, 64)
#: Smallest side of the images for the original variants.
ORIGINAL_SIDE = 192


def is_original(model: str, input_shape: Shape, made_for: str = "224x224") -> bool:
    """Return whether images of this shape (H, W, C) need the original variant; if not, they need the small one.

    Sides of 28 to 64 pixels select the small variant, sides of at least 192 the original. Raises `UserError` if the
    input is not an image, or fits neither.
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
        f"{model} takes images with sides of {least} to {most} pixels (its small variant) or of at least "
        f"{ORIGINAL_SIDE} (the original, made for {made_for}), not {show_shape(input_shape)}: resize the images, or "
        "give a model for any size, such as mlp or resnet20"
    )
