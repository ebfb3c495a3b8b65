"""Open regular files only: the files of a folder that may come from anyone.

A pipe in the place of a file would block the open, and a device may never end. So a name is opened without waiting, and
then the opened file is checked: nothing can change in between.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

#: The mode of a new file before the umask; never writable by everyone.
FILE_MODE = 0o664
#: A log of a run is smaller.
MOST_BYTES = 2**31


class NotRegularError(OSError):
    """A pipe, a device, a socket or a folder is in the place of a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.EINVAL, "it is not a regular file", str(path))


def opened(path: Path, flags: int = os.O_RDONLY, mode: int = FILE_MODE, *, follow: bool = False) -> int:
    """Return the handle of a regular file; raise `OSError` if it is none, or without `follow` a symbolic link."""
    try:
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), mode)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a pipe without a reader, or a socket
            raise NotRegularError(path) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotRegularError(path)
    return handle


def open_regular(path: Path, *, follow: bool = False) -> BufferedReader:
    """Open a file to read, as `opened` does."""
    return open(path, "rb", opener=lambda _, flags: opened(path, flags, follow=follow))


def read_regular(path: Path, *, follow: bool = False, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file; raise `OSError` as `opened` does, and if it has more than `most` bytes."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than {most}", str(path))
        return file.read(size)
