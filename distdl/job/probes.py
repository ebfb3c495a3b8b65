"""Probes of this host before MPI starts: may ranks read each other's memory, and is there enough shared memory?

A probe takes less than a millisecond, needs no other rank, and returns what it found as a text; None if all is well.
MPI libraries find these faults late: MPICH with the first large message, or with a bus error.
"""

import ctypes
import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path

from distdl.job.launched_by import ranks_of_this_host
from distdl.job.lifeline import LAUNCHERS, STEP_DAEMONS
from distdl.job.processes import Process, ancestors

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  the kernel's shared memory, not a file of ours
#: What a rank of MPICH 5.0.2 takes of shared memory (measured: 1.06 MB), and what the library UCX in it takes more if
#: there is room (4.33 MB), which it does not need; both with some room.
MPICH_BYTES_PER_RANK, UCX_BYTES_PER_RANK = 1_300_000, 4_500_000
#: The first namespaces of each kind, those of a machine outside of all containers, have fixed numbers.
FIRST_NAMESPACES = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC}
#: Settings for ranks that cannot read each other's memory, or that do not even know each other's process numbers.
WITHOUT_READING = {"MPIR_CVAR_CH4_CMA_ENABLE": "0", "UCX_POSIX_USE_PROC_LINK": "n"}
WITHOUT_PROCESS_NUMBERS = {"OMPI_MCA_btl": "^sm"}
#: A setting for little shared memory.
WITHOUT_MEMORY_OF_UCX = {"UCX_TLS": "^posix"}


def why_memory_is_private() -> str | None:
    """Return why another rank of this host cannot read the memory of this one; None if it can.

    A rank reads the memory of the launcher above it. If that is allowed on each rank of a host, the ranks can also read
    each other. A launcher of Slurm belongs to root, and that of another process namespace is invisible; then only
    ranks outside of all containers can be sure.
    """
    refused = error_of_reading(os.getpid())
    if refused:
        return f"the system refuses process_vm_readv ({os.strerror(refused)}), as old container runtimes do"
    launcher = _launcher()
    if launcher is not None and not error_of_reading(launcher.pid):
        return None
    if launcher is not None and launcher.name not in STEP_DAEMONS and not _has_own_namespace("user"):
        return "a process may read the memory of its own children only"
    for kind, name in (("user", "user"), ("pid", "process")):
        if _has_own_namespace(kind):
            return f"each rank seems to have a {name} namespace of its own, as in a container per rank"
    return None


def hides_its_process_number() -> bool:
    """Return whether other ranks of this host know this process by another number, or not at all."""
    return _launcher() is None and _has_own_namespace("pid")


def variables_for_mpi(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables to set before MPI starts, because of what the probes find; never one that is set."""
    variables = dict(WITHOUT_READING) if why_memory_is_private() else {}
    if hides_its_process_number():
        variables |= WITHOUT_PROCESS_NUMBERS
    free = free_shared_memory()
    if free is not None and free < ranks_of_this_host(environment) * (MPICH_BYTES_PER_RANK + UCX_BYTES_PER_RANK):
        variables |= WITHOUT_MEMORY_OF_UCX
    return {name: value for name, value in variables.items() if name not in environment}


def why_shared_memory_is_too_small(ranks: int, folder: Path = SHARED_MEMORY) -> str | None:
    """Return why this number of ranks of MPICH cannot start on this host, with the remedy; None if they can."""
    needed, free = ranks * MPICH_BYTES_PER_RANK, free_shared_memory(folder)
    if free is None or free >= needed:
        return None
    found = os.statvfs(folder)
    size = math.ceil((found.f_blocks * found.f_frsize - free + needed) / 2**20)
    return (
        f"MPICH needs about {needed / 1e6:.0f} MB of shared memory for {ranks} ranks on host {os.uname().nodename}, "
        f"but {folder} has {free / 1e6:.0f} MB left: start the container with --shm-size={size}m (Docker, Podman), or "
        f"mount -o remount,size={size}m {folder}, or start fewer ranks"
    )


def free_shared_memory(folder: Path = SHARED_MEMORY) -> int | None:
    """Return the free bytes of shared memory, None if they are unknown."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _launcher() -> Process | None:
    """Return the nearest launcher above this process that it can see."""
    return next((process for process in ancestors() if process.name in LAUNCHERS), None)


def _has_own_namespace(kind: str) -> bool:
    try:
        return Path(f"/proc/self/ns/{kind}").stat().st_ino != FIRST_NAMESPACES[kind]
    except OSError:  # a kernel without such namespaces
        return False


class _Span(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


def error_of_reading(pid: int, address: int = 0) -> int:
    """Return the error number if this process cannot read a byte of another one's memory; 0 if it can.

    At the address 0 there is nothing. The system checks the permission first, so a missing page is no error there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "process_vm_readv"):
        return 0
    place = ctypes.create_string_buffer(1)
    mine, theirs = _Span(ctypes.addressof(place), 1), _Span(address, 1)
    if libc.process_vm_readv(pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) >= 0:
        return 0
    found = ctypes.get_errno()
    return 0 if found == errno.EFAULT and not address else found
