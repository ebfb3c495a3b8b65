"""Node-shared arrays: one copy of the dataset on each host, however many ranks it runs.

The coordinator's arrays go to one leader a node, which writes them into a memory-mapped file: in shared memory
if they fit, else in the temporary folder. The space is reserved first, so that a full disk is an error here
and not a bus error later; the file is unlinked as soon as every rank has mapped it, so that nothing is left
behind whatever ends the job. (An MPI window would not survive the failure of a rank.)
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import ALIGNMENT_BYTES
from distdl.errors import UserError
from distdl.parallel.agreement import together
from distdl.parallel.communicator import Communicator

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  not a file name of ours: the kernel's shared memory


def share_arrays(
    communicator: Communicator, arrays: Mapping[str, NDArray[Any]], *, node: Communicator | None = None
) -> dict[str, NDArray[Any]]:
    """Return the arrays of rank 0, read-only, on every rank, with one copy in memory a node. Collective.

    `arrays` is looked at on rank 0 alone. `node` is the group of ranks that share memory, found out if not
    given. Raises `UserError` on every rank where a host has no room for them.
    """
    described = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    specification = communicator.bcast_json(described)
    places = _places(specification)
    node = communicator.node() if node is None else node
    leaders = communicator.split(0 if node.rank == 0 else None)
    total = places[-1][1] if places else 0

    path = together(communicator, lambda: _reserve(total) if node.rank == 0 else None)
    path = node.bcast_json(path)
    buffer = together(communicator, lambda: _map(path, total))
    shared: dict[str, NDArray[Any]] = {}
    for (name, dtype, shape), (start, end) in zip(specification, places, strict=True):
        view = np.frombuffer(buffer, np.uint8)[start:end].view(dtype).reshape(shape)
        if leaders is not None:
            if communicator.rank == 0:
                view[...] = arrays[name]
            leaders.bcast(view)
        view.flags.writeable = False
        shared[name] = view
    node.barrier()
    if node.rank == 0:
        Path(path).unlink()
    return shared


def _places(specification: list[tuple[str, str, list[int]]]) -> list[tuple[int, int]]:
    places, end = [], 0
    for _, dtype, shape in specification:
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end = start + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        places.append((start, end))
    return places


def _reserve(nbytes: int) -> str:
    """Create a file of `nbytes` whose space is really there, and return its path."""
    tried = []
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        try:
            handle, path = tempfile.mkstemp(prefix="distdl-", dir=folder)
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
            continue
        try:
            os.posix_fallocate(handle, 0, max(nbytes, 1))
        except OSError as error:
            Path(path).unlink()
            tried.append(f"{folder}: {error.strerror}")
        else:
            return path
        finally:
            os.close(handle)
    raise UserError(f"no room for the dataset's {nbytes / 1e6:.1f} MB ({'; '.join(tried)}): free some, or set TMPDIR")


def _map(path: str, nbytes: int) -> mmap.mmap:
    with Path(path).open("r+b") as file:
        return mmap.mmap(file.fileno(), max(nbytes, 1))
