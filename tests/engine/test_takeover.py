"""A rank that becomes coordinator makes of the run folder, as the one before left it, what belongs there."""

import fcntl
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.engine.console import Console
from distdl.engine.logbook import Journal
from distdl.engine.metrics import JsonLines, Sums
from distdl.engine.storage import run_folder
from distdl.engine.storage.files import TEMPORARY_SUFFIX
from distdl.engine.takeover import Successor
from distdl.errors import UserError

STEPS_PER_EPOCH = 5
ENVIRONMENT = {"kernel_families": ["Zen"], "versions": {"numpy": "2"}}
CONFIG = TrainConfig(log_every=1, record_hashes=True)


def sums(loss):
    return Sums(np.array([loss]), np.array([3, 4]))


def state(step):
    return SimpleNamespace(step=step, epoch_sums=sums(step / 7), named_arrays=lambda: [("a", np.full(3, step))])


def log(journal, steps, write=lambda *_: None):
    """Take so many steps, with checkpoints after the second and fourth, and write as a coordinator does.

    That the first was saved is known when the other one begins.
    """
    for step in range(1, steps + 1):
        records = journal.stepped(state(step), sums(step / 3), 0.1)
        if step == STEPS_PER_EPOCH:
            records += journal.epoch_ended(state(step), sums(0.5))
        for record in records:
            write(*record)
        if step in {2, 4}:
            journal.checkpointed(before_is_saved=step == 4)


@pytest.fixture
def expected(tmp_path):
    """What the logs should hold after six steps."""
    folder = tmp_path / "expected"
    folder.mkdir()
    logs = {name: JsonLines(folder / name) for name in ("metrics", "hashes")}
    log(Journal(CONFIG, STEPS_PER_EPOCH, keeps=False), 6, lambda name, record: logs[name].write(record))
    for written in logs.values():
        written.close()
    return {name: (folder / name).read_bytes() for name in logs}


def successor(folder, journal):
    return Successor(CONFIG, folder, ENVIRONMENT, "data", Console(live=False), journal)


@pytest.fixture
def journal():
    journal = Journal(CONFIG, STEPS_PER_EPOCH, keeps=True)
    log(journal, 6)
    return journal


@pytest.mark.parametrize("cut", ["at the checkpoint", "in a record", "before the last", "nowhere", "one too many"])
def test_the_logs_become_what_they_should_be_whatever_the_dead_had_written(tmp_path, expected, journal, cut):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, whole in expected.items():
        length = {
            "at the checkpoint": journal.lengths[name],
            "in a record": journal.lengths[name] + 17,
            "before the last": whole[:-1].rfind(b"\n") + 1,
        }.get(cut, len(whole))
        more = b'{"step": 7, "loss": 1.0}\n' if cut == "one too many" else b""
        (folder / f"{name}.jsonl").write_bytes(whole[:length] + more)
    (folder / "timing.jsonl").write_bytes(b'{"epoch": 1}\n{"epo')
    (folder / f"config.toml{TEMPORARY_SUFFIX}").touch()
    coordinator = successor(folder, journal)
    coordinator.close()
    for name, whole in expected.items():
        assert 0 < journal.lengths[name] < len(whole)
        assert (folder / f"{name}.jsonl").read_bytes() == whole
    assert (folder / "timing.jsonl").read_bytes() == b'{"epoch": 1}\n'
    assert not list(folder.rglob(f"*{TEMPORARY_SUFFIX}"))


def test_a_journal_is_handed_over_whole(expected, journal):
    other = Journal(CONFIG, STEPS_PER_EPOCH, keeps=True)
    other.take(json.loads(json.dumps(journal.to_json())))
    for name, whole in expected.items():
        assert other.lengths[name] == journal.lengths[name]
        assert whole.endswith(other.lines[name])
        assert len(other.lines[name]) + other.lengths[name] == len(whole)


def test_a_journal_that_keeps_nothing_makes_the_same_records(journal):
    idle = Journal(CONFIG, STEPS_PER_EPOCH, keeps=False)
    assert idle.tested(state(6), sums(1.0)) == journal.tested(state(6), sums(1.0))
    assert idle.lines == {"metrics": b"", "hashes": b""}


def test_a_lock_that_the_dead_still_holds_is_waited_for(tmp_path, journal):
    with (tmp_path / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.2, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        successor(tmp_path, journal).close()


def test_a_folder_that_somebody_else_holds_is_an_error(tmp_path, journal, monkeypatch):
    monkeypatch.setattr(run_folder, "SECONDS_TO_RELEASE", 0.1)
    with (tmp_path / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run"):
            successor(tmp_path, journal)


def test_a_folder_that_is_gone_is_made_anew_with_a_warning(tmp_path, journal, expected, capsys):
    successor(tmp_path / "gone", journal).close()
    assert "metrics.jsonl lacks records" in capsys.readouterr().err
    assert expected["metrics"].endswith((tmp_path / "gone" / "metrics.jsonl").read_bytes())


def test_a_folder_that_refuses_is_one_line(tmp_path, journal):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"cannot go on in the run folder .*--resume goes on from there"):
        successor(tmp_path, journal)
