"""CIFAR-10 from the files of its binary version, from the archive, or downloaded; other versions are named."""

import hashlib
import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from distdl.data.sources import cifar10, load
from distdl.errors import DamagedFileError, UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8)
LABELS = np.arange(12) % 10
NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


def record(image, label):
    """Return a record as the page of CIFAR-10 describes it: the label, then all red, green and blue values."""
    return bytes([label, *image[:, :, 0].ravel(), *image[:, :, 1].ravel(), *image[:, :, 2].ravel()])


#: Two images in each file.
CONTENTS = {
    name: b"".join(record(IMAGES[row], LABELS[row]) for row in (2 * place, 2 * place + 1))
    for place, name in enumerate(NAMES)
}


def write(folder, contents=CONTENTS):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def archive(contents=CONTENTS):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        directory = tarfile.TarInfo("cifar-10-batches-bin")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name, content in {**contents, "readme.html": b"<p>"}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def pinned(monkeypatch):
    """Pin the hash of the small archive instead of the published one; return its content."""
    content = archive()
    files = {cifar10.ARCHIVE: (len(content), hashlib.sha256(content).hexdigest())}
    monkeypatch.setattr(cifar10, "CIFAR10", replace(cifar10.CIFAR10, files=files))
    return content


def assert_is_the_small_one(data):
    assert np.array_equal(data.images, IMAGES)
    assert np.array_equal(data.labels, LABELS)
    assert (data.classes, data.test_start, data.labels.dtype) == (10, 10, np.int64)
    assert data.class_names[0] == "airplane"
    assert data.class_names[9] == "truck"


def test_the_six_files_are_read_in_the_folder_or_in_its_folder(tmp_path):
    assert_is_the_small_one(load("cifar10", write(tmp_path / "direct")))
    write(tmp_path / "around/cifar-10-batches-bin")
    assert_is_the_small_one(load("cifar10", tmp_path / "around"))


def test_the_archive_is_read_if_it_is_the_published_one(pinned, tmp_path):
    (tmp_path / cifar10.ARCHIVE).write_bytes(pinned)
    assert_is_the_small_one(load("cifar10", tmp_path))
    for other in (pinned[:-1] + b"x", pinned[:-1], b""):
        (tmp_path / cifar10.ARCHIVE).write_bytes(other)
        with pytest.raises(DamagedFileError, match="is not the published cifar-10-binary"):
            load("cifar10", tmp_path)


def test_without_a_folder_the_archive_is_downloaded(pinned, tmp_path, monkeypatch):
    (tmp_path / cifar10.ARCHIVE).write_bytes(pinned)
    monkeypatch.setattr(cifar10, "download_all", lambda published: [tmp_path / name for name in published.files])
    assert_is_the_small_one(load("cifar10", None))


def test_the_archive_is_pinned_and_reached_over_https():
    [(name, (size, sha256))] = cifar10.CIFAR10.files.items()
    assert (name, size, len(bytes.fromhex(sha256))) == ("cifar-10-binary.tar.gz", 170_052_171, 32)
    assert all(url.startswith("https://") and url.endswith("/") for url in cifar10.CIFAR10.mirrors)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has 0 bytes, expected a multiple of 3073"),
        (CONTENTS[NAMES[2]][:-1], "it has 6145 bytes, expected a multiple of 3073"),
        (CONTENTS[NAMES[2]] + b"x", "it has 6147 bytes"),
        (CONTENTS[NAMES[2]][:3073] + b"\n" + bytes(3072), "record 1 has label 10, expected 0 to 9"),
    ],
)
def test_a_damaged_file_is_named(content, said, tmp_path):
    write(tmp_path, {**CONTENTS, NAMES[2]: content})
    with pytest.raises(DamagedFileError, match=r"data_batch_3.bin' is damaged") as caught:
        load("cifar10", tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1", "data_batch_1.mat"])
def test_another_version_is_named_and_not_read(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"holds {name}, another version of CIFAR-10: expected cifar-10-binary.tar.gz"):
        load("cifar10", tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(UserError, match=r"lacks data_batch_4.bin: expected"):
        load("cifar10", tmp_path)
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        load("cifar10", tmp_path / "nowhere")
    os.mkfifo(tmp_path / "data_batch_4.bin")
    with pytest.raises(UserError, match="is not a regular file"):
        load("cifar10", tmp_path)
