"""A file from anyone is opened without waiting, and only if it is a regular file."""

import os
import socket
from pathlib import Path

import pytest

from distdl.regular_files import NotRegularError, open_regular, opened, read_regular


@pytest.fixture
def entries(tmp_path):
    """Return one entry of each kind that is no regular file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to a pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket"))
    return [tmp_path / name for name in ("pipe", "folder", "to a pipe", "socket")] + [Path("/dev/zero")]


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND | os.O_CREAT], ids=str)
def test_anything_else_is_refused_without_waiting(entries, flags):
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir()))
    for path in entries:
        with pytest.raises((NotRegularError, IsADirectoryError)):
            opened(path, flags, follow=True)
    assert len(list(handles.iterdir())) == before


def test_a_link_is_followed_only_if_the_user_named_it(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", follow=True) == b"content"
    with pytest.raises(OSError, match="symbolic links"):
        read_regular(tmp_path / "link")
    with open_regular(tmp_path / "file") as file:
        assert (file.read(), file.name) == (b"content", str(tmp_path / "file"))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    with pytest.raises(OSError, match=f"it has {2**40} bytes"):
        read_regular(tmp_path / "sparse")
    (tmp_path / "small").write_bytes(b"12345")
    assert read_regular(tmp_path / "small", most=5) == b"12345"
    with pytest.raises(OSError, match="more than 4"):
        read_regular(tmp_path / "small", most=4)
