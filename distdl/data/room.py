"""The limit of a dataset's memory, checked before anything is allocated: a small file may expand a thousandfold."""

import math
from contextlib import suppress
from pathlib import Path

from distdl.errors import UserError
from distdl.host_memory import available_bytes, available_to_this_process

#: The share of the available memory that a dataset may take. While it is loaded and shared it takes up to three times
#: its size.
SHARE = 0.25
#: Files of data rarely expand more than this, unless they are small.
MOST_EXPANSION, FREE_BYTES = 64, 2**30


class Room:
    """The memory for one dataset.

    It is `data_gigabytes`, or by default a quarter of the memory that is available, and 64 times the size of the files
    if that is more than a gigabyte.
    """

    def __init__(self, data_gigabytes: float | None = None) -> None:
        self._given = data_gigabytes
        self._taken = self._on_disk = 0.0

    def take(self, name: str, nbytes: float, on_disk: float, remedy: str = "give fewer or smaller images") -> None:
        """Reserve memory for a part of the dataset `name`, from files of `on_disk` bytes.

        Raises `UserError` if there is no room for all parts together.
        """
        self._taken += nbytes
        self._on_disk += on_disk
        available = min(available_bytes(), available_to_this_process())
        expanded = max(MOST_EXPANSION * self._on_disk, FREE_BYTES)
        quarter = (available * SHARE, "a quarter of the memory available")
        most, rule = min(quarter, (expanded, f"for {_size(self._on_disk)} of files"))
        if self._given is not None:
            most, rule = min((self._given * 1e9, "--data-gigabytes"), (available, ""))
        if self._taken <= most:
            return
        if self._taken > available:
            limit = f"but {_size(available)} are available"
        else:
            limit = f"and at most {_size(most)} are allowed ({rule})"
            remedy += f"; or, if that is its real size, --data-gigabytes {math.ceil(self._taken / 1e8) / 10:g}"
        raise UserError(f"{name}: {_size(self._taken)} of memory are needed, {limit}: {remedy}")


def on_disk(*paths: Path) -> int:
    """Return the bytes of files on the disk, without holes; nothing for files that cannot be found."""
    total = 0
    for path in paths:
        with suppress(OSError, ValueError):  # ValueError: the path contains a NUL
            status = path.stat()
            total += min(status.st_size, 512 * status.st_blocks or status.st_size)  # some file systems count no blocks
    return total


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
