"""Memory that the ranks of a host share: one copy of the dataset per host, and the partial sums of its ranks.

It is a memory-mapped file, in shared memory if it fits there, otherwise in the temporary folder.

- The space is reserved first, so a full disk is an error here and not a bus error later.
- The file is unlinked as soon as every rank has mapped it. So nothing remains, however the job ends.
- Until then its creator locks it (`leftovers.py`), so no other job removes it.
- An MPI window would not survive the failure of a rank.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import ALIGNMENT_BYTES, BLOCK_BYTES, sha256_of_arrays
from distdl.errors import UserError
from distdl.job import leftovers, limits
from distdl.mapped_files import MappedArray, created, is_first_rows_of_file, open_mapped, release_pages
from distdl.parallel.agreement import from_rank_0, together
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

    An array of `mapped_files.open_mapped`, or its first rows, is not copied into memory: all ranks map the file. A host
    that lacks the file gets it.
    """
    host = communicator.host() if host is None else host
    in_files = {name: array for name, array in arrays.items() if is_first_rows_of_file(array)}
    arrays = {name: array for name, array in arrays.items() if name not in in_files}
    in_memory = _share_in_memory(communicator, arrays, host)
    names = communicator.bcast_json(list(in_files))
    return in_memory | {name: _share_file(communicator, in_files.get(name), host) for name in names}


def _share_in_memory(
    communicator: Communicator, arrays: Mapping[str, NDArray[Any]], host: Communicator
) -> dict[str, NDArray[Any]]:
    described = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    specification = communicator.bcast_json(described)
    places, end = [], 0
    for _, dtype, shape in specification:
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end = start + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        places.append((start, end))
    leaders = _leaders(communicator, host)
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


def _leaders(communicator: Communicator, host: Communicator) -> Communicator | None:
    """Return the group of the first ranks of all hosts; None on other ranks, and if there is one host. Collective."""
    if host.size == communicator.size:  # make no group: Open MPI may crash if a rank dies meanwhile
        return None
    return communicator.split(0 if host.rank == 0 else None)


def _share_file(communicator: Communicator, array: NDArray[Any] | None, host: Communicator) -> NDArray[Any]:
    """Return the mapped file of rank 0 on every rank; write it on the hosts that lack it. Collective."""
    leaders = _leaders(communicator, host)

    def described() -> list[Any]:
        assert isinstance(array, np.memmap)
        sha256 = "" if leaders is None else sha256_of_arrays([("", array)])
        return [str(Path(str(array.filename)).absolute()), array.dtype.str, list(array.shape), sha256]

    name, dtype, shape, sha256 = from_rank_0(communicator, described)
    path = Path(name)

    def write_if_absent() -> None:
        if leaders is None:
            return
        is_absent = leaders.rank > 0 and not _holds(path, shape[0], sha256)
        if any(leaders.allgather_json(is_absent)):
            with ExitStack() as files:
                target = together(
                    leaders, lambda: files.enter_context(created(path, shape, dtype)) if is_absent else None
                )
                _send(leaders, array, target, shape, dtype)
        leaders.free()

    together(communicator, write_if_absent)
    return together(communicator, lambda: _open(path, shape[0]))


def _holds(path: Path, count: int, sha256: str) -> bool:
    """Return whether the first `count` rows of a file have this hash."""
    try:
        return sha256_of_arrays([("", open_mapped(path)[:count])]) == sha256
    except (OSError, ValueError):
        return False


def _send(
    leaders: Communicator,
    array: NDArray[Any] | None,
    target: MappedArray | None,
    shape: Sequence[int],
    dtype: str,
) -> None:
    """Send the array of rank 0 in blocks of rows, and write it to `target` on the ranks that have one. Collective."""
    size = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * np.dtype(dtype).itemsize))
    for start in range(0, shape[0], size):
        rows = np.empty((min(size, shape[0] - start), *shape[1:]), dtype)
        if array is not None:
            rows[...] = array[start : start + size]
            release_pages(array)
        leaders.bcast(rows)
        if target is not None:
            target[start : start + size] = rows
            release_pages(target)


def _open(path: Path, count: int) -> NDArray[Any]:
    """Return the first `count` rows of the array in a file."""
    try:
        return open_mapped(path)[:count]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be mapped into memory: {error}; expected every rank of this machine to have access to it"
        ) from None


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
            if (reached := limits.explained(error)) is not error and folder == folders()[-1]:
                raise reached from error
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
