"""An image file becomes pixels: `read_image`, the same for training and prediction. No file is trusted.

- The format is known from the content, not from the name.
- The image is turned upright, as the camera noted it (EXIF).
- Transparent pixels are laid over white.
- Channels of 16 bits keep their upper 8 bits.
- Then the image is resized, with Pillow's filter BILINEAR, which averages over all pixels if the image shrinks.

Dimensions: N samples, H height, W width, C channels. Pillow's own sizes are (width, height).
"""

import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distdl.errors import DamagedFileError, UserError, quoted
from distdl.image_options import Resize
from distdl.regular_files import NotRegularError, open_regular

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF", "GIF")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp"),
    *(".pgm", ".ppm", ".pbm", ".pnm", ".webp", ".tif", ".tiff", ".gif"),
)
#: Beginnings of files that are often named as images, each with its place and the reason to refuse it.
CAUSES: tuple[tuple[int, tuple[bytes, ...], str], ...] = (
    (0, (b"<!doctype html", b"<html", b"<head"), "it is a web page"),
    (0, (b"<svg", b"<?xml"), "it is a drawing (SVG) or another XML file; draw it as PNG first"),
    (0, (b"version https://git-lfs",), "it is a pointer of Git LFS; fetch the file itself by git lfs pull"),
    (0, (b"%pdf",), "it is a PDF document; draw it as PNG first"),
    (4, (b"ftyp",), "it is HEIC, AVIF or a video; convert it to JPEG or PNG first"),
)
GRAY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}
COLORS = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
TRANSPARENT = {"LA", "La", "PA", "RGBA", "RGBa"}
#: The formats of which mode "I" holds 16 bits.
SIXTEEN_BITS = {"PNG", "PPM"}
WHITE, BLACK = 255, 0
STDERR = 2
LOGGER, NOTHING = logging.getLogger("PIL"), logging.NullHandler()
#: A file of so few bytes for its pixels is damaged, or one color. Up to `FREE_PIXELS` any file is accepted.
MOST_PIXELS_PER_BYTE, FREE_PIXELS = 1032, 2**20
#: EXIF orientations that exchange height and width.
TURNED = {5, 6, 7, 8}
ORIENTATION = 0x0112
#: The formats, and the notes in `image.info`, of which Pillow reads the orientation.
ORIENTED = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "PPM", "GIF"}
NOTES = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
#: A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size if that is at least this factor above the resized one. Pillow
#: uses the same factor for thumbnails.
GAP = 2.0


class UnusableImageError(Exception):
    """A file cannot be used as an image; the message is the reason, to follow the name of the file."""

    def __init__(self, reason: str, *, is_damaged: bool = True) -> None:
        super().__init__(reason)
        self.is_damaged = is_damaged

    def of(self, name: str) -> UserError:
        """Return the error for the user about the file of that name."""
        if self.is_damaged:
            return DamagedFileError(f"{name} is damaged or not an image: {self}; write or copy it again")
        return UserError(f"{name} cannot be used: {self}")


def read_image(
    file: Path | BinaryIO, *, size: tuple[int, int] | None = None, resize: Resize | None = None, channels: int
) -> NDArray[np.uint8]:
    """Return the pixels (H, W, C) of an image file, with 1 channel (gray) or 3 (red, green, blue).

    `size` (height, width) is the expected size; after `resize` every image has the size of that.

    Raises `UserError` if the file cannot be read, is not an image of a known kind, or has another size,
    `DamagedFileError` if it is damaged.
    """
    name = quoted(file) if isinstance(file, Path) else "the image"
    try:
        with strict_warnings():
            return decode(file, size=size, resize=resize, channels=channels)
    except UnusableImageError as error:
        raise error.of(name) from None
    except MemoryError:
        raise UserError(f"there is not enough memory for {name}: give a smaller image") from None


def decode(
    file: Path | BinaryIO, *, size: tuple[int, int] | None = None, resize: Resize | None = None, channels: int | None
) -> NDArray[np.uint8]:
    """Return the pixels as `read_image` does, but raise `UnusableImageError`. `channels` None: 1 if gray, else 3.

    Call it within `strict_warnings`.
    """
    with _open(file) as image:
        _check_kind(image)
        if size is not None and resize is None and sorted(image.size) != sorted(size):
            raise _other_size(image.size[::-1], size)  # before anything is decoded
        mode = "L" if channels == 1 or (channels is None and image.mode in GRAY) else "RGB"
        if resize is not None:
            _decode_smaller(image, mode, resize)
        with _silent_libtiff() if image.format == "TIFF" else nullcontext():
            image.load()
        found = _without_alpha(_upright(image), mode)
        if resize is not None:
            found = _resized(found, resize)
        pixels = np.asarray(found).reshape(found.height, found.width, len(mode))
    if size is not None and pixels.shape[:2] != size:
        raise _other_size(pixels.shape[:2], size)
    return pixels


def size_of(file: Path | BinaryIO) -> tuple[int, int]:
    """Return height and width as the first bytes of a file give them; raise `UnusableImageError`."""
    with _open(file) as image:
        _check_kind(image)
        turned = _orientation(image) in TURNED  # for a PNG file it may stand after the pixels, and stays unknown
        return (image.width, image.height) if turned else (image.height, image.width)


def has_colors(file: Path) -> bool:
    """Return whether an image has three channels, as its first bytes say; False if it is no image."""
    try:
        with _open(file) as image:
            return image.mode not in GRAY
    except UnusableImageError:
        return False


def has_image_name(file: Path) -> bool:
    """Return whether the name of a file ends like that of an image."""
    return file.suffix.lower() in SUFFIXES


def not_an_image(cause: str | None = None) -> UnusableImageError:
    """Return the error for a file whose name does not promise an image; `cause` is what it is, if that is known."""
    reason = cause or f"it is not an image: expected only {', '.join(SUFFIXES[:4])} …"
    return UnusableImageError(reason, is_damaged=False)


class OtherSizeError(UnusableImageError):
    """An image has another size than expected."""


def _other_size(found: tuple[int, ...], expected: tuple[int, int]) -> OtherSizeError:
    return OtherSizeError(
        f"it has {found[0]}x{found[1]} pixels (height x width), expected {expected[0]}x{expected[1]}; resize it first",
        is_damaged=False,
    )


def pillow() -> Any:
    """Return the module PIL.Image; raise `UserError` if Pillow is not installed."""
    try:
        found = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise UserError(
            "reading images needs Pillow, which is not installed: pip install 'distdl-mpi[images]', or give arrays by "
            "--dataset npz:FILE.npz"
        ) from error
    if NOTHING not in LOGGER.handlers:
        LOGGER.addHandler(NOTHING)  # otherwise Python prints Pillow's log about damaged files
    return found


@contextmanager
def strict_warnings() -> Iterator[None]:
    """Make Pillow's warning of too many pixels an error, and ignore those about content that is ignored anyway."""
    too_many = pillow().DecompressionBombWarning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", too_many)
        yield


@contextmanager
def _open(file: Path | BinaryIO) -> Iterator[Any]:
    """Yield the image of a file, not yet decoded. Raise `UnusableImageError`, also for errors while it is used."""
    image_module = pillow()
    stream: BinaryIO | None = None
    try:
        stream = _opened(file) if isinstance(file, Path) else file
        bytes_of_file = _bytes_of(stream)
        with image_module.open(stream, formats=FORMATS) as image:
            _check_pixels(image, bytes_of_file)
            yield image
    except (UnusableImageError, UserError, MemoryError):
        raise
    except (image_module.DecompressionBombWarning, image_module.DecompressionBombError) as error:
        reason = f"it has more pixels than Pillow accepts ({error}); make it smaller first"
        raise UnusableImageError(reason, is_damaged=False) from error
    except image_module.UnidentifiedImageError as error:
        if isinstance(file, Path) and not has_image_name(file):
            raise not_an_image(_cause(stream)) from error
        raise UnusableImageError(_cause(stream) or f"its content is not {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow raises many kinds for bytes that are not an image
        raise UnusableImageError(_cause(stream) or str(error) or type(error).__name__) from error
    finally:
        if isinstance(file, Path) and stream is not None:
            stream.close()


@contextmanager
def _silent_libtiff() -> Iterator[None]:
    """Discard what libtiff prints about a damaged file; the error of Pillow says it too."""
    sys.stderr.flush()
    with Path(os.devnull).open("wb") as nothing:
        kept = os.dup(STDERR)
        os.dup2(nothing.fileno(), STDERR)
        try:
            yield
        finally:
            os.dup2(kept, STDERR)
            os.close(kept)


def _check_pixels(image: Any, bytes_of_file: int) -> None:
    if image.width * image.height > FREE_PIXELS + MOST_PIXELS_PER_BYTE * bytes_of_file:
        raise UnusableImageError(f"it cannot hold {image.height}x{image.width} pixels in {bytes_of_file} bytes")


def _bytes_of(stream: BinaryIO) -> int:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    return size


def _opened(file: Path) -> BinaryIO:
    try:
        return open_regular(file, follow=True)
    except NotRegularError:
        raise UnusableImageError("it is not a regular file", is_damaged=False) from None
    except FileNotFoundError:
        what = "it is a link to a file that does not exist" if os.path.lexists(file) else "it does not exist"
        raise UnusableImageError(what, is_damaged=False) from None
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        reason = f"it cannot be read ({getattr(error, 'strerror', None) or error})"
        raise UnusableImageError(reason, is_damaged=False) from error


def _cause(stream: BinaryIO | None) -> str | None:
    """Return why a file is not an image, if its first bytes tell."""
    if stream is None:
        return None
    try:
        stream.seek(0)
        start = stream.read(512)
    except (OSError, ValueError, io.UnsupportedOperation):
        return None
    if not start:
        return "it is empty"
    if not any(start):
        return "its first bytes are all zero"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for place, beginnings, reason in CAUSES:
        if text[place:].startswith(beginnings):
            return reason
    return None


def _check_kind(image: Any) -> None:
    """Raise `UnusableImageError` if an opened image is of no known kind."""
    # A photo of some phones is an MPO file: a JPEG file with further pictures, such as a depth map, after the photo.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise UnusableImageError(f"it has {image.n_frames} pictures, expected one", is_damaged=False)
    is_deep = image.mode == "I" and image.format not in SIXTEEN_BITS
    if image.mode not in GRAY | COLORS or is_deep:
        reason = f"its pixels are of the kind {image.mode} ({image.format}); expected 8 or 16 bits a channel"
        raise UnusableImageError(reason, is_damaged=False)


def _orientation(image: Any) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or it cannot be read."""
    if image.format in ORIENTED and not NOTES & image.info.keys():
        return 1  # faster
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  a damaged note of the camera does not damage the image
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Any) -> Any:
    transpose = pillow().Transpose
    turns = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _without_alpha(image: Any, mode: str) -> Any:
    """Return the image in the mode "L" or "RGB", laid over white."""
    if image.mode.startswith("I"):
        upper = np.asarray(image).astype(np.int64) >> 8
        return pillow().fromarray(upper.clip(0, 255).astype(np.uint8)).convert(mode)
    if image.mode in TRANSPARENT or "transparency" in image.info:
        picture = image.convert("RGBA")
        background = pillow().new("RGBA", picture.size, (WHITE, WHITE, WHITE, 255))
        background.alpha_composite(picture)
        return background.convert("RGB").convert(mode)
    return image if image.mode == mode else image.convert(mode)


def _decode_smaller(image: Any, mode: str, resize: Resize) -> None:
    """Let a JPEG file be decoded at a fraction of its size, if it is much larger than it will be."""
    if image.format not in {"JPEG", "MPO"}:
        return
    height, width = resize.height, resize.width
    if _orientation(image) in TURNED:
        height, width = width, height
    if resize.mode == "pad":
        scale = min(width / image.width, height / image.height)
    else:
        scale = max(width / image.width, height / image.height)
    needed = (int(image.width * scale * GAP) + 1, int(image.height * scale * GAP) + 1)
    image.draft(mode if image.mode in {"L", "RGB"} else None, needed)


def _resized(image: Any, resize: Resize) -> Any:
    """Return the image in the new size."""
    size = (resize.width, resize.height)
    if image.size == size:
        return image
    bilinear = pillow().Resampling.BILINEAR
    across, down = resize.width / image.width, resize.height / image.height
    if resize.mode == "crop":
        scale = max(across, down)
        width, height = resize.width / scale, resize.height / scale
        # The full width or height may be off by rounding; Pillow allows no box beyond the image.
        left, top = max(0.0, (image.width - width) / 2), max(0.0, (image.height - height) / 2)
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        return image.resize(size, bilinear, box=box)
    if resize.mode == "pad":
        scale = min(across, down)
        inner = tuple(max(1, min(most, round(side * scale))) for most, side in zip(size, image.size, strict=True))
        canvas = pillow().new(image.mode, size, BLACK if image.mode == "L" else (BLACK, BLACK, BLACK))
        canvas.paste(image.resize(inner, bilinear), tuple((a - b) // 2 for a, b in zip(size, inner, strict=True)))
        return canvas
    return image.resize(size, bilinear)
