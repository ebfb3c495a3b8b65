"""Durable writes: a reader finds the old content or the new, even after a crash at any point.

The order is: temporary name, write, flush to disk, rename, flush the folder. Each system call goes through `os`, so
a test can end the process at any of them. Nothing is written, cut or removed through a symbolic link. Logs, and folders
inside a run folder, are opened without following links.
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
from distdl.regular_files import FILE_MODE, opened

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: The next start removes all files with this suffix. It is long enough that nobody else uses it.
TEMPORARY_SUFFIX = ".distdl-partial"
#: The logs of a run.
LOGS = ("metrics", "timing", "hashes")
#: All files of a run folder, except the checkpoints.
RUN_FILES = ("config.toml", "env.json", "summary.json", "lock", "owner", *(f"{name}.jsonl" for name in LOGS))
#: The mode of a folder before the umask; never writable by everyone.
FOLDER_MODE = 0o775
#: The most buffers that one system call takes on Linux (IOV_MAX).
MOST_BUFFERS = 1024


def write_durably(path: Path, *parts: Buffer, follow: bool = True) -> None:
    """Replace the content of `path` by the concatenated `parts`, or leave it unchanged.

    Without `follow`, the folder must not be a symbolic link. Raises `OSError` if the disk refuses.
    """
    temporary = path.name + TEMPORARY_SUFFIX
    with opened_folder(path.parent, follow=follow) as folder:
        with suppress(FileNotFoundError):  # the remains of an interrupted write
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
        os.fsync(folder)  # then the rename survives a crash of the machine


def indented_json(value: Mapping[str, Any]) -> bytes:
    """Return `value` as the content of a readable JSON file; raise `ValueError` for a NaN."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _write_all(handle: int, parts: Iterable[Buffer]) -> None:
    remaining = [view for view in (memoryview(part).cast("B") for part in parts) if view]
    while remaining:
        written = os.writev(handle, remaining[:MOST_BUFFERS])
        if not written:
            raise OSError(errno.EIO, "the disk writes no bytes and reports no error")
        while remaining and written >= len(remaining[0]):
            written -= len(remaining.pop(0))
        if written:
            remaining[0] = remaining[0][written:]


@contextmanager
def opened_folder(folder: Path, *, follow: bool = False) -> Iterator[int]:
    """Open a folder for system calls relative to it; without `follow`, raise `OSError` if it is a symbolic link."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        yield handle
    finally:
        os.close(handle)


def opened_log(path: Path) -> int:
    """Open a file to append to, and make it if necessary; raise `OSError` if it is a link or no regular file."""
    return opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)


def try_folder(folder: Path) -> None:
    """Make a nameless temporary file in `folder` or its nearest existing parent; raise `OSError` if that fails.

    So the user learns of a read-only folder before the work, not after it.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_output(path: Path, flag: str) -> None:
    """Raise `UserError` if the file that `flag` names could not be written at the end of the work. Writes nothing.

    The new file replaces an old one. So the old one must be a regular file, without the name of a file of a run.
    """
    if path.name in RUN_FILES or path.suffix == ".safetensors":
        raise UserError(f"{flag} {path} has the name of a file of a run: give another name")
    try:
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder: give the name of a file")
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise UserError(f"{flag} {path} is not a regular file, and would be overwritten: give another name")
        try_folder(path.parent)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}; give another file") from None


def write_output(path: Path, content: Buffer, flag: str) -> None:
    """Write the file that `flag` names, and make its folder if necessary; raise `UserError` if that fails."""
    write_outputs(path.parent, {path.name: content}, flag)


def write_outputs(folder: Path, contents: Mapping[str, Buffer], flag: str) -> None:
    """Write the files of a folder, by name, and make the folder if necessary.

    If one of them cannot be written, all files and folders stay as they were. Raises `UserError`.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    staged = {name: folder / f"{name}.new{TEMPORARY_SUFFIX}" for name in contents}
    for name, content in contents.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(staged[name], content)
        except OSError as error:
            with suppress(OSError):
                remove(folder, [one.name for one in staged.values()])
                for one in made:
                    one.rmdir()
            why = f"{flag} {folder / name} cannot be written: {error.strerror or error}"
            raise UserError(f"{why}; give another file") from None
    try:
        for name, file in staged.items():
            file.rename(folder / name)
        with opened_folder(folder, follow=True) as handle:
            os.fsync(handle)  # then the renames survive a crash of the machine
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror or error}; give another name") from None


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder; raise `OSError` if the folder is a symbolic link. A missing file is no error."""
    with opened_folder(folder) as handle:
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=handle)


def remove_temporaries(*folders: Path) -> None:
    """Remove the remains of interrupted writes in `folders`, and nothing else."""
    for path in (path for folder in folders for path in folder.glob("*" + TEMPORARY_SUFFIX)):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
