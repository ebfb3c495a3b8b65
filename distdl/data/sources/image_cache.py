"""A cache of decoded images (`--cache FOLDER`), for data larger than memory: the images stay in a mapped file.

The name of the file is a hash of the content of all image files and of the options. So a second start maps the file
without decoding, and changed images get a new file. Names of files count only if files are left out, which are listed.
distdl removes no file of a cache. Delete the folder at any time.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.sources import images
from distdl.errors import UserError
from distdl.image_options import ImageOptions
from distdl.json_files import fits
from distdl.mapped_files import PARTIAL, created, open_mapped
from distdl.regular_files import open_regular, opened, read_regular

#: Changes with the decoding, so that no file of another version is used.
FORMAT = "distdl images 1"

Pixels = NDArray[np.uint8]
#: Images (n, H, W, C), the numbers (n,) of their files, and the other files, each with the reason.
Decoded = tuple[Pixels, NDArray[np.int64], list[str]]
#: Returns an array for a number of images of a shape (H, W, C).
Make = Callable[[int, tuple[int, ...]], Pixels]


def read_cached(
    folder: Path,
    files: Sequence[Path],
    others: Sequence[Path],
    options: ImageOptions,
    decode: Callable[[Make], Decoded],
) -> Decoded:
    """Return what `decode` returns, with the images in a mapped file; call it only if the cache lacks the images.

    `others` are the files beside the images, which `decode` refuses or lists.

    Raises `UserError` if the cache cannot be written.
    """
    say = options.say or (lambda _: None)
    path = folder.absolute() / f"{_key(files, others, options)}.npy"
    facts = path.with_suffix(".json")
    with suppress(OSError, ValueError):
        found, rows, skipped = _cached(path, facts, len(files))
        say(f"--cache: {path} has the images; no file is decoded")
        return found, rows, skipped
    say(f"--cache: decoding {len(files):,} image files into {path}; later starts use it")
    with ExitStack() as files_to_complete:

        def make(count: int, shape: tuple[int, ...]) -> Pixels:
            return files_to_complete.enter_context(created(path, (count, *shape), np.uint8))

        _, rows, skipped = decode(make)
    try:
        partial = facts.with_name(f"{facts.name}.{secrets.token_hex(8)}{PARTIAL}")
        with os.fdopen(opened(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as file:
            json.dump([rows.tolist(), skipped], file)
        partial.replace(facts)
        return open_mapped(path)[: len(rows)], rows, skipped
    except OSError as error:
        raise UserError(f"cannot use {path}: {error.strerror or error}; give another folder by --cache") from error


def _cached(path: Path, facts: Path, count: int) -> Decoded:
    """Return the images of `count` files in the cache; raise `OSError` or `ValueError` if it lacks them."""
    noted = json.loads(read_regular(facts, follow=True))
    if not (isinstance(noted, list) and len(noted) == 2 and fits(noted[0], [int]) and fits(noted[1], [str])):
        raise ValueError(f"{facts} is damaged")
    rows, found = np.array(noted[0], np.int64), open_mapped(path)
    if (
        found.dtype != np.uint8
        or found.ndim != 4
        or len(found) < len(rows)
        or not all(rows >= 0)
        or not all(rows < count)
    ):
        raise ValueError(f"{path} is damaged")
    return found[: len(rows)], rows, noted[1]


def _key(files: Sequence[Path], others: Sequence[Path], options: ImageOptions) -> str:
    """Return a hash of the content of the files, and of all that determines their pixels and the list of other files.

    That list names files. So their names count if files may be left out.
    """
    pillow: Any = images.pillow()
    named = [*map(str, others), *(map(str, files) if options.skip_damaged else ())]
    facts = [FORMAT, pillow.__version__, options.resize, options.channels, options.skip_damaged, named]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for file in files:
        content = b""
        with suppress(OSError, ValueError), open_regular(file, follow=True) as stream:  # ValueError: a NUL in the path
            content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(content + b"\0")
    return digest.hexdigest()[:32]
