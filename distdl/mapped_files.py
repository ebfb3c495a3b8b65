"""Arrays in files that are mapped into memory, for data that is larger than memory.

The kernel reads the pages of a mapped file when they are used, and removes them when memory is needed. The ranks of a
host share them. A file is in NumPy's ``.npy`` format. It gets its name only when it is complete.
"""

import math
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap, read_array_header_1_0, read_magic
from numpy.typing import DTypeLike, NDArray

from distdl.errors import UserError
from distdl.regular_files import FILE_MODE, open_regular

#: The suffix of a file that is not complete.
PARTIAL = ".partial"
#: A process keeps about this much of a mapped file in memory. One row may bring a huge page with it.
KEPT_BYTES, HUGE_PAGE_BYTES = 2**28, 2**21
MappedArray = np.memmap[Any, Any]
#: An attribute of the arrays that `open_mapped` returns.
OPENED_HERE = "opened_by_distdl"


def open_mapped(path: Path) -> MappedArray:
    """Return the array in a file, read-only; raise `OSError` or `ValueError` if it cannot be mapped."""
    with open_regular(path, follow=True) as file:
        if read_magic(file) != (1, 0):
            raise ValueError(f"{path} is of another format")
        shape, is_fortran, dtype = read_array_header_1_0(file)
        array: MappedArray = np.memmap(file, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_RANDOM)  # batches take rows in a random order: do not read ahead
    vars(array)[OPENED_HERE] = True
    return array


def is_first_rows_of_file(array: NDArray[Any]) -> bool:
    """Return whether an array is that of `open_mapped`, or its first rows: then other processes can map the file.

    A mapped array from a user's code is not: it may be any part of a file, or have changes that the file lacks.
    """
    whole: Any = array
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    return (
        isinstance(array, np.memmap)
        and OPENED_HERE in vars(whole)
        and array.flags.c_contiguous
        and (array.dtype, array.shape[1:]) == (whole.dtype, whole.shape[1:])
        and array.ctypes.data == whole.ctypes.data
    )


def release_pages(array: NDArray[Any]) -> None:
    """Remove the pages of an array in a mapped file from this process's memory; a later access maps them again.

    The array may be a part of the file's. Any other array stays as it is, and so does one with changes of its own.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(array, np.memmap) and isinstance(base, mmap.mmap) and array.mode != "c":
        base.madvise(mmap.MADV_DONTNEED)


def rows_to_keep(array: NDArray[Any]) -> int:
    """Return after how many rows, read in any order, the pages of a mapped array should be released."""
    return max(1, KEPT_BYTES // (array[:1].nbytes + HUGE_PAGE_BYTES))


@contextmanager
def created(path: Path, shape: Sequence[int], dtype: DTypeLike) -> Iterator[MappedArray]:
    """Yield a new array that becomes the file `path`; if the caller raises, nothing remains.

    The space is reserved first, so a full disk is an error here and not a bus error later. Raises `UserError` if the
    file cannot be written.
    """
    with suppress(OSError):  # then the file cannot be created either
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        raise _refused(path, error) from error
    try:
        with suppress(OSError):  # a file system without locks: then no process removes it either
            flock(handle, LOCK_EX | LOCK_NB)
        try:
            array = open_memmap(partial, mode="w+", dtype=np.dtype(dtype), shape=tuple(shape))
            os.posix_fallocate(handle, 0, partial.stat().st_size)
        except OSError as error:
            raise _refused(path, error, f"{math.prod(shape) * np.dtype(dtype).itemsize / 1e6:.1f} MB") from error
        yield array
        try:
            array.flush()
            os.fsync(handle)
            partial.replace(path)
        except OSError as error:
            raise _refused(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
        os.close(handle)


def _refused(path: Path, error: OSError, what: str = "images") -> UserError:
    return UserError(
        f"cannot write {what} to {path}: {error.strerror or error}; free some space, or give another folder"
    )


def _remove_abandoned(path: Path) -> None:
    """Remove what a killed process has left of this file. A living process keeps its part locked."""
    for partial in path.parent.glob(f"{path.name}.*{PARTIAL}"):
        with suppress(OSError), open_regular(partial) as file:
            flock(file, LOCK_EX | LOCK_NB)
            partial.unlink()
