"""Which kernels this process can use. Nothing imports numba or LLVM before it is needed."""

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distdl.host_memory import available_to_this_process
from distdl.nn.kernels import NUMPY, Kernels

CPU_INFO = Path("/proc/cpuinfo")
LEAST_NUMBA = (0, 63)
#: With less, LLVM ends the process while it compiles (measured: 400 MB are too little, 600 MB enough, in all).
LEAST_ROOM = 350_000_000
INSTALL = "pip install 'distdl-mpi[fast]'"
#: Every CPU of these machines has fused multiply-add; an x86 CPU lists it as ``fma``.
WITH_FMA = {"aarch64", "arm64"}


def kernels_named(name: str) -> Kernels:
    """Return the kernels ``numpy`` or ``compiled``."""
    if name == NUMPY.name:
        return NUMPY
    with _no_garbage_collection():
        from distdl.nn.kernels.compiled import COMPILED  # noqa: PLC0415  they take time to import

    return COMPILED


def obstacle() -> str | None:
    """Return why this process cannot use compiled kernels, with the remedy; None if it can."""
    try:
        installed = version("numba")
    except PackageNotFoundError:
        return f"numba is not installed: {INSTALL}"
    if tuple(int(number) for number in installed.split(".")[:2] if number.isdigit()) < LEAST_NUMBA:
        least = ".".join(map(str, LEAST_NUMBA))
        return f"numba {installed} is too old, expected {least} or later: {INSTALL}"
    if not _has_fma():
        return f"this CPU ({os.uname().machine}) has no fused multiply-add instructions that distdl knows"
    room = available_to_this_process()
    if "numba" not in sys.modules and room < LEAST_ROOM:
        return (
            f"numba needs about {LEAST_ROOM / 1e6:.0f} MB of address space to compile, but the limit (ulimit -v or -d) "
            f"leaves {room / 1e6:.0f} MB: raise it with ulimit -v unlimited, or where it is set"
        )
    return _defect(installed)


def _defect(installed: str) -> str | None:
    """Return why this version of numba, which is installed, does not work."""
    try:
        with _no_garbage_collection():
            numba = importlib.import_module("numba")
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"numba {installed} does not work here ({reason}): {INSTALL}, in a new environment"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT forbids numba to compile: unset this variable"
    return None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Do not search for garbage in the block: an import creates many objects that stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _has_fma() -> bool:
    machine = os.uname().machine
    if machine != "x86_64":
        return machine in WITH_FMA
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return "fma" in flags.split()
