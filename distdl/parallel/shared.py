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
from contextlib import nullcontext
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
    with communicator.node() if node is None else nullcontext(node) as own_node:
        buffer = _mapped(communicator, own_node, places[-1][1] if places else 0)
        leaders = communicator.split(0 if own_node.rank == 0 else None)
        shared: dict[str, NDArray[Any]] = {}
        for (name, dtype, shape), (start, end) in zip(specification, places, strict=True):
            view = np.frombuffer(buffer, np.uint8)[start:end].view(dtype).reshape(shape)
            if leaders is not None:
                if communicator.rank == 0:
                    view[...] = arrays[name]
                leaders.bcast(view)
            view.flags.writeable = False
            shared[name] = view
        if leaders is not None:
            leaders.free()
        own_node.barrier()
    return shared


def _places(specification: list[tuple[str, str, list[int]]]) -> list[tuple[int, int]]:
    places, end = [], 0
    for _, dtype, shape in specification:
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end = start + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        places.append((start, end))
    return places


def _mapped(communicator: Communicator, node: Communicator, nbytes: int) -> mmap.mmap:
    """Return `nbytes` of memory that the ranks of a node share. Collective; its file is gone, whatever happened."""
    reserved: list[str] = []

    def reserve() -> None:
        if node.rank == 0:
            reserved.append(_reserve(nbytes))

    try:
        together(communicator, reserve)  # which raises for another node's leader too
        path = node.bcast_json(reserved[0] if reserved else None)
        return together(communicator, lambda: _map(path, nbytes))
    finally:
        for path in reserved:
            Path(path).unlink()


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
    try:
        with Path(path).open("r+b") as file:
            return mmap.mmap(file.fileno(), max(nbytes, 1))
    except OSError as error:
        raise UserError(
            f"the dataset's {nbytes / 1e6:.1f} MB in {path} cannot be mapped into memory: {error.strerror or error}; "
            "expected every rank of this machine to be allowed to: raise its limits (ulimit -v), or start fewer ranks"
        ) from None
