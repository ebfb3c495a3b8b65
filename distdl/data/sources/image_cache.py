"""A cache of decoded images (`--cache FOLDER`), for data larger than memory: the images stay in a mapped file.

The name of the file is a hash of the content of all image files and of the options. So a second start maps the file
without decoding, and changed images get a new file. Names of files count only if files are left out, which are listed.
distdl removes no file of a cache. Delete the folder at any time.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.sources import images
from distdl.errors import UserError
from distdl.image_options import ImageOptions
from distdl.mapped_files import created, open_mapped

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
        rows, skipped = json.loads(facts.read_text(encoding="utf-8"))
        found = open_mapped(path)
        if len(found) >= len(rows):
            say(f"--cache: {path} has the images; no file is decoded")
            return found[: len(rows)], np.array(rows, np.int64), skipped
    say(f"--cache: decoding {len(files):,} image files into {path}; later starts use it")
    with ExitStack() as files_to_complete:

        def make(count: int, shape: tuple[int, ...]) -> Pixels:
            return files_to_complete.enter_context(created(path, (count, *shape), np.uint8))

        _, rows, skipped = decode(make)
    try:
        facts.write_text(json.dumps([rows.tolist(), skipped]), encoding="utf-8")
        return open_mapped(path)[: len(rows)], rows, skipped
    except OSError as error:
        raise UserError(f"cannot use {path}: {error.strerror or error}; give another folder by --cache") from error


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
        if file.is_file():  # opening a pipe would block
            with suppress(OSError), file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(content + b"\0")
    return digest.hexdigest()[:32]
