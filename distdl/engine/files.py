"""Writing files so that a reader finds the old content or the new, whatever happens in between.

Temporary name, write, flush to disk, rename, flush the folder. Every system call goes through `os` here, one
by one, so that a test can end the process in the middle of any of them.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

TEMPORARY_SUFFIX = ".partial"


def write_durably(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data`, or leave it as it was.

    Raises `OSError` where the disk refuses; the temporary file is then gone and `path` is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(handle, left) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        os.rename(temporary, path)  # noqa: PTH104  a system call, like those around it
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def try_folder(folder: Path) -> None:
    """Make a nameless file in `folder`, or in the nearest above it that exists; nothing is left behind.

    Raises `OSError` where that cannot be, so that a person knows before the work and not after it.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def flush_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk, so that a rename survives a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Remove what writes that were cut off have left in `folder`."""
    for path in folder.glob("*" + TEMPORARY_SUFFIX):
        path.unlink(missing_ok=True)
