"""A mapped file appears only when it is complete, leaves nothing else, and need not stay in memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distdl.arrays import sha256_of_arrays
from distdl.errors import UserError
from distdl.mapped_files import created, open_mapped, release_pages


def write(path, array):
    with created(path, array.shape, array.dtype) as target:
        target[...] = array


@pytest.mark.parametrize(
    "array", [np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.linspace(0, 1, 7, dtype=np.float32)]
)
def test_a_mapped_file_holds_the_array_and_cannot_be_written_to(array, tmp_path):
    path = tmp_path / "new" / "images.npy"
    write(path, array)
    assert np.array_equal(np.load(path), array)
    mapped = open_mapped(path)
    assert np.array_equal(mapped, array)
    assert sha256_of_arrays([("x", mapped)]) == sha256_of_arrays([("x", array)])
    with pytest.raises(ValueError, match="read-only"):
        mapped[...] = 0
    assert list(path.parent.iterdir()) == [path]


def test_nothing_remains_if_the_content_cannot_be_made(tmp_path):
    with pytest.raises(KeyboardInterrupt), created(tmp_path / "images.npy", (3,), np.uint8):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_part_of_a_killed_process_is_removed_and_that_of_a_living_one_stays(tmp_path):
    path = tmp_path / "images.npy"
    program = f"""
import os, pathlib
from distdl.mapped_files import created
with created(pathlib.Path({str(path)!r}), (3,), "u1"):
    os._exit(1)
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    [abandoned] = tmp_path.iterdir()
    with created(path, (3,), np.uint8):
        assert not abandoned.exists()
        write(path, np.ones(3, np.uint8))
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_of_a_file_follows_the_umask(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write(tmp_path / "images.npy", np.zeros(3, np.uint8))
    finally:
        os.umask(before)
    assert (tmp_path / "images.npy").stat().st_mode & 0o777 == mode


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def full(handle, start, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot write 8.0 MB to .*images.npy: No space left on device"):
        write(tmp_path / "images.npy", np.zeros(8_000_000, np.uint8))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write images to .*Not a directory"):
        write(tmp_path / "file" / "images.npy", np.zeros(3, np.uint8))


def mapped_megabytes():
    """Return the size of the mapped files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssFile"))


def test_released_pages_leave_the_memory_of_the_process(tmp_path):
    write(tmp_path / "images.npy", np.ones(64_000_000, np.uint8))
    mapped = open_mapped(tmp_path / "images.npy")
    before = mapped_megabytes()
    assert mapped.sum(dtype=np.int64) == 64_000_000
    assert mapped_megabytes() - before > 50
    release_pages(mapped)
    assert mapped_megabytes() - before < 10
    assert mapped.sum(dtype=np.int64) == 64_000_000
    release_pages(np.ones(3))  # has no effect
