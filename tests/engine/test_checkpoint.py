"""A checkpoint is the old one or the new one, whatever cuts the write off; and a damaged one is never loaded."""

import hashlib
import json
import os

import numpy as np
import pytest

from distdl.engine import checkpoint as checkpoints
from distdl.engine import files
from distdl.engine.checkpoint import Checkpoint
from distdl.errors import DamagedFileError, UserError


def small(value):
    return Checkpoint({"w": np.full(3, value, np.float32), "step": np.array([value])}, {"step": value, "config": {}})


class Killed(BaseException):
    """The process is gone: nothing that would tidy up after an error runs."""


class FlakyDisk:
    """Stands for `os` in `files`: counts system calls, and cuts the write off where it is told to."""

    O_WRONLY, O_CREAT, O_TRUNC = os.O_WRONLY, os.O_CREAT, os.O_TRUNC
    O_CLOEXEC, O_RDONLY, O_DIRECTORY = os.O_CLOEXEC, os.O_RDONLY, os.O_DIRECTORY

    def __init__(self, *, bytes_until=None, calls_until=None, failure=Killed, piece=None):
        self.left = bytes_until
        self.calls_left = calls_until
        self.failure = failure
        self.piece = piece

    def _call(self):
        if self.calls_left is not None:
            if self.calls_left == 0:
                raise self.failure
            self.calls_left -= 1

    def open(self, *arguments):
        self._call()
        return os.open(*arguments)

    def write(self, handle, data):
        self._call()
        if self.piece is not None:
            data = data[: self.piece]
        if self.left is None:
            return os.write(handle, data)
        written = os.write(handle, data[: self.left]) if self.left else 0
        self.left -= written
        if written < len(data):
            raise self.failure
        return written

    def fsync(self, handle):
        self._call()
        os.fsync(handle)

    def rename(self, *arguments):
        self._call()
        os.rename(*arguments)  # noqa: PTH104

    def close(self, handle):
        os.close(handle)


def what_is_there(folder):
    found = checkpoints.newest_intact(folder)
    return None if found is None else found[1].header["step"]


@pytest.fixture
def folder(tmp_path):
    checkpoints.write(checkpoints.path_of_step(tmp_path, 1), small(1))
    return tmp_path


@pytest.mark.parametrize("target", [1, 2], ids=["over the old file", "beside the old file"])
def test_killed_at_any_byte_of_a_write_leaves_the_old_checkpoint(folder, monkeypatch, target):
    path = checkpoints.path_of_step(folder, target)
    size = len(checkpoints.encode(small(2)))
    for count in range(size):
        monkeypatch.setattr(files, "os", FlakyDisk(bytes_until=count))
        with pytest.raises(Killed):
            checkpoints.write(path, small(2))
        assert what_is_there(folder) == 1, f"after {count} of {size} bytes"
    monkeypatch.setattr(files, "os", FlakyDisk(bytes_until=size))
    checkpoints.write(path, small(2))
    assert what_is_there(folder) == 2


@pytest.mark.parametrize("failure", [Killed, OSError(5, "Input/output error")], ids=["killed", "EIO"])
@pytest.mark.parametrize("target", [1, 2])
def test_cut_off_at_any_system_call_leaves_the_old_checkpoint_or_the_new(folder, monkeypatch, target, failure):
    path = checkpoints.path_of_step(folder, target)
    outcomes = []
    for calls in range(20):
        monkeypatch.setattr(files, "os", FlakyDisk(calls_until=calls, failure=failure))
        try:
            checkpoints.write(path, small(2))
        except (Killed, OSError):
            outcomes.append(what_is_there(folder))
            continue
        outcomes.append(what_is_there(folder))
        break
    # open, write, fsync, rename, then open and fsync of the folder: from the rename on the new one is there
    assert outcomes == [1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("piece", [1, 7])
def test_short_writes_are_carried_on(folder, monkeypatch, piece):
    monkeypatch.setattr(files, "os", FlakyDisk(piece=piece))
    checkpoints.write(checkpoints.path_of_step(folder, 2), small(2))
    assert what_is_there(folder) == 2


def test_a_full_disk_leaves_the_old_checkpoint_and_no_half_written_file(folder, monkeypatch):
    monkeypatch.setattr(files, "os", FlakyDisk(bytes_until=100, failure=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(checkpoints.path_of_step(folder, 2), small(2))
    assert what_is_there(folder) == 1
    assert [path.name for path in folder.iterdir()] == ["step-000000001.safetensors"]


def test_what_a_kill_left_is_swept_at_the_next_start(folder, monkeypatch):
    monkeypatch.setattr(files, "os", FlakyDisk(bytes_until=100))
    with pytest.raises(Killed):
        checkpoints.write(checkpoints.path_of_step(folder, 2), small(2))
    assert len(list(folder.iterdir())) == 2
    files.remove_temporaries(folder)
    assert [path.name for path in folder.iterdir()] == ["step-000000001.safetensors"]


def test_every_flipped_bit_is_found(tmp_path):
    data = checkpoints.encode(small(1))
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises((DamagedFileError, UserError), match=r"^the file "):
                checkpoints.decode(bytes(flipped), "the file")


def test_every_truncation_and_extension_is_found():
    data = checkpoints.encode(small(1))
    for length in range(len(data)):
        with pytest.raises(DamagedFileError, match="the file is damaged"):
            checkpoints.decode(data[:length], "the file")
    with pytest.raises(DamagedFileError, match="the file is damaged"):
        checkpoints.decode(data + b"\0", "the file")


def test_the_checksum_is_what_the_documentation_says():
    data = checkpoints.encode(small(1))
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["distdl"])
    zeroed = data.replace(metadata["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == metadata["sha256"]


def test_what_is_read_is_what_was_written(tmp_path):
    tensors = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.array([1e300]),
        "c": np.array([2**60, -1]),
        "empty": np.empty((0, 3), np.float32),
    }
    header = {"step": 3, "text": 'a "quoted" ä ' + "0" * 64, "none": None, "float": 0.1}
    checkpoints.write(tmp_path / "x", Checkpoint(tensors, header))
    found = checkpoints.read(tmp_path / "x")
    assert found.header == header
    assert set(found.tensors) == set(tensors)
    for name, array in tensors.items():
        assert found.tensors[name].dtype == array.dtype
        assert found.tensors[name].shape == array.shape
        assert found.tensors[name].tobytes() == array.tobytes()


def test_the_newest_intact_checkpoint_is_taken_and_the_damaged_are_named(folder):
    for step in (2, 3):
        checkpoints.write(checkpoints.path_of_step(folder, step), small(step))
    for step in (3, 2):
        path = checkpoints.path_of_step(folder, step)
        path.write_bytes(path.read_bytes()[:-1])
        taken, checkpoint, complaints = checkpoints.newest_intact(folder)
        assert checkpoint.header["step"] == step - 1
        assert taken == checkpoints.path_of_step(folder, step - 1)
        assert len(complaints) == 4 - step
        assert str(path) in complaints[-1]


def test_where_none_is_intact_the_error_says_so(folder):
    path = checkpoints.path_of_step(folder, 1)
    path.write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"no checkpoint in .* is intact"):
        checkpoints.newest_intact(folder)


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in range(1, 8):
        checkpoints.write(checkpoints.path_of_step(tmp_path, step), small(step))
        checkpoints.remove_old(tmp_path, step, keep=3, best_step=2)
    assert checkpoints.steps_in(tmp_path) == [2, 5, 6, 7]


def test_checkpoints_later_than_the_run_do_not_displace_its_own(tmp_path):
    for step in (1, 2, 3, 8, 9):
        checkpoints.write(checkpoints.path_of_step(tmp_path, step), small(step))
    checkpoints.remove_old(tmp_path, 3, keep=2, best_step=None)
    assert checkpoints.steps_in(tmp_path) == [2, 3, 8, 9]
    checkpoints.remove_later(tmp_path, 3)
    assert checkpoints.steps_in(tmp_path) == [2, 3]


def test_a_header_that_is_no_json_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        checkpoints.write(tmp_path / "x", Checkpoint({"w": np.zeros(1)}, {"loss": float("nan")}))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (
            {"w": np.zeros(4, np.float32), "step": np.zeros(1, np.int64)},
            "w is float32 \\(3,\\) there and float32 \\(4,\\)",
        ),
        (
            {"w": np.zeros(3, np.float64), "step": np.zeros(1, np.int64)},
            "w is float32 \\(3,\\) there and float64 \\(3,\\)",
        ),
        ({"w": np.zeros(3, np.float32)}, "step is int64 \\(1,\\) there and absent here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_the_tensor_named(other, named):
    with pytest.raises(UserError, match=f"x is a checkpoint of another model: {named}"):
        checkpoints.restore(small(1), list(other.items()), "x")
    assert not any(array.any() for array in other.values())
