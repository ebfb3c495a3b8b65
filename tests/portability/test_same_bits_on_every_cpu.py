"""With compiled kernels, the bits of a run do not depend on the CPU: processes that compute as other CPUs prove it."""

import json
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


def test_all_that_enters_the_weights_outside_of_the_kernels_has_the_same_bits_on_every_cpu():
    found = {family: json.loads(output_as(family, HERE / "ingredients.py")) for family in FAMILIES}
    own = found.pop("its own")
    dependent = {name for name in own if name.startswith("[")}
    assert len(dependent) == 3
    differing = {name for name in own for other in found.values() if other[name] != own[name]}
    assert differing <= dependent
    assert differing, "these families compute alike: the test shows nothing"


def test_a_training_with_compiled_kernels_has_one_receipt_on_every_cpu(tmp_path):
    """Each family compiles its own code, in a cache of its own. One receipt, and also one fingerprint."""
    pytest.importorskip("numba")
    found = {}
    for number, family in enumerate(("its own", "Haswell")):
        cache = {
            "XDG_CACHE_HOME": str(tmp_path / f"{number}"),
            "NUMBA_CACHE_DIR": str(tmp_path / f"{number}" / "numba"),
        }
        found[family] = json.loads(output_as(family, HERE / "training.py", **cache).splitlines()[-1])
    own, other = found.values()
    assert first_difference(own["fingerprint"], other["fingerprint"]) is None
    assert own == other
