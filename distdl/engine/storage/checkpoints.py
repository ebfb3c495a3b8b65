"""Checkpoints: the whole state after a step, in one safetensors file that proves itself intact.

The format has no checksum, and a flipped bit in the data loads silently. So the metadata in the JSON header has one
key, ``distdl``, a JSON object with ``format``, ``sha256`` and ``header``. The sha256 covers the whole file, with the 64
digits of the digest itself set to zero. A file that is torn, truncated or altered anywhere is never loaded.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from distdl.engine.storage.files import remove, write_durably
from distdl.engine.storage.header import CheckpointHeader
from distdl.errors import DamagedFileError, UserError
from distdl.host_memory import available_bytes, available_to_this_process
from distdl.json_files import parsed_json
from distdl.regular_files import open_regular

FORMAT = "distdl checkpoint 1"
NO_DIGEST = "0" * 64
#: The names of our dtypes in safetensors.
DTYPES = {"f4": "F32", "f8": "F64", "i4": "I32", "i8": "I64", "u1": "U8"}
#: Far more than any of our headers: a damaged length must not make us read or allocate much.
LARGEST_HEADER_BYTES = 2**20
BLOCK_BYTES = 2**20
NAME = re.compile(r"step-([0-9]{9,18})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The content of one file: the tensors by name, and the header as JSON, which `CheckpointHeader` parses."""

    tensors: dict[str, NDArray[Any]]
    header: dict[str, Any]


class FoundCheckpoint(NamedTuple):
    """An intact checkpoint, and the damage of the newer ones in its folder."""

    path: Path
    checkpoint: Checkpoint
    complaints: list[str]

    def header(self) -> CheckpointHeader:
        """Return the checked header; raise `DamagedFileError` if it cannot be used."""
        return CheckpointHeader.parse(self.checkpoint.header, self.path, self.checkpoint.tensors)


def encoded(checkpoint: Checkpoint) -> list[bytes | memoryview]:
    """Return the bytes of the file in pieces: the header, and views of the tensors."""
    tensors = sorted(checkpoint.tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    metadata = {"format": FORMAT, "sha256": NO_DIGEST, "header": checkpoint.header}
    entries: dict[str, Any] = {"__metadata__": {"distdl": json.dumps(metadata, allow_nan=False)}}
    data: list[memoryview] = []
    end = 0
    for name, array in tensors:
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        start, end = end, end + little.nbytes
        entries[name] = {"dtype": DTYPES[little.dtype.str[1:]], "shape": array.shape, "data_offsets": [start, end]}
        data.append(little.reshape(-1).view(np.uint8).data)
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    assert len(header) <= LARGEST_HEADER_BYTES, "read() would refuse this file"
    header = len(header).to_bytes(8, "little") + header
    digest = hashlib.sha256(header)
    for part in data:
        digest.update(part)
    # The first zeros are the digest's: the metadata comes first, and in it the digest comes before any foreign text.
    return [header.replace(NO_DIGEST.encode(), digest.hexdigest().encode(), 1), *data]


def decode(data: bytes, name: str) -> Checkpoint:
    """Return the content of a file; raise `DamagedFileError` with its `name` if the bytes are damaged."""
    metadata = _proved(data, (), len(data), name)
    if metadata["format"] != FORMAT:
        raise UserError(f"{name} has the format {metadata['format']!r}: this version reads {FORMAT!r}")
    try:
        return Checkpoint(safetensors.numpy.load(data), metadata["header"])
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{name} is damaged: {error}") from None


def _proved(start: bytes, others: Iterable[bytes], size: int, name: str) -> dict[str, Any]:
    """Return the metadata of a file that begins with `start` and continues with `others`, if its checksum is right."""
    metadata, place = _metadata(start, size, name)
    digest = hashlib.sha256(start[:place] + NO_DIGEST.encode())
    digest.update(memoryview(start)[place + len(NO_DIGEST) :])
    for part in others:
        digest.update(part)
    if digest.hexdigest() != metadata["sha256"]:
        raise DamagedFileError(f"{name} is damaged: its checksum does not match its content")
    return metadata


def _metadata(data: bytes, size: int, name: str) -> tuple[dict[str, Any], int]:
    """Return our metadata, and the position of the digest's digits in the file. Trusts no value in the file.

    `data` begins with the whole header of the file; `size` is the size of the whole file.
    """
    length = int.from_bytes(data[:8], "little")
    if size < 8:
        raise DamagedFileError(f"{name} is damaged: it has {size} bytes, too few for a checkpoint")
    if length > min(size - 8, LARGEST_HEADER_BYTES):
        raise DamagedFileError(
            f"{name} is damaged, or no checkpoint of distdl (give a run folder, or a file of its checkpoints/): its "
            f"{size} bytes announce a header of {length} bytes"
        )
    try:
        header = parsed_json(data[8 : 8 + length])
        metadata = parsed_json(header.pop("__metadata__")["distdl"])
        announced = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        given = metadata["sha256"].encode()
        complete = len(given) == len(NO_DIGEST) and {"format", "header"} <= metadata.keys()
        places = data.count(given, 8, 8 + length)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DamagedFileError(f"{name} is damaged, or no checkpoint of distdl: its header cannot be read") from None
    if not complete or places != 1:
        raise DamagedFileError(f"{name} is damaged: its header has no checksum")
    if size != announced:
        raise DamagedFileError(f"{name} is damaged: it has {size} bytes, its header announces {announced}")
    return metadata, data.index(given, 8, 8 + length)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file so that `path` has the old content or the new, then read it back and compare.

    Raises `OSError` if the disk refuses or returns other bytes.
    """
    parts = encoded(checkpoint)
    write_durably(path, *parts, follow=False)
    with open_regular(path) as file:
        same = all(_reads_back(file, memoryview(part)) for part in parts)
        if not same or file.read(1):
            raise OSError(f"{path} does not read back as it was written")


def _reads_back(file: BinaryIO, part: memoryview) -> bool:
    """Whether the next bytes of the file are `part`. Comparing `bytes` is fast; comparing views goes by item."""
    blocks = (part[start : start + BLOCK_BYTES] for start in range(0, len(part), BLOCK_BYTES))
    return all(file.read(len(block)) == bytes(block) for block in blocks)


def read(path: Path, *, follow: bool = True) -> Checkpoint:
    """Return the checkpoint at `path`; raise `UserError` if it cannot be read, `DamagedFileError` if damaged.

    Memory is allocated only for an intact file. Without `follow`, a symbolic link is an error.
    """
    try:
        with open_regular(path, follow=follow) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8 + LARGEST_HEADER_BYTES)
            _metadata(start, size, str(path))
            if 2 * size > (room := min(available_bytes(), available_to_this_process())):
                raise DamagedFileError(f"{path} is damaged, or too large: {size} bytes, and {room:.0f} are available")
            _proved(start, iter(partial(file.read, BLOCK_BYTES), b""), size, str(path))
            file.seek(0)
            data = file.read(size)
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedFileError(f"{path} is damaged: the disk cannot read it ({error.strerror})") from None
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    checkpoint, named = decode(data, str(path)), NAME.fullmatch(path.name)
    if named and "step" in checkpoint.tensors and checkpoint.tensors["step"].tolist() != [int(named[1])]:
        raise DamagedFileError(f"{path} is damaged: its name is that of another step than its content")
    return checkpoint


def path_of_step(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` steps."""
    return folder / f"step-{step:09d}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, ascending; ignore every other name."""
    try:
        names = os.listdir(folder)  # noqa: PTH208  only the names are needed
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = [int(found[1]) for found in map(NAME.fullmatch, names) if found]
    return sorted(step for step in steps if path_of_step(folder, step).name in names)


def newest_intact(folder: Path) -> FoundCheckpoint | None:
    """Return the newest intact checkpoint in `folder`; raise `DamagedFileError` if all are damaged."""
    complaints: list[str] = []
    for step in reversed(steps_in(folder)):
        path = path_of_step(folder, step)
        try:
            return FoundCheckpoint(path, read(path, follow=False), complaints)
        except DamagedFileError as error:
            complaints.append(str(error))
    if complaints:
        raise DamagedFileError(f"no checkpoint in {folder} is intact: {complaints[0]}")
    return None


def remove_old(folder: Path, newest: int, keep: int, best_step: int | None) -> None:
    """Remove the checkpoints up to step `newest`, except the last `keep` of them and the best."""
    old = [step for step in steps_in(folder) if step <= newest][:-keep]
    remove(folder, (path_of_step(folder, step).name for step in old if step != best_step))


def remove_later(folder: Path, newest: int) -> None:
    """Remove the checkpoints after step `newest`, intact or not: the run repeats these steps."""
    remove(folder, (path_of_step(folder, step).name for step in steps_in(folder) if step > newest))
