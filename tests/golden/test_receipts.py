"""Short runs end with the receipts recorded for this kernel family, so a change of bits is detected."""

import pytest
from record import COMMAND, COMPILED, PLAYED, RUNS, bits_of, entry_when_played, load, renewed

from distdl.engine.fingerprint import first_difference
from distdl.job.launched_by import read_launch
from distdl.nn.kernels.choice import obstacle

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")


@pytest.mark.parametrize("play", [*PLAYED, COMPILED])
def test_the_receipts_equal_the_recorded_ones(play):
    if play == COMPILED and obstacle() is not None:
        pytest.skip(obstacle())
    entry = entry_when_played({}, "compiled") if play == COMPILED else entry_when_played(PLAYED[play])
    if entry is None:
        pytest.skip("this CPU lacks the instructions")
    family, receipts = entry
    known = load()
    if family not in known:
        pytest.skip(f"no golden receipts for {family}: add them by {COMMAND}")
    changed = [name for name in RUNS if receipts[name] != known[family].get(name)]
    operation = first_difference(known[family].get("fingerprint", {}), receipts["fingerprint"])
    why = (
        "in no operation of the fingerprint" if operation is None else f"and this machine computes another {operation}"
    )
    assert not changed, f"the bits of these runs have changed, {why}; CONTRIBUTING.md says what to do: {changed}"
    assert bits_of(receipts) == bits_of(known[family])


def test_at_least_two_families_are_recorded_and_they_differ():
    entries = [entry for name, entry in load().items() if name != COMPILED]
    assert len(entries) >= 2
    for name in RUNS:
        assert len({entry[name]["weights_sha256"] for entry in entries}) >= 2, name


def test_a_new_family_is_added_to_the_families_of_other_cpus():
    assert renewed({"theirs": {"run": 1}}, {"ours": {"run": 2}}) == ({"ours": {"run": 2}, "theirs": {"run": 1}}, [])


def test_a_change_of_bits_drops_the_families_that_cannot_be_recorded_here():
    known = {"theirs": {"run": 1}, "ours": {"run": 2}}
    assert renewed(known, {"ours": {"run": 3}}) == ({"ours": {"run": 3}}, ["theirs"])
    assert renewed(known, {"ours": {"run": 2}}) == (known, [])
    every = known | {COMPILED: {"run": 4}}
    assert renewed(every, {"ours": {"run": 3}}) == ({COMPILED: {"run": 4}, "ours": {"run": 3}}, ["theirs"])
    assert renewed(every, {COMPILED: {"run": 5}}) == (every | {COMPILED: {"run": 5}}, [])
    other = {"fingerprint": {"exp": "1"}, "run": 2}
    assert renewed(known, {"ours": other}) == ({**known, "ours": other}, [])
