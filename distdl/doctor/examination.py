"""The facts that one rank finds out alone: its launcher, cores, threads, versions, and those of its host.

Every function returns plain JSON values. The first part needs neither NumPy nor MPI.
"""

import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import distdl
from distdl.errors import UserError
from distdl.job import probes
from distdl.job.allocation import read_allocation
from distdl.job.launched_by import ranks_of_this_host, read_launch
from distdl.job.mpirun_command import find_mpirun
from distdl.job.program import DIGITS, hash_of_sources

Facts = dict[str, Any]

#: The variables that set the number of threads or the cores of a library, as the user has set them.
THREADS = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"),
    *("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"),
)
PACKAGES = ("numpy", "mpi4py", "numba")
SECONDS_FOR_MPIRUN = 20
#: The reduction to time: the float32 gradient of SimpleConvNet on MNIST.
FLOATS = 434_000


def of_process(environment: Mapping[str, str] = os.environ) -> Facts:
    """Return the facts about this process and its host that are known before NumPy and MPI are loaded."""
    launch = read_launch(environment)
    return {
        "host": socket.gethostname(),
        "rank": launch.rank,
        "by": launch.by,
        "expected": launch.size,
        "on_host": ranks_of_this_host(environment) or 1,
        "allocated": allocation(environment),
        "in_step": "SLURM_STEP_ID" in environment,
        "cores": sorted(os.sched_getaffinity(0)),
        "cores_of_host": os.cpu_count(),
        "quota": cpu_quota(),
        "threads": {name: environment[name] for name in THREADS if environment.get(name)},
        "shared_memory": probes.free_shared_memory(),
        "versions": {"distdl": distdl.__version__, "Python": platform.python_version()}
        | {name: _version_of(name) for name in PACKAGES},
        "sources": hash_of_sources(Path(distdl.__file__).parent)[:DIGITS],
        "python": sys.executable,
    }


def allocation(environment: Mapping[str, str] = os.environ) -> Facts | None:
    """Return the job and the cores of each host that the scheduler gave to it; None if no scheduler says so."""
    found = read_allocation(environment)
    return None if found is None else {"job": found.job, "cores": found.cores}


def mpirun_of_this_python() -> Facts:
    """Return the path of the `mpirun` that this Python would use, and its kind: Open MPI, MPICH or unknown."""
    try:
        path = find_mpirun()
        done = subprocess.run(
            [path, "--version"],
            env=os.environ.copy(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS_FOR_MPIRUN,
            check=False,
        )
    except UserError:
        return {"path": None, "kind": None}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"path": str(path), "kind": None, "error": str(error)}
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:200]
        return {"path": str(path), "kind": None, "error": f"exit code {done.returncode}: {said}"}
    if re.search(r"\(Open ?(MPI|RTE)\)", done.stdout):
        return {"path": str(path), "kind": "Open MPI"}
    return {"path": str(path), "kind": "MPICH" if re.search("HYDRA|Intel", done.stdout) else None}


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the number of cores whose time this control group may use, as set by ``docker run --cpus``."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((root / name).read_text(encoding="utf-8") for name in names).split()
        except OSError:
            continue
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
            return int(words[0]) / int(words[1])
    return None


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def of_libraries(*, fingerprint: bool) -> Facts:
    """Return the facts that need NumPy, and the fingerprint if this rank computes it for its host."""
    from distdl.engine.environment import blas_threads, kernel_family  # noqa: PLC0415  it imports NumPy
    from distdl.nn.kernels.choice import obstacle  # noqa: PLC0415

    disobeys = None
    try:
        with blas_threads(1):
            pass
    except UserError as error:
        disobeys = str(error)
    facts = {
        "cores": sorted(os.sched_getaffinity(0)),  # a library may have bound this process when it was loaded
        "blas_disobeys": disobeys,
        "kernels": kernel_family(),
        "no_compiled_kernels": obstacle(),
    }
    return facts | ({"fingerprint": _fingerprint()} if fingerprint else {})


def _fingerprint() -> dict[str, str]:
    """Return the fingerprint of the small default training with NumPy's kernels."""
    from distdl.config import TrainConfig  # noqa: PLC0415
    from distdl.engine.environment import numerics  # noqa: PLC0415  it imports NumPy
    from distdl.engine.fingerprint import fingerprint  # noqa: PLC0415
    from distdl.engine.user_code import network_builder, read_data  # noqa: PLC0415
    from distdl.rng import Key  # noqa: PLC0415

    config = TrainConfig(kernels="numpy").checked()
    data = read_data(config, None)
    height, width, channels = data.images.shape[1:]
    network = network_builder(config.model, config.model_settings, None)((height, width, channels), 10)
    network.initialize(Key(0))
    with numerics(1):
        return fingerprint(config, data, network)
