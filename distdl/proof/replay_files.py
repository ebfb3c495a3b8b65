"""The files of `distdl.replay`: their names, their content, and their first difference.

The arrays are in the order in which a step computes them: ``weights/…`` before the step, ``images``, ``activations/…``
from the first layer to the last, ``losses``, ``gradients/…`` from the last layer to the first, ``step_gradients/…``,
``weights_after/…``. So the first array that differs between two files tells where two runs part.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from distdl.engine.recorded import first_element, shown_index
from distdl.errors import DamagedFileError, DistdlError, UserError
from distdl.regular_files import open_regular

FORMAT = "distdl replay 1"
#: The array that describes the others.
ABOUT = "about"


def path_of(folder: Path, step: int, micro_batch: int) -> Path:
    """Return the path of the file in a run folder."""
    return folder / f"replay-step-{step:09d}-micro-batch-{micro_batch}.npz"


def encoded(about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the bytes of a file; equal arrays give equal bytes."""
    content = io.BytesIO()
    every: dict[str, Any] = {ABOUT: np.array(json.dumps({"format": FORMAT, **about})), **arrays}
    np.savez(content, **every)
    return content.getvalue()


def compare(one: Path, other: Path) -> tuple[str | None, int]:
    """Return the first difference between two files, None if there is none, and the number of arrays.

    Raises `UserError` if they do not describe the same micro-batch of the same step, `DamagedFileError`.
    """
    with _opened(one) as ours, _opened(other) as theirs:
        described = [_about(archive, path) for archive, path in ((ours, one), (theirs, other))]
        for name in ("step", "micro_batch", "layer"):
            if described[0].get(name) != described[1].get(name):
                raise UserError(
                    f"{one} has {name.replace('_', '-')} {described[0].get(name)}, {other} has "
                    f"{described[1].get(name)}: replay the same step, micro-batch and layer of both runs"
                )
        names = [*ours.files, *(name for name in theirs.files if name not in ours.files)]
        for name in names:
            if name == ABOUT:
                continue
            found = first_element(*(archive[name] if name in archive.files else None for archive in (ours, theirs)))
            if found is not None:
                element, left, right = found
                where = "" if element is None else f", element {shown_index(element)}"
                return f"{name}{where}: {left} | {right}", len(names) - 1
    return None, len(names) - 1


def _about(archive: NpzFile, path: Path) -> dict[str, Any]:
    try:
        about = json.loads(str(archive[ABOUT]))
        if about["format"] == FORMAT:
            return dict(about)
    except (LookupError, ValueError, TypeError):
        pass
    raise UserError(f"{path} is not a file of distdl.replay: expected one, or give two run folders")


def _check_is_zip(file: BufferedReader, path: Path) -> None:
    """Raise `UserError` for any other file: NumPy would read it as a single array, and trust its size."""
    if file.read(2) != b"PK":
        raise UserError(f"{path} is not an .npz file: expected a file of distdl.replay, or two run folders")
    file.seek(0)


@contextmanager
def _opened(path: Path) -> Iterator[NpzFile]:
    """Open a file; its exceptions, and those while it is read, become errors that name it."""
    try:
        with open_regular(path, follow=True) as file:
            _check_is_zip(file, path)
            with np.load(file, allow_pickle=False) as archive:
                yield archive
    except DistdlError:
        raise
    except MemoryError:
        raise UserError(f"there is not enough memory for {path}: replay it with --layer") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; give a file of distdl.replay") from None
    except Exception as error:  # NumPy and zipfile raise many kinds for bytes that are not an archive or an array
        raise DamagedFileError(f"{path} is damaged: {error}; write it again with distdl.replay") from error
