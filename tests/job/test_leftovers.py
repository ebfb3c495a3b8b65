"""A sweep removes the files of our dead processes, and no others."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from distdl.job import leftovers
from distdl.job.processes import Process, ancestors, here, look_at
from distdl.parallel import OneProcess, share_arrays
from distdl.parallel import shared as shared_module


@pytest.fixture
def folder(tmp_path):
    """Return a folder that replaces the kernel's shared memory."""
    folder = tmp_path / "shared memory"
    folder.mkdir()
    return folder


def left_by_a_dead_process(folder, prefix, content=""):
    """Create a file whose owner was killed while it had locked the file."""
    program = """
import os, pathlib, signal, sys
from distdl.job import leftovers
handle, path = leftovers.create_locked(pathlib.Path(sys.argv[1]), sys.argv[2])
os.write(handle, sys.argv[3].encode())
print(path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, folder, prefix, content], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    return Path(done.stdout.strip())


def register_of_a_dead_rank(folder, *made, launchers=(), where=None):
    listed = {"made": [str(path) for path in made], "launchers": [asdict(one) for one in launchers]}
    listed["where"] = here() if where is None else where
    return left_by_a_dead_process(folder, leftovers.REGISTER, json.dumps(listed))


def made(path):
    path.touch()
    return path


def test_a_file_without_an_owner_is_removed_and_a_locked_one_is_not(folder):
    orphan = left_by_a_dead_process(folder, leftovers.MEMORY)
    handle, locked = leftovers.create_locked(folder, leftovers.MEMORY)
    assert leftovers.sweep([folder]) == [str(orphan)]
    assert not orphan.exists()
    assert Path(locked).exists()
    os.close(handle)
    assert leftovers.sweep([folder, folder / "absent"]) == [locked]


def test_files_of_others_stay(folder, tmp_path):
    precious = made(tmp_path / "precious")
    (folder / f"{leftovers.MEMORY}link").symlink_to(precious)
    (folder / f"{leftovers.MEMORY}folder").mkdir()
    os.mkfifo(folder / f"{leftovers.MEMORY}pipe")
    made(folder / "distdl-notes.txt")
    made(folder / "mpich_shm_12ab_0")
    before = sorted(folder.iterdir())
    assert leftovers.sweep([folder]) == []
    assert sorted(folder.iterdir()) == before
    assert precious.exists()


def test_files_of_another_user_stay(folder, monkeypatch):
    orphan = left_by_a_dead_process(folder, leftovers.MEMORY)
    segment = made(folder / "mpich_shm_12ab_0")
    register = register_of_a_dead_rank(folder, segment)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert leftovers.sweep([folder]) == []
    assert orphan.exists()
    assert segment.exists()
    assert register.exists()


def test_the_files_in_the_register_of_a_dead_rank_are_removed_with_it(folder):
    segments = [made(folder / name) for name in ("mpich_shm_12ab_0", "sm_segment.host.0.1.0", "vader_segment.host.1")]
    session = folder / "ompi.4194305"  # no process can have this number
    (session / "1" / "0").mkdir(parents=True)
    made(session / "pmix.tool")
    bystander = made(folder / "mpich_shm_34cd_0")
    register = register_of_a_dead_rank(folder, *segments, session, folder / "mpich_shm_gone_0")
    assert set(leftovers.sweep([folder])) == {str(path) for path in (*segments, session, register)}
    assert list(folder.iterdir()) == [bystander]


def test_a_file_that_a_living_rank_also_uses_stays_until_that_rank_has_ended(folder):
    segment = made(folder / "mpich_shm_12ab_0")
    register_of_a_dead_rank(folder, segment)
    handle, _ = leftovers.create_locked(folder, leftovers.REGISTER)
    os.write(handle, json.dumps({"made": [str(segment)], "launchers": [], "where": here()}).encode())
    assert leftovers.sweep([folder]) == []
    os.close(handle)
    assert len(leftovers.sweep([folder])) == 3
    assert not list(folder.iterdir())


def test_the_session_folder_of_a_living_launcher_stays(folder):
    launcher = next(ancestors())
    session = folder / f"ompi.{launcher.pid}"
    session.mkdir()
    register = register_of_a_dead_rank(folder, session, launchers=[launcher])
    assert leftovers.sweep([folder]) == []
    assert session.exists()
    assert register.exists()


MACHINE, NAMES = here().split(" ")
GONE = Process(4194305, "mpirun", "S", 1, 1)


@pytest.mark.parametrize(
    ("where", "stays"),
    [
        (here(), False),
        (f"{MACHINE} pid:[1]", True),  # in another container the launcher may live
        (f"other {NAMES}", True),  # another machine, or this one before its last start
        ("", True),  # an earlier version did not say
    ],
)
def test_the_session_folder_of_a_launcher_that_cannot_be_seen_stays(folder, where, stays):
    session = folder / "ompi.4194305"
    session.mkdir()
    register = register_of_a_dead_rank(folder, session, launchers=[GONE], where=where)
    assert (leftovers.sweep([folder]) == []) is stays
    assert session.exists() is register.exists() is stays


#: A launcher, which makes its session folder and waits. In a container its process number is 1.
LAUNCHER = """
import os, sys
from distdl.job import leftovers
program = "import os, pathlib, time; folder = pathlib.Path(os.environ['TMPDIR'], f'ompi.{os.getpid()}'); folder.mkdir()"
program += "; (folder / '1').mkdir(); print(folder, flush=True); time.sleep(60)"
os.execve(sys.executable, [sys.executable, "-c", program], leftovers.own_session(os.environ))
"""


def swept_until_empty(folder):
    deadline = time.monotonic() + 10
    while list(folder.iterdir()) and time.monotonic() < deadline:  # the kernel still ends a killed process
        leftovers.sweep([folder])
    return not list(folder.iterdir())


@pytest.mark.skipif(
    subprocess.run(["unshare", "-pf", "--mount-proc", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs the permission to create process namespaces",
)
def test_containers_that_share_a_folder_do_not_remove_the_session_folders_of_each_other(folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(folder))
    container = ["unshare", "-pf", "--kill-child", "--mount-proc", sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(container, stdout=subprocess.PIPE, text=True) as first:
        sessions = [Path(first.stdout.readline().strip())]
        with subprocess.Popen(container, stdout=subprocess.PIPE, text=True) as second:
            sessions.append(Path(second.stdout.readline().strip()))
            assert {session.name for session in sessions} == {"ompi.1"}
            assert len(set(sessions)) == 2
            assert leftovers.sweep([folder]) == []
            assert all((session / "1").is_dir() for session in sessions)
            first.kill()
            second.kill()
    assert swept_until_empty(folder)


def test_the_session_folder_of_an_unknown_launcher_stays_and_is_not_used(folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(leftovers.tempfile, "tempdir", None)
    unknown = folder / f"ompi.{os.getpid()}"
    unknown.mkdir()
    environment = leftovers.own_session({"A": "1"})
    assert environment == {"A": "1", "TMPDIR": environment["TMPDIR"]}
    assert Path(environment["TMPDIR"]).parent == folder
    assert unknown.is_dir()


def test_an_ordinary_end_of_a_rank_removes_the_register_of_its_launcher(folder, monkeypatch):
    rank = """
import os, pathlib
from distdl.job import leftovers
from distdl.job.processes import Process
leftovers.ancestors = lambda: [Process(1, "mpirun", "S", 0, 0)]
leftovers.register((pathlib.Path(os.environ["TMPDIR"]),))
"""
    launcher = f"""
import os, sys
from distdl.job import leftovers
os.execve(sys.executable, [sys.executable, "-c", {rank!r}], leftovers.own_session(os.environ))
"""
    monkeypatch.setenv("TMPDIR", str(folder))
    subprocess.run([sys.executable, "-c", launcher], check=True)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("launchers", "left"), [([], True), (["slurmstepd"], True), (["prted"], False), (["mpirun", "slurmstepd"], False)]
)
def test_without_an_mpirun_the_next_start_removes_the_files_of_mpi(folder, launchers, left):
    """Open MPI in one process, started by srun or without a launcher."""
    program = """
import mmap, pathlib, sys
from distdl.job import leftovers
from distdl.job.processes import Process
folder = pathlib.Path(sys.argv[1])
segment = folder / "sm_segment.host.0.1.0"
segment.write_bytes(bytes(4096))
with segment.open("r+b") as file:
    mapped = mmap.mmap(file.fileno(), 4096)
leftovers.ancestors = lambda: [Process(1, name, "S", 0, 0) for name in ("sh", *sys.argv[2:])]
leftovers.register((folder,))
assert leftovers.sweep([folder]) == []
"""
    subprocess.run([sys.executable, "-c", program, folder, *launchers], check=True)
    assert len(leftovers.sweep([folder])) == 2 * left
    assert [path.name for path in folder.iterdir()] == ([] if left else ["sm_segment.host.0.1.0"])


@pytest.mark.parametrize("name", ["results.npz", "ompi.12x", "my_mpich_shm_1"])
def test_a_register_cannot_make_us_remove_other_files_than_those_of_mpi(folder, name):
    mine = made(folder / name)
    register_of_a_dead_rank(folder, mine)
    assert leftovers.sweep([folder]) == []
    assert mine.exists()


def test_a_session_folder_that_is_a_link_is_not_followed(folder, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    made(precious / "file")
    link = folder / "ompi.4194305"
    link.symlink_to(precious)
    register_of_a_dead_rank(folder, link)
    assert leftovers.sweep([folder]) == []
    assert (precious / "file").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"made": []}', '{"made": [], "launchers": [{}]}'])
def test_an_incomplete_register_lists_nothing_and_is_removed(folder, content):
    register = left_by_a_dead_process(folder, leftovers.REGISTER, content)
    assert leftovers.sweep([folder]) == [str(register)]


def test_only_the_segments_and_sessions_of_mpi_are_found_in_the_maps():
    maps = """
7f0-7f1 rw-s 00000000 00:19 123                        /dev/shm/mpich_shm_12ab_0
7f1-7f2 rw-s 00000000 00:19 124                        /dev/shm/ucx_shm_posix_1 (deleted)
7f2-7f3 rw-s 00000000 00:19 125                        /dev/shm/sm_segment.host.0.1.0
7f3-7f4 rw-s 00000000 00:19 126                        /dev/shm/mpich_shm_34cd_0 (deleted)
7f4-7f5 r--s 00000000 fe:00 127                        /tmp/my tmp/ompi.848/1/pmix-gds-shmem2.vm.848
7f5-7f6 r--s 00000000 fe:00 128                        /home/me/sm_segment.of.mine
7f6-7f7 r-xp 00000000 fe:00 129                        /usr/lib/libc.so.6
7f7-7f8 rw-p 00000000 00:00 0
"""
    assert leftovers.made_by_mpi(maps, (Path("/dev/shm"), Path("/tmp/my tmp"))) == {
        "/dev/shm/mpich_shm_12ab_0",
        "/dev/shm/sm_segment.host.0.1.0",
        "/tmp/my tmp/ompi.848",
    }


def test_a_file_that_is_swept_before_it_is_locked_is_created_again(folder, monkeypatch):
    lock, swept = leftovers.flock, []

    def swept_first(handle, how):
        if not swept:
            swept.append(True)
            (only,) = folder.iterdir()
            only.unlink()
        lock(handle, how)

    monkeypatch.setattr(leftovers, "flock", swept_first)
    handle, path = leftovers.create_locked(folder, leftovers.MEMORY)
    assert swept
    assert Path(path).exists()
    os.close(handle)


def test_the_next_start_sweeps_the_file_of_a_rank_killed_before_all_have_mapped_it(tmp_path):
    program = """
import os, pathlib, signal, sys
import numpy as np
from distdl.parallel import OneProcess, share_arrays, shared
shared.SHARED_MEMORY = pathlib.Path(sys.argv[1])
shared._map = lambda path, nbytes: os.kill(os.getpid(), signal.SIGKILL)
share_arrays(OneProcess(), {"a": np.arange(5)})
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert leftovers.sweep([tmp_path]) == [str(left)]


def test_a_file_in_use_is_not_swept_and_no_file_remains_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_module, "SHARED_MEMORY", tmp_path)
    map_file, swept = shared_module._map, []

    def sweep_first(path, nbytes):
        swept.append(leftovers.sweep([tmp_path]))
        return map_file(path, nbytes)

    monkeypatch.setattr(shared_module, "_map", sweep_first)
    import numpy as np

    shared = share_arrays(OneProcess(), {"a": np.arange(5)})
    assert swept == [[]]
    assert shared["a"].tolist() == [0, 1, 2, 3, 4]
    assert not list(tmp_path.iterdir())


def test_a_process_is_identified_by_its_number_and_its_start():
    child = subprocess.Popen(["sleep", "600"])
    try:
        process = look_at(child.pid)
        assert process.name == "sleep"
        assert process.parent == os.getpid()
        assert process.lives
        assert not type(process)(**{**asdict(process), "started": process.started - 1}).lives
    finally:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie process now
    assert look_at(child.pid) is None
    assert not process.lives
    child.wait()
    assert look_at(child.pid) is None
