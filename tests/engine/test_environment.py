"""BLAS runs the requested number of threads, and env.json records everything that the bits may depend on."""

import json
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import threadpoolctl

import distdl
from distdl.engine import environment
from distdl.engine.environment import blas_threads, describe, kernel_family
from distdl.errors import UserError
from distdl.parallel import OneProcess


def threads():
    return [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]


def test_the_blas_of_numpy_can_be_limited():
    np.ones((2, 2)) @ np.ones((2, 2))
    assert threads()


@pytest.mark.parametrize("count", [1, 2])
def test_blas_runs_the_requested_threads_and_its_old_number_afterwards(count):
    before = threads()
    with blas_threads(count):
        assert threads() == [count] * len(before)
    assert threads() == before


def test_the_old_number_of_threads_returns_after_an_error_too():
    before = threads()
    with pytest.raises(ZeroDivisionError), blas_threads(2):
        raise ZeroDivisionError
    assert threads() == before


def test_a_blas_that_does_not_obey_is_an_error_that_says_what_to_do(monkeypatch):
    stubborn = {"user_api": "blas", "internal_api": "openblas", "num_threads": 8}
    openmp = {"user_api": "openmp", "internal_api": "openmp", "num_threads": 5}
    before = threads()
    with monkeypatch.context() as patched:
        patched.setattr(environment.threadpoolctl, "threadpool_info", lambda: [openmp, stubborn])
        with pytest.raises(UserError) as caught, blas_threads(1):
            pytest.fail("the work began")
    assert str(caught.value) == (
        "openblas runs 8 threads, but --threads-per-rank asks for 1: set OPENBLAS_NUM_THREADS=1 before the start"
    )
    assert threads() == before


def test_threads_of_other_libraries_are_not_checked(monkeypatch):
    openmp = {"user_api": "openmp", "internal_api": "openmp", "num_threads": 5}
    monkeypatch.setattr(environment.threadpoolctl, "threadpool_info", lambda: [openmp])
    with blas_threads(1):
        pass


def test_env_json_names_everything_that_the_bits_may_depend_on():
    with blas_threads(1):
        described = describe(OneProcess("one process, for the test"))
    assert described["ranks"] == 1
    assert described["hosts"] == {socket.gethostname(): 1}
    assert described["communicator"] == "one process, for the test"
    assert described["kernel_families"] == [kernel_family()]
    assert described["machine"] == platform.machine()
    assert described["system"] == platform.platform()
    versions = described["versions"]
    assert set(versions) == {"distdl", "python", "numpy", "mpi4py", "safetensors", "tyro", "threadpoolctl"}
    assert versions["distdl"] == distdl.__version__
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == np.__version__
    assert described["blas"]
    assert described["kernels"] == "numpy"
    compiled = describe(OneProcess(), kernels="compiled")
    assert (compiled["kernels"], set(compiled["versions"]) - set(versions)) == ("compiled", {"numba", "llvmlite"})
    for library in described["blas"]:
        assert set(library) == {"internal_api", "version", "architecture", "num_threads"}
        assert library["num_threads"] == 1
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize(
    ("dataset", "is_listed"), [(None, False), ("digits", False), ("npz:a", False), ("folder:a", True), ("csv:a", True)]
)
def test_env_json_names_the_library_that_has_read_images(dataset, is_listed):
    assert ("pillow" in describe(OneProcess(), dataset=dataset)["versions"]) == is_listed


class ThreeRanks(OneProcess):
    """Three ranks on two hosts with different processors, as rank 0 sees them."""

    def __init__(self):
        super().__init__("three ranks")
        self.size = 3

    def allgather_json(self, value):
        return [value, "elsewhere", value]


def test_env_json_covers_all_ranks():
    described = describe(ThreeRanks())
    assert described["ranks"] == 3
    assert described["hosts"] == {socket.gethostname(): 2, "elsewhere": 1}
    assert described["kernel_families"] == sorted({kernel_family(), "elsewhere"})


def test_a_library_that_is_not_installed_is_recorded_as_absent(monkeypatch):
    def version(name):
        if name == "mpi4py":
            raise PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(environment, "version", version)
    monkeypatch.setattr(
        environment, "_package_versions", environment._package_versions.__wrapped__
    )  # without the cache
    versions = describe(OneProcess())["versions"]
    assert versions["mpi4py"] == "absent"
    assert versions["tyro"] == "1.2"


def test_the_kernel_family_names_the_core_type_of_the_blas():
    family = kernel_family()
    assert isinstance(family, str)
    assert family.strip()
    assert family == kernel_family()
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas":
            assert library.get("architecture", library["internal_api"]) in family


def test_the_kernel_family_is_known_even_if_the_blas_is_unknown(monkeypatch):
    monkeypatch.setattr(environment.threadpoolctl, "threadpool_info", list)
    assert kernel_family().startswith("no known BLAS; ")


def test_the_tests_themselves_run_with_one_thread():
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    assert set(threads()) == {1}
