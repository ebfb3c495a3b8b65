"""CIFAR-10: small colored photos in ten classes, from the files of its binary version, in a folder or downloaded.

It has 50,000 images of 32x32 pixels, and 10,000 more, its test part. A file is a sequence of records:

    1 byte        the class, 0 to 9
    3 x 1024      the red, green and blue values of the pixels, row by row

The Python version of the dataset holds pickles, which could run code. So it is not read.

Source: A. Krizhevsky, *Learning multiple layers of features from tiny images*, 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distdl.data.dataset import Dataset
from distdl.data.room import Room, on_disk
from distdl.data.sources.downloads import Published, download_all
from distdl.errors import DamagedFileError, UserError, quoted
from distdl.regular_files import NotRegularError, open_regular, read_regular

TRAINING = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"
FOLDER = "cifar-10-batches-bin"
ARCHIVE = "cifar-10-binary.tar.gz"
#: Files and folders of the other versions.
OTHER_VERSIONS = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1", "data_batch_1.mat")
SIDE, CHANNELS, CLASSES = 32, 3, 10
RECORD = 1 + SIDE * SIDE * CHANNELS
LARGEST_BYTES = 2**31
#: The blocks of a tar archive.
TAR_BLOCK = 512

CIFAR10 = Published(
    "cifar10",
    "CIFAR-10",
    ("https://www.cs.toronto.edu/~kriz/",),
    {ARCHIVE: (170_052_171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")},
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)


def load_cifar10(data_dir: Path | None, room: Room | None = None) -> Dataset:
    """Return CIFAR-10 from the six ``.bin`` files or the archive in `data_dir`; without it, download the archive.

    The six files may hold any records of the format. Raises `UserError` if a file cannot be read, `DamagedFileError`
    if a file is damaged.
    """
    room = room or Room()
    contents = _contents_of_archive(download_all(CIFAR10)[0]) if data_dir is None else _contents_in(data_dir, room)
    parts = [_records(name, content) for name, content in contents.items()]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    test_start = len(labels) - len(parts[-1][1])
    return Dataset("cifar10", images, labels.astype(np.int64), CLASSES, test_start, CIFAR10.class_names)


def _contents_in(data_dir: Path, room: Room) -> dict[str, bytes]:
    """Return the contents of the six files in a folder, in order, by their names in messages."""
    try:
        present = {path.name for path in data_dir.iterdir()}
    except OSError as error:
        raise UserError(
            f"the data folder {quoted(data_dir)} cannot be read ({error.strerror or error}): expected a folder with "
            f"{ARCHIVE} or {FOLDER}; give another --data-dir"
        ) from error
    folder = data_dir / FOLDER if FOLDER in present else data_dir
    paths = [folder / name for name in (*TRAINING, TEST)]
    missing = [path for path in paths if not path.exists()]
    if len(missing) == len(paths) and ARCHIVE in present:
        return _contents_of_archive(data_dir / ARCHIVE)
    if not missing:
        return {quoted(path): _content(path, room) for path in paths}
    other = [name for name in OTHER_VERSIONS if name in present]
    found = f"holds {other[0]}, another version of CIFAR-10" if other else f"lacks {missing[0].name}"
    raise UserError(
        f"the data folder {quoted(data_dir)} {found}: expected {ARCHIVE} from {CIFAR10.mirrors[0]}, or its six files "
        f"{TRAINING[0]} to {TEST}; give another --data-dir, or none to download it"
    )


def _content(path: Path, room: Room) -> bytes:
    try:
        room.take(quoted(path), path.stat().st_size, on_disk(path))
        return read_regular(path, follow=True, most=LARGEST_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, NotRegularError):
        return UserError(f"{quoted(path)} is not a regular file: expected a file of CIFAR-10")
    return UserError(f"{quoted(path)} cannot be read: {error.strerror or error}")


def _contents_of_archive(path: Path) -> dict[str, bytes]:
    """Return the contents of the six files in the archive, by their names in messages.

    The hash is compared before anything is decoded. So nothing in the file has to be trusted.
    """
    [(size, sha256)] = CIFAR10.files.values()
    try:
        with open_regular(path, follow=True) as file:
            has_size = os.fstat(file.fileno()).st_size == size
            if not (has_size and hashlib.file_digest(file, "sha256").hexdigest() == sha256):
                raise DamagedFileError(
                    f"{quoted(path)} is not the published {ARCHIVE} (sha256 {sha256[:16]}…): fetch it again, or unpack "
                    "it and give the folder with its .bin files by --data-dir"
                )
            file.seek(0)
            members = _members(gzip.GzipFile(fileobj=file))
    except OSError as error:
        raise _unreadable(path, error) from error
    return {f"{name} in {quoted(path)}": members[f"{FOLDER}/{name}"] for name in (*TRAINING, TEST)}


def _members(archive: gzip.GzipFile) -> dict[str, bytes]:
    """Return the files in a tar archive whose content is known: name and size stand in a block before each."""
    members = {}
    while any(header := archive.read(TAR_BLOCK)):
        name, size = header[:100].rstrip(b"\0").decode(), int(header[124:136].rstrip(b"\0 "), 8)
        members[name] = archive.read(size)
        archive.read(-size % TAR_BLOCK)
    return members


def _records(name: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the images (N, H, W, C) and labels (N,) of a file."""
    if not content or len(content) % RECORD:
        raise DamagedFileError(
            f"{name} is damaged: it has {len(content)} bytes, expected a multiple of {RECORD}; fetch the file again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels = records[:, 0]
    if labels.max() >= CLASSES:
        raise DamagedFileError(
            f"{name} is damaged: record {labels.argmax()} has label {labels.max()}, expected 0 to {CLASSES - 1}; fetch "
            "the file again"
        )
    planes = records[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels
