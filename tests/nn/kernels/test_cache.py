"""The kernel cache returns what was written or nothing, whatever happened to its files."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distdl.nn.kernels.compiled import cache
from distdl.nn.kernels.compiled.cache import KernelCache

NAME, CODE = "module.kernel(f4:1:11)", bytes(range(256)) * 4


def made(*roots):
    return KernelCache(roots, "version")


@pytest.fixture
def filled(tmp_path):
    """Return a cache with one kernel, and the path of its file."""
    found = made(tmp_path / "kernels")
    assert found.read(NAME) is None
    assert found.write(NAME, CODE) == CODE
    [path] = (tmp_path / "kernels" / "version").iterdir()
    return found, path


def test_the_content_comes_back_and_only_the_user_may_touch_it(filled):
    found, path = filled
    assert found.read(NAME) == CODE
    assert found.read("module.kernel(f4:2:11)") is None
    assert [one.stat().st_mode & 0o777 for one in (path, path.parent, path.parent.parent)] == [0o600, 0o700, 0o700]
    assert found.complaints == []


def link_to_a_copy(path):
    path.rename(path.with_suffix(".other"))
    path.symlink_to(path.with_suffix(".other"))


#: Damages, and a word of the complaint, if there is one.
DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    "one bit": (lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])), "damaged"),
    "other content": (lambda path: path.write_bytes(b"x" * 2000), "damaged"),
    "writable by all": (lambda path: path.chmod(0o666), "other users"),
    "writable by the group": (lambda path: path.chmod(0o620), "other users"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), None),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not what it should be"),
    "a link": (link_to_a_copy, None),
    "gone": (lambda path: path.unlink(), None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_never_used_and_is_replaced(filled, damage):
    found, path = filled
    harm, word = DAMAGES[damage]
    harm(path)
    for _ in range(2):
        assert found.read(NAME) is None
    assert [word in one for one in found.complaints] == ([] if word is None else [True])
    assert all("\n" not in one for one in found.complaints)
    if damage != "a folder":
        found.write(NAME, CODE)
        assert made(path.parents[1]).read(NAME) == CODE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_or_folder_of_another_user_is_not_used(filled, tmp_path):
    found, path = filled
    os.chown(path, 12345, -1)
    assert found.read(NAME) is None
    assert "belongs to another user" in found.complaints[0]
    os.chown(path.parent, 12345, -1)
    other = made(path.parents[1], tmp_path / "second")
    other.write(NAME, CODE)
    assert "belongs to another user" in other.complaints[0]
    assert (tmp_path / "second" / "version" / path.name).is_file()


def no_folder(path):
    path.write_text("a file in the place of the folder")


def writable_by_all(path):
    path.mkdir()
    path.chmod(0o777)


@pytest.mark.parametrize("spoil", [no_folder, writable_by_all])
def test_another_folder_serves_if_the_first_cannot_be_used(tmp_path, spoil):
    first, second = tmp_path / "first", tmp_path / "second"
    spoil(first)
    found = made(first, second)
    found.write(NAME, CODE)
    found.write(NAME, CODE)
    assert found.read(NAME) == made(first, second).read(NAME) == CODE
    [said] = found.complaints
    assert said.startswith(f"compiled kernels are kept in '{second}', because of '{first}': ")


def test_a_full_disk_costs_only_time(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_write_own", full)
    found = made(tmp_path / "one", tmp_path / "two")
    assert found.write(NAME, CODE) == CODE
    [said] = found.complaints
    assert "no folder can keep compiled kernels" in said
    assert said.count("No space left on device") == 2


KILLED = """
import os, sys
from pathlib import Path
from distdl.nn.kernels.compiled.cache import KernelCache
Path.replace = lambda *_: os.kill(os.getpid(), 9)
KernelCache([Path(sys.argv[1])], "version").write("module.kernel(f4:1:11)", b"x" * 1000)
"""


def test_a_compiler_that_is_killed_leaves_no_kernel_and_its_remains_are_removed(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "kernels"], check=False)
    assert done.returncode == -9
    [remains] = (tmp_path / "kernels" / "version").iterdir()
    assert made(tmp_path / "kernels").read(NAME) is None
    made(tmp_path / "kernels").write(NAME, CODE)
    assert remains.is_file(), "another compiler may be writing it"
    long_ago = time.time() - cache.SECONDS_OF_A_WRITE - 1
    os.utime(remains, (long_ago, long_ago))
    made(tmp_path / "kernels").write(NAME, CODE)
    assert not remains.exists()
    assert made(tmp_path / "kernels").read(NAME) == CODE


def test_only_the_newest_versions_are_kept(tmp_path):
    for number in range(cache.KEPT + 3):
        KernelCache([tmp_path], f"version{number}").write(NAME, CODE)
        folder = tmp_path / f"version{number}"
        os.utime(folder, (number, number))
    kept = sorted(int(path.name.removeprefix("version")) for path in tmp_path.iterdir())
    assert kept == list(range(3, cache.KEPT + 3))


def test_the_folder_depends_on_sources_versions_and_variables_of_numba(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def folder():
        found = cache.kernel_cache.__wrapped__()
        found.write(NAME, CODE)
        return {path.name for path in (tmp_path / "distdl" / "kernels").iterdir()}

    first = folder()
    assert folder() == first
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    second = folder()
    assert len(second) == 2
    monkeypatch.setattr(cache, "version", lambda name: "9.9")
    assert len(folder()) == 3


@pytest.mark.parametrize(("home", "expected"), [("/somewhere", "/somewhere/distdl/kernels"), ("relative", None)])
def test_the_cache_lies_below_xdg_cache_home_if_it_is_absolute(monkeypatch, home, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    first, second = cache._roots()
    assert first == Path(expected or "~/.cache/distdl/kernels").expanduser()
    assert second.name == f"distdl-kernels-{os.geteuid()}"
