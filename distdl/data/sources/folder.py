"""A user's own images in a folder, with a folder for each class (`docs/data.md` describes the layout).

The classes are numbered in the order of their names. The images have 8 bits a channel and one size; nothing is resized.
If all are gray the dataset has one channel, otherwise three. Transparency and a camera's orientation are ignored. So
are names that start with a dot, and files beside the folders of the classes. Any other file is refused. No file is
trusted.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.dataset import Dataset
from distdl.errors import DamagedFileError, DistdlError, UserError, quoted

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".webp")
PARTS = ("train", "test")
GRAY, COLORS = {"1", "L", "LA"}, {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


def load_folder(path: Path) -> Dataset:
    """Return the images in a folder, in the order of their names. So the same files give the same dataset anywhere.

    Raises `UserError` if Pillow or an image is missing or an image does not fit, `DamagedFileError` if one is damaged.
    """
    pillow = _pillow()
    parts = [_folders(path)]
    if {folder.name for folder in parts[0]} == set(PARTS):
        parts = [_folders(path / part) for part in PARTS]
    names = [folder.name for folder in parts[0]]
    files: list[Path] = []
    labels: list[int] = []
    starts = []
    for classes in parts:
        starts.append(len(files))
        if [folder.name for folder in classes] != names:
            other = min({folder.name for folder in classes} ^ set(names))
            raise UserError(f"{quoted(path)} has the class {other!r} in one of train and test only: expected in both")
        for label, folder in enumerate(classes):
            found = _images_in(folder)
            files += found
            labels += [label] * len(found)
    if len(names) < 2:
        raise UserError(
            f"{quoted(path)} has {len(names)} folders with images: expected one for each class, two or more, with the "
            "images in them"
        )
    try:
        images = _decode(pillow, files)
    except MemoryError:
        raise UserError(f"there is not enough memory for {quoted(path)}: give a smaller dataset") from None
    test_start = starts[1] if len(parts) > 1 else None
    dataset = Dataset(f"folder:{path}", images, np.array(labels, np.int64), len(names), test_start, tuple(names))
    return dataset.checked()


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise UserError(
            "reading images needs Pillow, which is not installed: pip install 'distdl-mpi[images]', or give arrays by "
            "--dataset npz:FILE.npz"
        ) from error


def _entries(folder: Path, belongs: Callable[[Path], bool]) -> dict[Path, bool]:
    """Return the entries of a folder in the order of their names, each with the result of `belongs`."""
    try:
        return {entry: belongs(entry) for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")}
    except OSError as error:
        raise UserError(
            f"the folder of images {quoted(folder)} cannot be read ({error.strerror or error}): expected a folder for "
            "each class, with the images in them"
        ) from error


def _folders(folder: Path) -> list[Path]:
    return [entry for entry, is_folder in _entries(folder, Path.is_dir).items() if is_folder]


def _images_in(folder: Path) -> list[Path]:
    files = _entries(folder, lambda entry: entry.suffix.lower() in SUFFIXES and entry.is_file())
    for file, is_image in files.items():
        if not is_image:
            raise UserError(
                f"{quoted(file)} is not an image: expected only {', '.join(SUFFIXES)} in the folder of a class (every "
                f"folder in {quoted(folder.parent)} is a class, except train and test)"
            )
    if not files:
        raise UserError(f"{quoted(folder)} has no images: every folder is a class, and a class needs images")
    return list(files)


def _decode(pillow: Any, files: list[Path]) -> NDArray[np.uint8]:
    """Return the images (N, H, W, C). All headers are checked before any image is decoded."""
    size, modes = None, set()
    for file in files:
        with _open(pillow, file) as image:
            size = size or image.size
            if image.size != size:
                raise UserError(
                    f"{quoted(file)} has {image.width}x{image.height} pixels, {quoted(files[0])} has "
                    f"{size[0]}x{size[1]}: expected one size; resize them first"
                )
            if image.mode not in GRAY | COLORS or _is_deep(image):
                raise UserError(f"{quoted(file)} has more than 8 bits a channel, or other numbers: expected 8 bits")
            modes.add(image.mode)
    mode, channels = ("L", 1) if modes <= GRAY else ("RGB", 3)
    assert size is not None, "there is a file"
    images = np.empty((len(files), size[1], size[0], channels), np.uint8)
    for file, target in zip(files, images, strict=True):
        with _open(pillow, file) as image:
            target[...] = np.asarray(image.convert(mode)).reshape(target.shape)
    return images


def _is_deep(image: Any) -> bool:
    """Return True if a channel has more than the 8 bits that Pillow would keep."""
    _, _, _, how = image.tile[0] if image.tile else (None, None, None, ())
    if image.format == "PPM":
        return isinstance(how, tuple) and how[1] > 255
    return image.format == "PNG" and ";16" in str(how)


@contextmanager
def _open(pillow: Any, file: Path) -> Iterator[Any]:
    try:
        stream = file.open("rb")
    except OSError as error:
        raise UserError(f"the image {quoted(file)} cannot be read: {error.strerror or error}") from error
    try:
        with stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about content that is ignored anyway
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(stream, formats=FORMATS) as image:
                yield image
    except (DistdlError, MemoryError):
        raise
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise UserError(f"{quoted(file)} has more pixels than Pillow accepts ({error}): resize it first") from error
    except Exception as error:  # Pillow raises many kinds for bytes that are not an image
        raise DamagedFileError(f"{quoted(file)} is damaged or not an image: {error}; write or copy it again") from error
