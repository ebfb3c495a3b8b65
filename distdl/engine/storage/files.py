"""Writing files so that a reader finds the old content or the new, whatever happens in between.

Temporary name, write, flush to disk, rename, flush the folder. Every system call goes through `os` here, one
by one, so that a test can end the process in the middle of any of them.

Nothing is written, cut or removed through a symbolic link: a temporary file is always a new one, a log is opened
as what it is, and where it matters so is the folder around them.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdl.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Whatever bears this suffix is ours, and is swept at the next start; a name nobody else would give.
TEMPORARY_SUFFIX = ".distdl-partial"
#: The logs of a run.
LOGS = ("metrics", "timing", "hashes")
#: What we write, cut or remove in a run folder, besides the checkpoints.
OWN_FILES = ("config.toml", "env.json", "summary.json", "lock", *(f"{name}.jsonl" for name in LOGS))
#: Less what the umask takes: never writable by everyone, whatever the umask.
FILE_MODE = 0o664
FOLDER_MODE = 0o775
#: The most buffers that one system call takes on Linux (IOV_MAX).
MOST_BUFFERS = 1024


def write_durably(path: Path, *parts: Buffer, follow: bool = True) -> None:
    """Replace the content of `path` by `parts`, one behind the other, or leave it as it was.

    Where `follow` is false, the folder may be no symbolic link. Raises `OSError` where the disk refuses; the
    temporary file is then gone and `path` is untouched.
    """
    temporary = path.name + TEMPORARY_SUFFIX
    with opened_folder(path.parent, follow=follow) as folder:
        with suppress(FileNotFoundError):  # what a write that was cut off has left
            os.unlink(temporary, dir_fd=folder)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE, dir_fd=folder)
        try:
            try:
                _write_all(handle, parts)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        os.fsync(folder)  # so that the rename survives a crash of the machine


def indented_json(value: Mapping[str, Any]) -> bytes:
    """Return `value` as a JSON file that people read: indented, with a last newline. A NaN is a `ValueError`."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _write_all(handle: int, parts: Iterable[Buffer]) -> None:
    left = [view for view in (memoryview(part).cast("B") for part in parts) if view]
    while left:
        written = os.writev(handle, left[:MOST_BUFFERS])
        if not written:
            raise OSError(errno.EIO, "the disk takes nothing and does not say why")
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


@contextmanager
def opened_folder(folder: Path, *, follow: bool = False) -> Iterator[int]:
    """Open a folder, for system calls relative to it; one that is a symbolic link only where `follow` says so."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        yield handle
    finally:
        os.close(handle)


def opened_log(path: Path) -> int:
    """Open a file to append to, made if need be; raise `OSError` if it is a symbolic link."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)


def try_folder(folder: Path) -> None:
    """Make a nameless file in `folder`, or in the nearest above it that exists; nothing is left behind.

    Raises `OSError` where that cannot be, so that a person knows before the work and not after it.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_output(path: Path, flag: str) -> None:
    """Raise `UserError` where the file that `flag` names could not be written in the end; nothing is left behind.

    A file takes the place of what is there, so that may be nothing but a regular file: no pipe, device or link, and
    nothing that bears the name of a run's own files.
    """
    if path.name in OWN_FILES or path.suffix == ".safetensors":
        raise UserError(f"{flag} {path} has the name of a file of a run's own: give another name")
    try:
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder: give the name of a file")
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise UserError(f"{flag} {path} is no regular file, and would be replaced by one: give another name")
        try_folder(path.parent)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}; give another file") from None


def write_output(path: Path, content: Buffer, flag: str) -> None:
    """Write the file that `flag` names, in a folder that is made if need be; raise `UserError` where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror or error}; give another file") from None


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder, which may be no symbolic link; those that are gone already are no error."""
    with opened_folder(folder) as handle:
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=handle)


def remove_temporaries(folder: Path) -> None:
    """Remove what writes that were cut off have left in `folder`, and nothing else."""
    for path in folder.glob("*" + TEMPORARY_SUFFIX):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
