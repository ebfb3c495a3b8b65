"""The limit of a dataset's memory, checked before anything is allocated: a small file may expand a thousandfold."""

import math

from distdl.errors import UserError
from distdl.host_memory import available_bytes, available_to_this_process

#: The share of the available memory that a dataset may take. While it is loaded and shared it takes up to three times
#: its size.
SHARE = 0.25


class Room:
    """The memory for one dataset: `data_gigabytes`, or by default a quarter of the memory that is available."""

    def __init__(self, data_gigabytes: float | None = None) -> None:
        self._given = data_gigabytes
        self._taken = 0.0

    def take(self, name: str, nbytes: float, remedy: str = "give fewer or smaller images") -> None:
        """Reserve memory for a part of the dataset `name`; raise `UserError` if all parts together have no room."""
        self._taken += nbytes
        available = min(available_bytes(), available_to_this_process())
        most = available * SHARE if self._given is None else min(self._given * 1e9, available)
        if self._taken <= most:
            return
        if self._taken > available:
            limit = f"but {available / 1e9:.2f} GB are available"
        else:
            rule = "a quarter of the memory available" if self._given is None else "--data-gigabytes"
            limit = f"and the limit is {most / 1e9:.2f} GB ({rule})"
            remedy += f"; or, if that is its real size, --data-gigabytes {math.ceil(self._taken / 1e8) / 10:g}"
        raise UserError(f"{name}: {self._taken / 1e9:.2f} GB of memory are needed, {limit}: {remedy}")
