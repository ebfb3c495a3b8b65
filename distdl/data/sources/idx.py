"""The IDX format of MNIST, plain or gzipped. The file is not trusted.

A file has a header of big-endian numbers, and then the elements, unsigned bytes in C order:

    bytes 0-1    zero
    byte  2      element type: 0x08 = unsigned byte, the only one that MNIST uses
    byte  3      number of dimensions: 3 for images (N, H, W), 1 for labels (N,)
    4 bytes      the length of each dimension

Memory never exceeds the declared size, nor the content of the file. Elements are read block by block, up to the
declared number. One more byte shows whether the file is too long. So a gzip bomb costs one block.

Source: Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, "file formats".
"""

import gzip
import math
import os
import struct
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from distdl.data.room import Room, on_disk
from distdl.errors import DamagedFileError, UserError, quoted
from distdl.regular_files import NotRegularError, open_regular

Kind = Literal["images", "labels"]
DIMENSIONS: dict[Kind, int] = {"images": 3, "labels": 1}

UNSIGNED_BYTE = 0x08
GZIP_MAGIC = b"\x1f\x8b"
GZIP_LARGEST_RATIO = 1032  # a limit of deflate
BLOCK_BYTES = 2**20


def read_idx(path: Path, *, kind: Kind, room: Room | None = None) -> NDArray[np.uint8]:
    """Return the elements of the IDX file at `path`: images (N, H, W) or labels (N,), as uint8.

    Raises `DamagedFileError` if the file is not IDX or differs from its header. Raises `UserError` if it cannot be
    read, is no regular file, or declares more than there is `room` for.
    """
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(open_regular(path, follow=True))
            file_bytes = os.fstat(raw.fileno()).st_size
            compressed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC  # whatever its name
            raw.seek(0)
            stream = stack.enter_context(gzip.GzipFile(fileobj=raw, mode="rb")) if compressed else raw
            shape = _read_header(stream, path, kind)
            _check_size(path, shape, file_bytes, compressed)
            (room or Room()).take(quoted(path), math.prod(shape), on_disk(path))
            elements = _read_elements(stream, path, math.prod(shape))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            _damaged(path, f"its gzip data cannot be decompressed ({error})", "an intact file")
        except NotRegularError:
            raise UserError(f"{quoted(path)} is not a regular file: expected an IDX file of {kind}") from None
        except OSError as error:
            raise UserError(f"{quoted(path)} cannot be read: {error.strerror or error}") from error
    return np.frombuffer(elements, np.uint8).reshape(shape)


def _damaged(path: Path, found: str, expected: str) -> NoReturn:
    raise DamagedFileError(f"{quoted(path)} is damaged: {found}, expected {expected}; fetch the file again")


def _read_header(stream: BinaryIO | gzip.GzipFile, path: Path, kind: Kind) -> tuple[int, ...]:
    dimensions = DIMENSIONS[kind]
    header = stream.read(4 + 4 * dimensions)
    expected_magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if not header:
        _damaged(path, "it is empty", f"an IDX file of {kind}")
    if header[:4] != expected_magic:
        expected = f"{expected_magic.hex(' ')} for an IDX file of {kind}"
        _damaged(path, f"it starts with {header[:4].hex(' ')}", expected)
    if len(header) < 4 + 4 * dimensions:
        _damaged(path, f"its header ends after {len(header)} bytes", f"{4 + 4 * dimensions} for {kind}")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if 0 in shape:
        _damaged(path, f"its header declares the shape {shape}", "no dimension of zero")
    return shape


def _check_size(path: Path, shape: tuple[int, ...], file_bytes: int, compressed: bool) -> None:
    """Raise an error if a file of `file_bytes` cannot have the declared size."""
    declared = 4 + 4 * len(shape) + math.prod(shape)
    if compressed and declared > GZIP_LARGEST_RATIO * file_bytes:
        most = f"at most {GZIP_LARGEST_RATIO * file_bytes} from {file_bytes} bytes of gzip data"
        _damaged(path, f"its header declares {declared} bytes", most)
    if not compressed and declared != file_bytes:
        _damaged(path, f"it has {file_bytes} bytes", f"the {declared} that its header declares")


def _read_elements(stream: BinaryIO | gzip.GzipFile, path: Path, count: int) -> bytearray:
    """Return the bytes of the elements, exactly `count`."""
    elements = bytearray()
    while len(elements) < count:
        block = stream.read(min(BLOCK_BYTES, count - len(elements)))
        if not block:
            _damaged(path, f"it ends after {len(elements)} elements", f"the {count} that its header declares")
        elements += block
    # At the end of the data, gzip also compares its checksum.
    if stream.read(1):
        _damaged(path, "it continues after its last element", f"the {count} elements that its header declares")
    return elements
