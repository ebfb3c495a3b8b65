"""An interrupted write leaves the old checkpoint or the new one, and a damaged checkpoint is never loaded."""

import errno
import hashlib
import json
import os

import numpy as np
import pytest

from distdl import regular_files
from distdl.engine.storage import checkpoints, files
from distdl.engine.storage.checkpoints import Checkpoint
from distdl.engine.storage.restoring import copy_tensors
from distdl.errors import DamagedFileError, UserError


def small(value, step=None):
    """Return a checkpoint of a step, by default number `value`, with this value in its tensors."""
    step = value if step is None else step
    return Checkpoint({"w": np.full(3, value, np.float32), "step": np.array([step])}, {"step": step, "config": {}})


class Killed(BaseException):
    """The end of the process: no error handler runs."""


class FlakyDisk:
    """A replacement for `os` that fails after a number of system calls or bytes, once or always from then on."""

    CALLS = ("open", "writev", "fsync", "close", "rename", "unlink", "listdir", "fstat")

    def __init__(self, *, bytes_until=None, calls_until=None, failure=Killed, piece=None, once=False):
        self.left = bytes_until
        self.calls_left = calls_until
        self.failure = failure
        self.piece = piece
        self.once = once
        self.made = []

    def __getattr__(self, name):
        if name not in self.CALLS:
            return getattr(os, name)

        def call(*arguments, **named):
            if name == "close":
                os.close(*arguments)  # always, because this process continues
            self.made.append(name)
            if self.calls_left == 0:
                if self.once:
                    self.calls_left = -1
                raise self.failure
            if self.calls_left is not None:
                self.calls_left -= 1
            return None if name == "close" else getattr(self, f"_{name}", getattr(os, name))(*arguments, **named)

        return call

    def _writev(self, handle, parts):
        data = b"".join(parts)
        if self.piece is not None:
            data = data[: self.piece]
        if self.left is None:
            return os.write(handle, data)
        written = os.write(handle, data[: self.left]) if self.left else 0
        self.left -= written
        if self.left == 0 and written < len(data):
            if self.once:
                self.left = None
            if written == 0 and self.failure is None:
                return 0
            if self.failure is not None:
                raise self.failure
        return written


def install(monkeypatch, **settings):
    disk = FlakyDisk(**settings)
    monkeypatch.setattr(files, "os", disk)
    monkeypatch.setattr(checkpoints, "os", disk)
    monkeypatch.setattr(regular_files, "os", disk)
    return disk


def newest_intact_value(folder):
    found = checkpoints.newest_intact(folder)
    return None if found is None else int(found[1].tensors["w"][0])


@pytest.fixture
def folder(tmp_path):
    checkpoints.write(checkpoints.path_of_step(tmp_path, 1), small(1))
    return tmp_path


def errors(*numbers):
    return [pytest.param(OSError(number, os.strerror(number)), id=errno.errorcode[number]) for number in numbers]


DISK_ERRORS = errors(errno.ENOSPC, errno.EIO, errno.EDQUOT)


@pytest.mark.parametrize("failure", [pytest.param(Killed, id="killed"), *DISK_ERRORS])
@pytest.mark.parametrize("target", [1, 2], ids=["over the old file", "next to the old file"])
def test_an_interruption_at_any_byte_of_a_write_leaves_the_old_checkpoint(folder, monkeypatch, target, failure):
    path = checkpoints.path_of_step(folder, target)
    size = len(b"".join(checkpoints.encoded(small(2, target))))
    for count in range(size):
        with monkeypatch.context() as patched:
            install(patched, bytes_until=count, failure=failure)
            with pytest.raises(Killed if failure is Killed else OSError):
                checkpoints.write(path, small(2, target))
        assert newest_intact_value(folder) == 1, f"after {count} of {size} bytes"
        if failure is not Killed:
            assert [path.name for path in folder.iterdir()] == ["step-000000001.safetensors"]
    with monkeypatch.context() as patched:
        install(patched, bytes_until=size, failure=failure)
        checkpoints.write(path, small(2, target))
    assert newest_intact_value(folder) == 2


@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("failure", [pytest.param(Killed, id="killed"), *DISK_ERRORS])
@pytest.mark.parametrize("target", [1, 2], ids=["over the old file", "next to the old file"])
def test_an_interruption_at_any_system_call_leaves_the_old_checkpoint_or_the_new(
    folder, monkeypatch, target, failure, once
):
    path = checkpoints.path_of_step(folder, target)
    outcomes, cut_off = [], []
    for calls in range(30):
        with monkeypatch.context() as patched:
            disk = install(patched, calls_until=calls, failure=failure, once=once)
            try:
                checkpoints.write(path, small(2, target))
                checkpoints.remove_old(folder, target, keep=1, best_step=None)
            except (Killed, OSError):
                cut_off.append(disk.made[calls])
        outcomes.append(newest_intact_value(folder))
        if len(cut_off) == calls:
            break
    # First the folder, the remains of an earlier kill, the temporary file and the rename. Then the new file is read
    # back, and older ones are removed.
    durably = ["open", "unlink", "open", "writev", "fsync", "close", "rename", "fsync", "close"]
    assert cut_off[: len(durably)] == durably
    assert cut_off[len(durably) :][:4] == ["open", "fstat", "listdir", "open"]
    assert outcomes == [1] * (durably.index("rename") + 1) + [2] * (len(cut_off) - durably.index("rename"))


@pytest.mark.parametrize("piece", [1, 7])
def test_short_writes_are_continued(folder, monkeypatch, piece):
    install(monkeypatch, piece=piece)
    checkpoints.write(checkpoints.path_of_step(folder, 2), small(2))
    assert newest_intact_value(folder) == 2


def test_a_write_that_is_short_at_any_byte_is_continued(folder, monkeypatch):
    size = len(b"".join(checkpoints.encoded(small(2))))
    for count in range(1, size):
        with monkeypatch.context() as patched:
            install(patched, bytes_until=count, failure=None, once=True)
            checkpoints.write(checkpoints.path_of_step(folder, 2), small(2))
        assert newest_intact_value(folder) == 2
        checkpoints.path_of_step(folder, 2).unlink()


def test_a_disk_that_writes_nothing_and_gives_no_reason_is_an_error_and_no_endless_loop(folder, monkeypatch):
    install(monkeypatch, bytes_until=100, failure=None)
    with pytest.raises(OSError, match="writes no bytes"):
        checkpoints.write(checkpoints.path_of_step(folder, 2), small(2))
    assert newest_intact_value(folder) == 1


def test_more_tensors_than_one_system_call_takes_are_written(tmp_path):
    tensors = {f"tensor {number}": np.array([number]) for number in range(3000)}
    checkpoints.write(tmp_path / "x", Checkpoint(tensors, {}))
    found = checkpoints.read(tmp_path / "x").tensors
    assert all(found[name] == array for name, array in tensors.items())


def test_a_file_that_reads_back_differently_is_an_error(folder, monkeypatch):
    for damage in (lambda data: data[:-1], lambda data: data + b"\0", lambda data: data[:-1] + b"\x77"):

        def altering(path, *parts, damage=damage, follow=True):
            path.write_bytes(damage(b"".join(parts)))

        monkeypatch.setattr(checkpoints, "write_durably", altering)
        with pytest.raises(OSError, match="does not read back"):
            checkpoints.write(checkpoints.path_of_step(folder, 2), small(2))


def test_nothing_is_visible_before_it_is_on_the_disk(folder, monkeypatch):
    """The content is flushed before the rename, and the folder after it."""
    disk = install(monkeypatch)
    checkpoints.write(checkpoints.path_of_step(folder, 2), small(2))
    made = [name for name in disk.made if name in {"writev", "fsync", "rename"}]
    assert made == ["writev", "fsync", "rename", "fsync"]


def test_the_next_start_removes_the_remains_of_a_kill_and_nothing_else(folder, monkeypatch):
    with monkeypatch.context() as patched:
        install(patched, bytes_until=100)
        with pytest.raises(Killed):
            checkpoints.write(checkpoints.path_of_step(folder, 2), small(2))
    assert len(list(folder.iterdir())) == 2
    others = ["download.partial", "step-000000003.safetensors.partial", "distdl-partial"]
    for name in others:
        (folder / name).write_text("someone else's")
    (folder / f"folder{files.TEMPORARY_SUFFIX}").mkdir()
    (folder / f"link{files.TEMPORARY_SUFFIX}").symlink_to(folder / "download.partial")
    files.remove_temporaries(folder)
    left = sorted([*others, f"folder{files.TEMPORARY_SUFFIX}", "step-000000001.safetensors"])
    assert sorted(path.name for path in folder.iterdir()) == left


def test_the_remains_of_a_kill_do_not_prevent_the_next_write(folder):
    path = checkpoints.path_of_step(folder, 2)
    (folder / (path.name + files.TEMPORARY_SUFFIX)).write_text("x" * 10_000)
    checkpoints.write(path, small(2))
    assert newest_intact_value(folder) == 2
    assert len(list(folder.iterdir())) == 2


def damaged_copies(data):
    """Yield the file with each of its bits flipped, truncated after each of its bytes, and with one more byte."""
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            yield bytes(flipped)
    for length in range(len(data)):
        yield data[:length]
    yield data + b"\0"


def test_every_flipped_bit_and_every_truncation_is_named_and_the_previous_checkpoint_is_used(folder):
    path = checkpoints.path_of_step(folder, 2)
    whole = b"".join(checkpoints.encoded(small(2)))
    path.write_bytes(whole)
    assert newest_intact_value(folder) == 2
    for data in damaged_copies(whole):
        path.write_bytes(data)
        taken, checkpoint, complaints = checkpoints.newest_intact(folder)
        assert (taken, checkpoint.header["step"]) == (checkpoints.path_of_step(folder, 1), 1)
        assert len(complaints) == 1
        assert complaints[0].startswith(f"{path} is damaged")


def test_a_file_that_its_disk_does_not_return_is_damaged_and_the_previous_one_is_used(folder, monkeypatch):
    path = checkpoints.path_of_step(folder, 2)
    checkpoints.write(path, small(2))

    class Unreadable:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    def broken(opened, **how):
        file = regular_files.open_regular(opened, **how)
        return Unreadable(file) if opened == path else file

    monkeypatch.setattr(checkpoints, "open_regular", broken)
    taken, _, complaints = checkpoints.newest_intact(folder)
    assert taken == checkpoints.path_of_step(folder, 1)
    assert complaints == [f"{path} is damaged: the disk cannot read it (Input/output error)"]


def test_a_pipe_in_place_of_a_checkpoint_does_not_block(folder):
    os.mkfifo(checkpoints.path_of_step(folder, 2))
    with pytest.raises(UserError, match="it is not a regular file"):
        checkpoints.newest_intact(folder)


def test_a_file_with_another_form_of_name_is_no_checkpoint(folder):
    for name in ("step-2.safetensors", "step-00000000٣.safetensors", "step-0000000002.safetensors", "step-000000009"):
        (folder / name).write_text("x")
    (folder / f"step-000000004.safetensors{files.TEMPORARY_SUFFIX}").write_text("x")
    assert checkpoints.steps_in(folder) == [1]


def test_the_checksum_is_the_documented_one():
    data = b"".join(checkpoints.encoded(small(1)))
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["distdl"])
    zeroed = data.replace(metadata["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == metadata["sha256"]


def test_the_elements_of_each_tensor_are_aligned_in_the_file():
    """A reader that maps the file into memory needs no copy of them."""
    dtypes = (np.uint8, np.float32, np.int64, np.float64, np.int32)
    for length in range(1, 17):  # of the name, and so of the header
        arrays = {f"{'n' * length}{number}": np.ones(3, dtype) for number, dtype in enumerate(dtypes)}
        content = b"".join(checkpoints.encoded(Checkpoint(arrays, {"step": 1})))
        header_bytes = int.from_bytes(content[:8], "little")
        assert header_bytes % 8 == 0
        entries = json.loads(content[8 : 8 + header_bytes])
        for name, array in arrays.items():
            start, end = entries[name]["data_offsets"]
            assert (8 + header_bytes + start) % array.itemsize == 0
            assert content[8 + header_bytes + start :][: end - start] == array.tobytes()


def test_reading_returns_the_written_tensors_and_header(tmp_path):
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


def test_the_newest_intact_checkpoint_is_used_and_the_damaged_ones_are_named(folder):
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


def test_the_error_says_that_no_checkpoint_is_intact(folder):
    path = checkpoints.path_of_step(folder, 1)
    path.write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"no checkpoint in .* is intact"):
        checkpoints.newest_intact(folder)


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path):
    for step in range(1, 8):
        checkpoints.write(checkpoints.path_of_step(tmp_path, step), small(step))
        checkpoints.remove_old(tmp_path, step, keep=3, best_step=2)
    assert checkpoints.steps_in(tmp_path) == [2, 5, 6, 7]


def test_later_checkpoints_of_another_run_do_not_displace_those_of_this_run(tmp_path):
    for step in (1, 2, 3, 8, 9):
        checkpoints.write(checkpoints.path_of_step(tmp_path, step), small(step))
    checkpoints.remove_old(tmp_path, 3, keep=2, best_step=None)
    assert checkpoints.steps_in(tmp_path) == [2, 3, 8, 9]
    checkpoints.remove_later(tmp_path, 3)
    assert checkpoints.steps_in(tmp_path) == [2, 3]


@pytest.mark.parametrize("length", range(8))  # the header is padded to a multiple of 8 bytes
def test_a_header_of_the_largest_size_is_read(length, tmp_path, monkeypatch):
    given = Checkpoint(small(1).tensors, {"text": "x" * length})
    checkpoints.write(tmp_path / "x", given)
    size = int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
    monkeypatch.setattr(checkpoints, "LARGEST_HEADER_BYTES", size)
    assert checkpoints.read(tmp_path / "x").header == given.header
    monkeypatch.setattr(checkpoints, "LARGEST_HEADER_BYTES", size - 1)
    with pytest.raises(DamagedFileError, match=f"announce a header of {size} bytes"):
        checkpoints.read(tmp_path / "x")


def test_a_header_with_nan_is_never_written(tmp_path):
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
def test_a_checkpoint_of_another_model_is_refused_and_the_tensor_is_named(other, named):
    with pytest.raises(UserError, match=f"x is a checkpoint of another model or version: {named}"):
        copy_tensors(small(1), list(other.items()), "x")
    assert not any(array.any() for array in other.values())


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_an_invalid_number_in_the_header_is_a_damaged_file(number):
    header = {"__metadata__": {"distdl": f'{{"format": "x", "sha256": "{"0" * 64}", "header": {{"lr": {number}}}}}'}}
    text = json.dumps(header).encode()
    with pytest.raises(DamagedFileError, match="its header cannot be read"):
        checkpoints.decode(len(text).to_bytes(8, "little") + text, "x")
