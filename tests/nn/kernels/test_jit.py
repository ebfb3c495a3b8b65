"""Kernels are compiled once: later processes load them, whatever part of the cache is left."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distdl.nn.kernels.compiled.cache import kernel_cache

REPOSITORY = Path(__file__).parents[3]

PROGRAM = """
import json
import numpy as np
from distdl.nn import Affine, Sequential
from distdl.nn.kernels.choice import kernels_named, obstacle
from distdl.rng import Key
assert obstacle() is None
from distdl.nn.kernels.compiled.cache import kernel_cache
from distdl.nn.kernels.compiled.jit import compilations_told_to
network, told = Sequential([Affine(20), Affine(3)], (4,), kernels=kernels_named("compiled")), []
network.initialize(Key(0))
with compilations_told_to(told.append):
    y = network.forward(np.ones((3, 4), np.float32))
    network.backward(y)
bits = (y.tobytes() + network.gradients.tobytes()).hex()
print(json.dumps([[name.split("(")[0] for name in told], bits, kernel_cache().complaints]))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return the folder of a cache, a function that starts a process with it, and the result of the first start."""
    folder = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(REPOSITORY)}
    environment["TMPDIR"] = str(tmp_path_factory.mktemp("fallback"))  # the host's may have the kernels

    def start():
        command = [sys.executable, "-c", PROGRAM]
        return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    return folder, start, start()


def files_of(folder, kernel=""):
    return sorted(folder.glob(f"distdl/kernels/*/{kernel}*.kernel"))


def test_a_second_start_compiles_nothing_and_has_the_same_bits(started):
    _, start, (compiled, bits, complaints) = started
    assert {"affine.forward", "affine.backward"} <= set(compiled)
    assert complaints == []
    assert start() == [[], bits, []]


@pytest.mark.parametrize("left_out", ["affine.forward", "affine.backward", "products.column_block"])
def test_kernels_that_are_missing_are_compiled_next_to_loaded_ones(started, left_out):
    folder, start, (_, bits, _) = started
    for path in files_of(folder, left_out):
        path.unlink()
    compiled, found, complaints = start()
    assert set(compiled) <= {left_out}
    assert (found, complaints) == (bits, [])


def test_damaged_kernels_are_compiled_again_and_named_in_one_line_each(started):
    folder, start, (_, bits, _) = started
    start()  # complete again
    path = files_of(folder, "affine.forward")[0]
    path.write_bytes(path.read_bytes()[:-9])
    compiled, found, [complaint] = start()
    assert (compiled, found) == (["affine.forward"], bits)
    assert complaint.startswith(f"'{path}' in the kernel cache is damaged")
    assert start() == [[], bits, []]


#: Functions of the C library whose bits depend on the machine, or that a CPU without fused multiply-add needs.
OF_THE_LIBRARY = ("exp", "exp2", "expm1", "log", "log1p", "log2", "pow", "sin", "cos", "tanh", "fma", "fmod", "rint")


def test_no_kernel_that_has_been_compiled_here_calls_the_mathematical_library():
    """A call is a name in the symbol table of the object file; so is the own name of a kernel."""
    names = "|".join(OF_THE_LIBRARY)
    for folder in kernel_cache()._folders:
        for path in folder.glob("*.kernel"):
            own = path.name.partition("-")[0].partition(".")[2].encode()
            assert set(re.findall(rf"\0((?:{names})f?)\0".encode(), path.read_bytes())) <= {own}, path
