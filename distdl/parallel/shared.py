"""Memory that the ranks of a host share: one copy of the dataset per host, and the partial sums of its ranks.

It is a memory-mapped file, in shared memory if it fits there, otherwise in the temporary folder.

- The space is reserved first, so a full disk is an error here and not a bus error later.
- The file is unlinked as soon as every rank has mapped it. So nothing remains, however the job ends.
- Until then its creator locks it (`leftovers.py`), so no other job removes it.
- An MPI window would not survive the failure of a rank.
"""

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
from distdl.job import leftovers
from distdl.parallel.agreement import together
from distdl.parallel.communicator import Bytes, Communicator

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  the kernel's shared memory, not a file of ours


def shared_bytes(communicator: Communicator, host: Communicator, nbytes: int, purpose: str) -> Bytes:
    """Return `nbytes` zeros in memory that all ranks of `host`, a part of `communicator`, share. Collective.

    They start on a 64-byte boundary. Raises `UserError` on every rank of `communicator` if a host has no room for
    them; its message names the `purpose`.
    """
    reserved: list[tuple[int, str]] = []

    def reserve() -> None:
        if host.rank == 0:
            reserved.append(_reserve(nbytes, purpose))

    try:
        together(communicator, reserve)
        path = host.bcast_json(reserved[0][1] if reserved else None)
        return together(communicator, lambda: _map(path, nbytes))
    finally:
        for handle, mine in reserved:
            Path(mine).unlink()
            os.close(handle)


def share_arrays(
    communicator: Communicator, arrays: Mapping[str, NDArray[Any]], *, host: Communicator | None = None
) -> dict[str, NDArray[Any]]:
    """Return the arrays of rank 0, read-only, on every rank, with one copy in memory per host. Collective.

    Only rank 0 reads its argument `arrays`. `host` is the group of ranks that share memory (default:
    ``communicator.host()``). Raises `UserError` on every rank if a host has no room for them.
    """
    described = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    specification = communicator.bcast_json(described)
    places, end = [], 0
    for _, dtype, shape in specification:
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end = start + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        places.append((start, end))
    host = communicator.host() if host is None else host
    leaders = None
    if host.size < communicator.size:  # on one host, make no group: Open MPI may crash if a rank dies meanwhile
        leaders = communicator.split(0 if host.rank == 0 else None)
    buffer = shared_bytes(communicator, host, end, "the dataset")
    shared: dict[str, NDArray[Any]] = {}
    for (name, dtype, shape), (start, end) in zip(specification, places, strict=True):
        view = buffer[start:end].view(dtype).reshape(shape)
        if communicator.rank == 0:
            view[...] = arrays[name]
        if leaders is not None:
            leaders.bcast(view)
        view.flags.writeable = False
        shared[name] = view
    if leaders is not None:
        leaders.free()
    host.barrier()
    return shared


def folders() -> tuple[Path, Path]:
    """Return the folders for shared files, the best first."""
    return SHARED_MEMORY, Path(tempfile.gettempdir())


def _reserve(nbytes: int, purpose: str) -> tuple[int, str]:
    """Create a locked file of `nbytes` with reserved space; return its handle and its path."""
    tried = []
    for folder in folders():
        try:
            handle, path = leftovers.create_locked(folder, leftovers.MEMORY)
            try:
                os.posix_fallocate(handle, 0, max(nbytes, 1))
            except OSError:
                Path(path).unlink()
                os.close(handle)
                raise
            else:
                return handle, path
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
    raise UserError(
        f"no room for {nbytes / 1e6:.1f} MB of {purpose} ({'; '.join(tried)}): free some space, or set TMPDIR to "
        "another folder"
    )


def _map(path: str, nbytes: int) -> Bytes:
    try:
        with Path(path).open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), max(nbytes, 1), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except OSError as error:
        raise UserError(
            f"{nbytes / 1e6:.1f} MB in {path} cannot be mapped into memory: {error.strerror or error}; "
            "expected every rank of this machine to have access to this folder and enough address space: raise "
            "the limits (ulimit -v), or start fewer ranks"
        ) from None
    return np.frombuffer(mapped, np.uint8)[:nbytes]
