"""A new coordinator completes the files of the run folder, however far the lost one had written them."""

import fcntl
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.data.signature import Signature
from distdl.engine.console import Console
from distdl.engine.coordinator import Coordinator, RunFacts
from distdl.engine.logbook import Logbook
from distdl.engine.metrics import Sums
from distdl.engine.storage.files import TEMPORARY_SUFFIX
from distdl.engine.storage.header import RunProgress
from distdl.engine.timing.timeline import Spent
from distdl.errors import UserError
from distdl.job import folder_lock

STEPS_PER_EPOCH = 5
SIGNATURE = Signature("classification", 2, None, (8, 8, 1), "uint8", (0.0,), (1.0,))
ENVIRONMENT = {"kernel_families": ["Zen"], "versions": {"numpy": "2"}}
CONFIG = TrainConfig(log_every=1, record_hashes=True)
CONSOLE = Console(live=False)


def sums(loss):
    return Sums(np.array([loss]), np.array([3, 4]))


def state(step):
    progress = RunProgress(test_step=step)
    arrays = [("a", np.full(3, step))]
    return SimpleNamespace(step=step, progress=progress, epoch_sums=sums(step / 7), named_arrays=lambda: arrays)


def new_logbook(*, keeps):
    return Logbook(CONFIG, STEPS_PER_EPOCH, CONSOLE, keeps=keeps)


def log(logbook, steps):
    """Log the steps, with checkpoints after steps 2 and 4. At the second checkpoint the first is known to be saved."""
    for step in range(1, steps + 1):
        logbook.stepped(state(step), sums(step / 3), 0.1)
        if step == STEPS_PER_EPOCH:
            logbook.epoch_ended(state(step), sums(0.5), Spent((0.0,), (0.0,), (0.0,)), {})
        if step in {2, 4}:
            logbook.checkpointed(state(step), previous_is_saved=step == 4)


@pytest.fixture
def expected(tmp_path):
    """Return the content of the logs after six steps."""
    folder = tmp_path / "expected"
    folder.mkdir()
    logbook = new_logbook(keeps=False)
    logbook.open(folder, {}, {})
    log(logbook, 6)
    logbook.close()
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in ("metrics", "hashes")}


def taken_over(folder, logbook):
    return Coordinator.take_over(RunFacts(CONFIG, ENVIRONMENT, "data", SIGNATURE), folder, logbook, CONSOLE)


@pytest.fixture
def logbook():
    logbook = new_logbook(keeps=True)
    log(logbook, 6)
    return logbook


@pytest.mark.parametrize("cut", ["at the checkpoint", "in a record", "before the last", "nowhere", "one too many"])
def test_the_logs_become_complete_however_far_the_lost_rank_had_written_them(tmp_path, expected, logbook, cut):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, whole in expected.items():
        length = {
            "at the checkpoint": logbook.lengths[name],
            "in a record": logbook.lengths[name] + 17,
            "before the last": whole[:-1].rfind(b"\n") + 1,
        }.get(cut, len(whole))
        more = b'{"step": 7, "loss": 1.0}\n' if cut == "one too many" else b""
        (folder / f"{name}.jsonl").write_bytes(whole[:length] + more)
    (folder / "timing.jsonl").write_bytes(b'{"epoch": 1}\n{"epo')
    (folder / f"config.toml{TEMPORARY_SUFFIX}").touch()
    coordinator = taken_over(folder, logbook)
    coordinator.close()
    for name, whole in expected.items():
        assert 0 < logbook.lengths[name] < len(whole)
        assert (folder / f"{name}.jsonl").read_bytes() == whole
    assert (folder / "timing.jsonl").read_bytes() == b'{"epoch": 1}\n'
    assert not list(folder.rglob(f"*{TEMPORARY_SUFFIX}"))


def test_a_logbook_is_handed_over_completely(expected, logbook):
    other = new_logbook(keeps=True)
    other.take(json.loads(json.dumps(logbook.to_json())))
    for name, whole in expected.items():
        assert other.lengths[name] == logbook.lengths[name]
        assert whole.endswith(other.lines[name])
        assert len(other.lines[name]) + other.lengths[name] == len(whole)


def test_a_logbook_that_keeps_nothing_writes_the_same_records(tmp_path, logbook):
    idle = new_logbook(keeps=False)
    written = []
    for book in (idle, logbook):
        folder = tmp_path / f"{len(written)}"
        folder.mkdir()
        book.open(folder, {}, {})
        book.tested(state(6), sums(1.0))
        book.close()
        written.append((folder / "metrics.jsonl").read_bytes())
    assert written[0] == written[1] != b""
    assert idle.lines == {"metrics": b"", "hashes": b""}


def test_a_new_coordinator_waits_for_the_lock_of_a_dead_one(tmp_path, logbook):
    with (tmp_path / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.2, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        taken_over(tmp_path, logbook).close()


def test_a_folder_that_another_run_locks_is_an_error(tmp_path, logbook, monkeypatch):
    monkeypatch.setattr(folder_lock, "SECONDS_TO_RELEASE", 0.1)
    with (tmp_path / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run"):
            taken_over(tmp_path, logbook)


def test_a_missing_folder_is_created_again_with_a_warning(tmp_path, logbook, expected, capsys):
    taken_over(tmp_path / "gone", logbook).close()
    assert "metrics.jsonl lacks records" in capsys.readouterr().err
    assert expected["metrics"].endswith((tmp_path / "gone" / "metrics.jsonl").read_bytes())


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, logbook):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"cannot continue in the run folder .*use --resume"):
        taken_over(tmp_path, logbook)
