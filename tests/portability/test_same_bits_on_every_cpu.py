"""With compiled kernels, the bits of a run do not depend on the CPU: processes that compute as other CPUs prove it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cpu_families import FAMILIES, can_pretend, output_as

from distdl.engine.fingerprint import first_difference
from distdl.job.launched_by import read_launch

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher"),
    pytest.mark.skipif(not can_pretend(), reason="this CPU cannot compute as others"),
]


def outputs_as(families, program):
    """Return the output of a program as each family. Several run at the same time, one per core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        lines = pool.map(lambda family: output_as(family, HERE / program).splitlines()[-1], families)
        return {family: json.loads(line) for family, line in zip(families, lines, strict=True)}


def test_all_that_enters_the_weights_outside_of_the_kernels_has_the_same_bits_on_every_cpu():
    found = outputs_as(FAMILIES, "ingredients.py")
    own = found.pop("its own")
    dependent = {name for name in own if name.startswith("[")}
    assert len(dependent) == 3
    differing = {name for name in own for other in found.values() if other[name] != own[name]}
    assert differing <= dependent
    assert differing, "these families compute alike: the test shows nothing"


@pytest.fixture(scope="module")
def trainings():
    """Return the results of the same training; each family compiles its own code, once for its kernel cache."""
    pytest.importorskip("numba")
    return outputs_as(["its own", "Haswell"], "training.py")


@pytest.mark.parametrize("family", ["its own", "Haswell"])
def test_a_training_with_compiled_kernels_has_one_receipt_on_every_cpu(family, trainings):
    found, own = trainings[family], trainings["its own"]
    assert first_difference(own["fingerprint"], found["fingerprint"]) is None
    assert found == own
    assert not any(name.startswith("product") for name in own["fingerprint"]), "a product of BLAS enters the results"
