"""The images to predict: image files, or an array in an ``.npz`` file. Rank 0 lists them, and each rank reads its own.

N images, H height, W width, C channels.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from distdl.data.labels import natural_order
from distdl.data.room import Room
from distdl.data.signature import Signature
from distdl.data.sources.folder import is_junk
from distdl.data.sources.images import SUFFIXES, pillow, read_image
from distdl.data.sources.npz import load_images
from distdl.errors import DamagedFileError, UserError, quoted
from distdl.image_options import Resize
from distdl.inference.fit import fitted
from distdl.parallel import Communicator, from_rank_0, on_rank_0, share_arrays, together

#: Stands for the names on standard input.
STDIN = "-"
NPZ = "npz:"
FOLDER = "folder:"


@dataclass(frozen=True)
class UnusedInput:
    """An input without a prediction."""

    name: str
    reason: str
    is_damaged: bool


class Inputs(ABC):
    """Images with names, in a fixed order."""

    names: Sequence[str]
    #: Files of the given folders that are no images.
    skipped: Sequence[str] = ()

    @abstractmethod
    def read(self, start: int, out: NDArray[Any]) -> list[tuple[int, UnusedInput]]:
        """Fill `out` (N, H, W, C) with the images from number `start` on.

        Those that cannot be used become 0, and are returned with their numbers.
        """


class ImageFiles(Inputs):
    """Image files, prepared as those of the training."""

    def __init__(self, names: Sequence[str], signature: Signature, skipped: Sequence[str] = ()) -> None:
        height, width, self._channels = signature.image_shape
        self._size, self._resize = (height, width), Resize.parse(signature.resize) if signature.resize else None
        self.names, self.skipped = names, skipped

    def read(self, start: int, out: NDArray[Any]) -> list[tuple[int, UnusedInput]]:  # noqa: D102
        unused = []
        for number, target in enumerate(out, start):
            name = self.names[number]
            try:
                target[...] = read_image(Path(name), size=self._size, resize=self._resize, channels=self._channels)
            except UserError as error:
                target[...] = 0
                unused.append((number, UnusedInput(name, str(error), isinstance(error, DamagedFileError))))
        return unused


class ImageArray(Inputs):
    """The images (N, H, W, C) of an array, in the form that the networks take. Their names are their numbers."""

    def __init__(self, images: NDArray[Any]) -> None:
        self._images = images
        self.names = [str(row) for row in range(len(images))]

    def read(self, start: int, out: NDArray[Any]) -> list[tuple[int, UnusedInput]]:  # noqa: D102
        out[...] = self._images[start : start + len(out)]
        return []


def find_inputs(given: Sequence[str], signature: Signature, communicator: Communicator, room: Room) -> Inputs:
    """Return the images that the user named. Collective. Raises `UserError` on every rank."""
    arrays = [one for one in given if one.startswith(NPZ) or one.lower().endswith(".npz")]
    if arrays:
        if len(given) > 1:
            others = len(given) - 1
            raise UserError(f"{arrays[0]} and {others} other inputs: give one .npz file, or image files and folders")
        path = arrays[0].removeprefix(NPZ)
        images = on_rank_0(communicator, lambda: {"images": fitted(load_images(path, room), signature, path)})
        return ImageArray(share_arrays(communicator, images or {})["images"])
    together(communicator, lambda: _refuse_files(signature))
    names, skipped = from_rank_0(communicator, lambda: _listed(given))
    return ImageFiles(names, signature, skipped)


def _refuse_files(signature: Signature) -> None:
    """Raise `UserError` if the networks cannot predict image files."""
    if signature.pixels != "uint8":
        raise UserError(
            "the network was trained on arrays of floats, and image files have whole numbers from 0 to 255: give "
            "npz:FILE.npz, with images prepared as for the training"
        )
    if signature.channels_of_files is None:
        raise UserError(
            f"the network was trained on images of {signature.image_shape[2]} channels, and image files have 1 or 3: "
            "give npz:FILE.npz, with images prepared as for the training"
        )
    pillow()


def _listed(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of all image files, and those of other files in the given folders."""
    if given.count(STDIN) > 1:
        raise UserError(f"{STDIN} is given twice: standard input is read once")
    names, skipped = list[str](), list[str]()
    for one in given:
        for name in _from_stdin() if one == STDIN else [one.removeprefix(FOLDER)]:
            if (Path(name) / "config.toml").is_file() and (Path(name) / "checkpoints").is_dir():
                raise UserError(f"{name!r} is a run folder: for an ensemble give --with {name}; otherwise leave it out")
            if Path(name).is_dir():
                for found, is_image in _files_in(name):
                    (names if is_image else skipped).append(found)
            else:
                names.append(name)
    if not names:
        raise UserError(
            f"there is no image in {', '.join(map(repr, given))}: expected files that end in {', '.join(SUFFIXES)}"
        )
    return names, skipped


def _from_stdin() -> list[str]:
    r"""Return the file names on standard input: one on each line, or separated by \0 as from ``find -print0``."""
    content = sys.stdin.buffer.read()
    names = content.split(b"\0") if b"\0" in content else content.splitlines()
    return [os.fsdecode(name) for name in names if name]


def _files_in(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield all files of a folder and its subfolders, and if the name is that of an image. Skip files of systems."""

    def refuse(error: OSError) -> None:
        raise UserError(f"the folder {quoted(Path(error.filename))} cannot be read: {error.strerror}") from None

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted((name for name in folders if not is_junk(name)), key=natural_order)
        for name in sorted((name for name in files if not is_junk(name)), key=natural_order):
            yield str(Path(place) / name), name.lower().endswith(SUFFIXES)
