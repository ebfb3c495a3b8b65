"""The IDX format of MNIST, plain or gzipped, read without trusting a word of it.

A file is a header of big-endian numbers and then the elements, unsigned bytes in C order:

    bytes 0-1    zero
    byte  2      element type: 0x08 = unsigned byte, the only one that MNIST uses
    byte  3      number of dimensions: 3 for images (N, H, W), 1 for labels (N,)
    4 bytes      the length of each dimension
    the rest     exactly as many elements as the lengths declare

Whatever the header says, memory stays within the declared size, and within what the file really holds:
elements are read block by block, never more than declared, and one byte beyond shows whether there is too
much. A gzip bomb thus costs one block.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, "file formats".
"""

from __future__ import annotations

import gzip
import math
import os
import stat
import struct
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from distdl.errors import DamagedFileError, UserError

Kind = Literal["images", "labels"]
DIMENSIONS: dict[Kind, int] = {"images": 3, "labels": 1}

UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"
GZIP_LARGEST_RATIO = 1032  # deflate cannot expand further
LARGEST_BYTES = 2**31
BLOCK_BYTES = 2**20


def read_idx(path: Path, *, kind: Kind) -> NDArray[np.uint8]:
    """Return the elements of the IDX file at `path`: images (N, H, W) or labels (N,), as uint8.

    Whether the file is gzipped is seen from its first bytes, not from its name. It is opened to read only.

    Raises `DamagedFileError` where the file is not what its header says or not IDX at all, and `UserError`
    where it cannot be read, is no regular file, or declares more than 2 GiB.
    """
    with ExitStack() as stack:
        try:
            # A pipe would block when opened, for ever.
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{quoted(path)} is not a regular file: expected an IDX file of {kind}")
            raw = stack.enter_context(path.open("rb"))
            file_bytes = os.fstat(raw.fileno()).st_size
            compressed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            raw.seek(0)
            stream = stack.enter_context(gzip.GzipFile(fileobj=raw, mode="rb")) if compressed else raw
            shape = _read_header(stream, path, kind)
            _check_size(path, shape, file_bytes, compressed)
            elements = _read_elements(stream, path, math.prod(shape))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DamagedFileError(
                f"{quoted(path)} is damaged: its gzip data cannot be decompressed ({error}), "
                "expected an intact file; fetch it again"
            ) from error
        except OSError as error:
            raise UserError(f"{quoted(path)} cannot be read: {error.strerror or error}") from error
    return np.frombuffer(elements, np.uint8).reshape(shape)


def quoted(path: Path) -> str:
    """Return the path in quotes, with line breaks and the like escaped, so that a message stays one line."""
    return repr(os.fspath(path))


def _damaged(path: Path, found: str, expected: str) -> NoReturn:
    raise DamagedFileError(f"{quoted(path)} is damaged: {found}, expected {expected}; fetch the file again")


def _read_header(stream: BinaryIO | gzip.GzipFile, path: Path, kind: Kind) -> tuple[int, ...]:
    """Return the shape that the header declares."""
    dimensions = DIMENSIONS[kind]
    header = stream.read(4 + 4 * dimensions)
    expected_magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if not header:
        _damaged(path, "it is empty", f"an IDX file of {kind}")
    if header[:4] != expected_magic:
        _damaged(
            path,
            f"it starts with {header[:4].hex(' ')}",
            f"{expected_magic.hex(' ')} for an IDX file of {kind}",
        )
    if len(header) < 4 + 4 * dimensions:
        _damaged(path, f"its header ends after {len(header)} bytes", f"{4 + 4 * dimensions} for {kind}")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if 0 in shape:
        _damaged(path, f"its header declares the shape {shape}", "no dimension of zero")
    return shape


def _check_size(path: Path, shape: tuple[int, ...], file_bytes: int, compressed: bool) -> None:
    """Raise where the declared size cannot be that of a file of `file_bytes`, or is more than we read."""
    declared = 4 + 4 * len(shape) + math.prod(shape)
    if compressed and declared > GZIP_LARGEST_RATIO * file_bytes:
        _damaged(
            path,
            f"its header declares {declared} bytes",
            f"at most {GZIP_LARGEST_RATIO * file_bytes} from {file_bytes} bytes of gzip data",
        )
    if not compressed and declared != file_bytes:
        _damaged(path, f"it has {file_bytes} bytes", f"the {declared} that its header declares")
    if declared > LARGEST_BYTES:
        raise UserError(f"{quoted(path)} declares {declared} bytes, expected at most {LARGEST_BYTES}")


def _read_elements(stream: BinaryIO | gzip.GzipFile, path: Path, count: int) -> bytearray:
    """Return the `count` bytes that the stream must hold, neither more nor less."""
    elements = bytearray()
    while len(elements) < count:
        block = stream.read(min(BLOCK_BYTES, count - len(elements)))
        if not block:
            _damaged(path, f"it ends after {len(elements)} elements", f"the {count} that its header declares")
        elements += block
    # Reading on to the end also makes gzip compare its checksum.
    if stream.read(1):
        _damaged(path, "it goes on after its last element", f"the {count} elements that its header declares")
    return elements
