"""The environment, on which bits and speed depend: library versions, CPU kernels, threads, NumPy's settings."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import threadpoolctl

import distdl
from distdl.config import reads_image_files
from distdl.data import PreparedDataset
from distdl.errors import UserError
from distdl.parallel import Communicator, ranks_per_host

#: Elements that NumPy converts at a time if operands differ in dtype.
CAST_ELEMENTS = 1024
#: tyro is no longer used. It stays in the list, so that checkpoints keep their bytes.
PACKAGES = ("numpy", "mpi4py", "safetensors", "tyro", "threadpoolctl")


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Limit BLAS to `count` threads inside the block; raise `UserError` if it does not obey."""
    with threadpoolctl.threadpool_limits(count, user_api="blas"):
        for library in _blas_libraries():
            if library["num_threads"] != count:
                raise UserError(
                    f"{library['internal_api']} runs {library['num_threads']} threads, but --threads-per-rank asks "
                    f"for {count}: set {library['internal_api'].upper()}_NUM_THREADS={count} before the start"
                )
        yield


@contextmanager
def numerics(threads: int) -> Iterator[None]:
    """Set up NumPy and BLAS for the block: `threads` of BLAS, and casts in blocks that stay in the first-level cache.

    NumPy does not warn of overflows: the trainer checks for them.
    """
    with blas_threads(threads), np.errstate(over="ignore", invalid="ignore"):
        np.setbufsize(CAST_ELEMENTS)  # until errstate ends
        yield


def _blas_libraries() -> list[dict[str, Any]]:
    return [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]


def kernel_family() -> str:
    """Return the name of the CPU kernels that compute products and functions, such as ``SkylakeX; AVX512_SKX``.

    It is the core type that OpenBLAS chose, and the instruction sets that NumPy found for its loops.
    """
    blas = [f"{library.get('architecture', library['internal_api'])}" for library in _blas_libraries()]
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    return f"{', '.join(blas) or 'no known BLAS'}; {' '.join(simd.get('found', [])) or 'baseline'}"


def describe(
    communicator: Communicator,
    data: PreparedDataset | None = None,
    *,
    dataset: str | None = None,
    kernels: str = "numpy",
) -> dict[str, Any]:
    """Return the content of ``env.json``, with the notes about the data if it is given. Collective.

    `dataset` is the name of the data; if Pillow has read it, Pillow's version is listed. If numba compiles the
    `kernels`, its version is listed.
    """
    read_images = dataset is not None and reads_image_files(dataset)
    more = [*(["pillow"] if read_images else []), *(["numba", "llvmlite"] if kernels == "compiled" else [])]
    return {
        "kernels": kernels,
        "ranks": communicator.size,
        "hosts": ranks_per_host(communicator),
        "communicator": communicator.description,
        "kernel_families": sorted(set(communicator.allgather_json(kernel_family()))),
        "versions": {
            "distdl": distdl.__version__,
            "python": platform.python_version(),
            **_package_versions(*PACKAGES, *more),
        },
        "blas": [
            {key: library.get(key) for key in ("internal_api", "version", "architecture", "num_threads")}
            for library in _blas_libraries()
        ],
        "machine": os.uname().machine,
        "system": _system(),
        **({} if data is None else {"data_notes": data.notes, "skipped_files": data.skipped_files}),
    }


def _system() -> str:
    """Return the value of ``platform.platform()``, which starts a process; a rank of MPI should not fork."""
    kernel = os.uname()
    return "-".join([kernel.sysname, kernel.release, kernel.machine, "with", "".join(platform.libc_ver())])


@cache
def _package_versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
