"""The facts that ranks find out together: their records, clocks, memory access, folders, and timed reductions.

Every function is collective. Rank 0 receives one small record per rank, and no other rank receives any.
"""

import ctypes
import errno
import fcntl
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from distdl.doctor.examination import FLOATS
from distdl.job.probes import error_of_reading
from distdl.parallel import REDUCTIONS, Communicator, Field, Layout

CALLS = 5
#: A file that another host has just written may appear late on a network file system.
SECONDS_TO_APPEAR = 3.0


def gathered(communicator: Communicator, value: Any) -> list[Any]:
    """Return the values of all ranks on rank 0, nothing elsewhere. Each value travels once."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.zeros(communicator.size, np.int64)
    sizes[communicator.rank] = text.size
    communicator.allreduce(sizes)
    nothing = [(0, 0)] * communicator.size
    spans, start = list(nothing), 0
    if communicator.rank == 0:
        for rank, size in enumerate(map(int, sizes)):
            spans[rank] = start, size
            start += size
    received = np.empty(max(start, 1), np.uint8)
    communicator.alltoallv(text.copy(), [(0, text.size), *nothing[1:]], received, spans)
    if communicator.rank:
        return []
    return [json.loads(received[start : start + size].tobytes()) for start, size in spans]


def memory_access(host: Communicator) -> str | None:
    """Return why the first rank of this host cannot read the memory of the last one; None if it can."""
    target = ctypes.create_string_buffer(8)
    described = host.bcast_json([os.getpid(), ctypes.addressof(target)], root=host.size - 1)
    failure = error_of_reading(*described) if host.rank == 0 else 0
    host.barrier()  # the target lives until here
    return errno.errorcode[failure] if failure else None


def seconds_of_reductions(group: Communicator) -> dict[str, float]:
    """Return the median seconds of a reduction on this rank, by its name: the canonical tree, and MPI_Allreduce."""
    layout = Layout([Field("gradient", "f4", FLOATS)])
    values = {"gradient": np.ones(FLOATS, np.float32)}
    found = {}
    for name, kind in REDUCTIONS.items():
        reduction = kind(group, layout)
        times = []
        for _ in range(CALLS + 1):
            reduction.begin([range(rank, rank + 1) for rank in range(group.size)])
            reduction.add(group.rank, values)
            group.barrier()
            started = time.perf_counter()
            reduction.total()
            times.append(time.perf_counter() - started)
        reduction.close()
        found[name] = statistics.median(times[1:])  # the first one makes the buffers
    return found


def check_folder(communicator: Communicator, host: Communicator, folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """Return the facts about the run folder on rank 0; and on every rank whether its host sees the folder of rank 0."""
    facts, handle, name = None, -1, None
    if communicator.rank == 0:
        facts, handle, name = _tried_folder(folder)
    name = communicator.bcast_json(name)
    try:
        seen = name is None or host.rank > 0 or _appears(Path(name))
        communicator.barrier()
    finally:
        if handle >= 0:
            Path(name).unlink(missing_ok=True)
            os.close(handle)
    return facts, seen


def _tried_folder(folder: Path) -> tuple[dict[str, Any], int, str | None]:
    """Write and lock a file in the folder, or in the nearest folder above it that exists. A file there is an error."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    facts: dict[str, Any] = {"path": str(folder), "error": None, "lock_error": None}
    try:
        space = os.statvfs(place)
        facts |= {"free": space.f_bavail * space.f_frsize}
        handle, name = tempfile.mkstemp(prefix=".distdl-doctor-", dir=place)
    except OSError as error:
        return facts | {"error": f"{place}: {error.strerror}"}, -1, None
    try:
        os.write(handle, bytes(2**16))
        os.fsync(handle)
    except OSError as error:
        facts["error"] = f"{place}: {error.strerror}"
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        facts["lock_error"] = error.strerror
    return facts, handle, name


def _appears(path: Path) -> bool:
    ends = time.monotonic() + SECONDS_TO_APPEAR
    while not (exists := path.exists()) and time.monotonic() < ends:
        time.sleep(0.05)
    return exists
