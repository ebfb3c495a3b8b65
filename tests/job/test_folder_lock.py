"""One run at a time owns a folder; a reader of the folder cannot, and an owner that was killed no longer does."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from distdl.errors import UserError
from distdl.job import folder_lock
from distdl.job.folder_lock import InUseError, is_locked, lock_folder
from distdl.job.processes import here

WAYS = ["flock", "link"]
NOBODY = 65534
#: Locks a folder, says so, and waits.
OWNER = """
import sys, time
from pathlib import Path
from distdl.job.folder_lock import lock_folder
lock = lock_folder(Path(sys.argv[1]), sys.argv[2])
print("locked", flush=True)
time.sleep(60)
"""


@contextmanager
def owner_of(folder, way):
    """Let another process lock the folder; kill it at the end."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, folder, way], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"locked\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def refuse_flock(monkeypatch, number=errno.ENOLCK):
    def refused(_handle, _operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)


@pytest.mark.parametrize("ours", WAYS)
@pytest.mark.parametrize("theirs", WAYS)
def test_a_folder_has_one_owner_until_it_is_killed(tmp_path, theirs, ours):
    with owner_of(tmp_path, theirs) as process:
        with pytest.raises(InUseError, match=f"process {process.pid} of"):
            lock_folder(tmp_path, ours)
        assert is_locked(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_locked(tmp_path)
        lock_folder(tmp_path, ours).close()
    assert not (tmp_path / "owner").exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_closed_lock_leaves_the_folder_free(tmp_path, way):
    with lock_folder(tmp_path, way) as lock:
        assert (tmp_path / "owner").exists() is (way == "link")
        with pytest.raises(InUseError):
            lock_folder(tmp_path, "link")
    assert lock.closed
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_without_locks_of_the_file_system_a_link_owns_the_folder(tmp_path, monkeypatch):
    refuse_flock(monkeypatch)
    with lock_folder(tmp_path, "link"), pytest.raises(InUseError, match=f"process {os.getpid()} of host "):
        lock_folder(tmp_path, "link")
    with owner_of(tmp_path, "link"), pytest.raises(InUseError):
        lock_folder(tmp_path, "link")
    lock_folder(tmp_path, "link").close()  # its owner was killed
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_refused_lock_is_named_with_the_other_way(tmp_path, monkeypatch, number):
    refuse_flock(monkeypatch, number)
    with pytest.raises(UserError) as refused:
        lock_folder(tmp_path)
    words = (f"{tmp_path}/lock", "flock", errno.errorcode[number], os.strerror(number), "--lock link")
    assert [word for word in words if word not in str(refused.value)] == []
    assert not list(tmp_path.iterdir())


def test_an_owner_on_another_host_or_in_another_container_is_left_in_doubt(tmp_path):
    """Its process number may mean another process here, or none."""
    machine, names = here().split(" ")
    for where in (f"{machine} pid:[1]", f"other {names}", ""):
        owner = {"host": "there", "where": where, "pid": 4194305, "started": 1, "since": "yesterday"}
        (tmp_path / "owner").write_text(json.dumps(owner))
        for way in WAYS:
            with pytest.raises(InUseError, match=rf"process 4194305 of host there .* remove {tmp_path}/owner"):
                lock_folder(tmp_path, way)
        assert not is_locked(tmp_path)
        assert json.loads((tmp_path / "owner").read_text()) == owner
    lock_folder(tmp_path, "link", owner_died=True).close()  # this job has lost it


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"host": 1, "pid": 1}', "[" * 4000, "x" * 5000])
def test_a_damaged_owner_is_left_in_doubt(tmp_path, content):
    (tmp_path / "owner").write_text(content)
    for way in WAYS:
        with pytest.raises(InUseError, match=r"host unknown .* remove .*owner"):
            lock_folder(tmp_path, way)


@pytest.mark.parametrize("name", ["lock", "owner"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_but_a_file_is_opened_in_place_of_a_lock(tmp_path, name, kind, way):
    path, target = tmp_path / name, tmp_path / "theirs"
    target.write_text("two years of work")
    {"pipe": os.mkfifo, "folder": Path.mkdir, "link": lambda one: one.symlink_to(target)}[kind](path)
    with pytest.raises((OSError, InUseError)):
        lock_folder(tmp_path, way)
    assert target.read_text() == "two years of work"


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o620), (0o002, 0o620), (0o022, 0o600), (0o077, 0o600)])
@pytest.mark.parametrize("is_old", [False, True], ids=["a new lock", "the lock of an earlier version"])
def test_only_users_who_may_write_to_the_lock_can_open_it(tmp_path, umask, mode, is_old):
    before = os.umask(umask)
    try:
        if is_old:
            (tmp_path / "lock").touch(0o644)
        lock = lock_folder(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == mode
    with pytest.raises(InUseError):
        lock_folder(tmp_path)
    lock.close()
    lock_folder(tmp_path).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_another_user_with_read_access_cannot_lock_the_folder():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        lock_folder(folder).close()
        held = subprocess.run(["flock", folder / "lock", "true"], user=NOBODY, group=NOBODY, check=False)
        assert held.returncode != 0
        (folder / "lock").chmod(0o644)  # as an earlier version made it
        with subprocess.Popen(
            ["flock", folder / "lock", "sh", "-c", "echo locked; cat"],
            user=NOBODY,
            group=NOBODY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder:
            assert holder.stdout.readline() == b"locked\n"
            with pytest.raises(InUseError, match=rf"of user {NOBODY}; if that is no run, remove {folder}/lock"):
                lock_folder(folder)
            holder.stdin.close()


def test_a_process_that_is_faster_keeps_the_folder(tmp_path, monkeypatch):
    """Two processes remove the file of an owner that was killed; one alone gets the folder."""
    refuse_flock(monkeypatch)
    theirs = {"host": "here", "where": here(), "pid": os.getpid(), "started": 1, "since": "now"}
    original = os.link

    def after_the_other(source, target):
        if not Path(target).exists():
            Path(target).write_text(json.dumps(theirs | {"pid": 1, "started": _started(1)}))
        original(source, target)

    monkeypatch.setattr(os, "link", after_the_other)
    (tmp_path / "owner").write_text(json.dumps(theirs | {"started": -1}))
    with pytest.raises(InUseError, match="process 1 of host here"):
        lock_folder(tmp_path, "link")
    assert json.loads((tmp_path / "owner").read_text())["pid"] == 1


def _started(pid):
    return folder_lock.look_at(pid).started
