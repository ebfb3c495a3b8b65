"""Ranks with other sources are refused by name; nothing but a hash travels if all are alike."""

import numpy as np
import pytest

from distdl.errors import UserError
from distdl.job.program import hash_of_sources, version_and_hash
from distdl.parallel import OneProcess, alike


class Pretended(OneProcess):
    """Rank 1 of three, on which the others have these texts."""

    def __init__(self, texts, first):
        super().__init__()
        self.rank, self.size = 1, len(texts)
        self.texts, self.first, self.gathered = texts, first, 0

    def bcast(self, array, root=0):
        array[...] = alike.digest_of(self.first)

    def allreduce(self, array):
        array[...] = sum(text != self.first for _, text in self.texts)

    def allgather_json(self, value):
        self.gathered += 1
        assert value == ["b", self.texts[1][1]]
        return self.texts


@pytest.fixture(autouse=True)
def on_host_b(monkeypatch):
    monkeypatch.setattr(alike.socket, "gethostname", lambda: "b")


def test_equal_ranks_exchange_only_a_hash():
    ranks = Pretended([["a", "1"], ["b", "1"], ["c", "1"]], "1")
    assert alike.hosts_by_text(ranks, "1") == {}
    assert ranks.gathered == 0


def test_hosts_are_named_once_for_each_text():
    ranks = Pretended([["a", "1"], ["b", "2"], ["b", "2"], ["c", "1"], ["b", "1"]], "1")
    assert alike.hosts_by_text(ranks, "2") == {"1": ["a", "c", "b"], "2": ["b"]}


def test_another_version_on_a_host_is_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr(alike, "version_and_hash", lambda: "0.2 (sources 22)")
    ranks = Pretended([["a", "0.1 (sources 11)"], ["b", "0.2 (sources 22)"]], "0.1 (sources 11)")
    with pytest.raises(UserError) as caught:
        alike.check_same_program(ranks)
    assert caught.value.agreed
    assert "0.1 (sources 11) on a; 0.2 (sources 22) on b: install the same version" in str(caught.value)


@pytest.mark.parametrize(("mine", "mixed"), [("0", False), ("1", True)])
def test_a_host_with_ranks_inside_and_outside_of_a_container_is_named(mine, mixed, monkeypatch):
    monkeypatch.setenv(alike.READING, mine)
    ranks = Pretended([["a", "1"], ["b", mine], ["b", "0"]], "1")
    if mixed:
        with pytest.raises(UserError, match=f"on b some ranks are in a container.*{alike.READING}=0") as caught:
            alike.check_same_access(ranks)
        assert caught.value.agreed
    else:
        alike.check_same_access(ranks)


def test_one_process_is_like_itself():
    alike.check_same_program(OneProcess())
    assert np.array_equal(alike.digest_of("1"), alike.digest_of("1"))


def test_any_change_of_a_source_file_changes_the_hash(tmp_path):
    def sources(**files):
        for path in tmp_path.glob("*.py"):
            path.unlink()
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        return hash_of_sources(tmp_path)

    hashes = {
        sources(a="1", b="2"),
        sources(a="1", b="3"),
        sources(a="1", c="2"),
        sources(a="12", b=""),
        sources(a="1"),
    }
    assert len(hashes) == 5
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"x")
    assert sources(a="1", b="2") in hashes
    assert version_and_hash() == version_and_hash()
