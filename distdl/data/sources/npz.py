"""A user's own data in one ``.npz`` file, as `numpy.savez` and `numpy.savez_compressed` write it, read without trust.

    images        (N, H, W) or (N, H, W, C), uint8 or floats (taken as float32)
    labels        whole numbers from 0, (N,) or, one for each pixel, (N, H, W); or floats, numbers to predict, (N, D)
    test_images, test_labels    the set's own test part, if it has one

``x_train``, ``y_train``, ``x_test`` and ``y_test``, as Keras names them, are taken as well. Nothing is unpickled, and
nothing is allocated before what an array says of its size agrees with what the archive says of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from distdl.data.sources.idx import quoted
from distdl.errors import DamagedFileError, DistdlError, UserError

NAMES = (("images", "labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test"))
#: How many times its compressed size a deflated member can have: 1,032, by the format.
MOST_DEFLATED = 1032
#: Of a zip file: stored, and deflated.
METHODS = (0, 8)


def read_npz(path: Path) -> list[NDArray[Any]]:
    """Return images (N, H, W, C) and labels of the training part, and after them those of the test part, if any.

    Raises `UserError` where the file is not there or is no data set of ours, `DamagedFileError` where it is damaged.
    """
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"the data file {quoted(path)} {what}: give the path of an .npz file")
    try:
        with path.open("rb") as file:
            _refuse_no_archive(file, path)
            with np.load(file, allow_pickle=False) as archive:
                return [_taken(archive, path, name) for name in _names_in(archive, path)]
    except DistdlError:
        raise
    except MemoryError:
        raise UserError(f"there is not enough memory for {quoted(path)}: give a smaller data set") from None
    except OSError as error:
        raise UserError(f"the data file {quoted(path)} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever NumPy and what it uses say of bytes that are no archive, or no array
        raise DamagedFileError(
            f"{quoted(path)} is damaged: {error}; expected what numpy.savez writes; write or copy it again"
        ) from error


def _refuse_no_archive(file: IO[bytes], path: Path) -> None:
    """Raise `UserError` for another kind of file, before NumPy takes it for an array, and believes its size."""
    if file.read(2) != b"PK":
        raise UserError(f"{quoted(path)} is no .npz file: expected what numpy.savez writes")
    file.seek(0)


def _names_in(archive: NpzFile, path: Path) -> list[str]:
    """Return the names of the arrays to read, in the order of `NAMES`."""
    present = set(archive.files)
    for names in NAMES:
        if present >= set(names[:2]):
            tests = [name for name in names[2:] if name in present]
            if len(tests) == 1:
                other = next(name for name in names[2:] if name not in present)
                raise UserError(f"{quoted(path)} has {tests[0]} but no {other}: give both, or neither")
            return [*names[:2], *tests]
    raise UserError(
        f"{quoted(path)} holds {', '.join(map(repr, sorted(present)[:8])) or 'nothing'}; expected the arrays images "
        "and labels, and test_images and test_labels if there is a test part: write it by numpy.savez"
    )


def _taken(archive: NpzFile, path: Path, name: str) -> NDArray[Any]:
    """Return an array as the trainer takes it."""
    array = _array(archive, path, name)
    if array.dtype.kind not in "uif":
        raise UserError(f"{name} of {quoted(path)} is {array.dtype}; expected whole numbers or floats")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what is infinite in float32 is told of later, with its place
            array = array.astype(np.float32, copy=False)
    if name in {names[place] for names in NAMES for place in (0, 2)}:
        return array[..., np.newaxis] if array.ndim == 3 else array
    return array[:, np.newaxis] if array.dtype.kind == "f" and array.ndim == 1 else array


def _array(archive: NpzFile, path: Path, name: str) -> NDArray[Any]:
    """Return the array of that name as it is in the file, in this machine's byte order."""
    container: Any = archive.zip
    try:
        member = container.getinfo(f"{name}.npy")
    except KeyError:
        raise UserError(f"{quoted(path)} has {name} in another form than numpy.savez writes it ({name}.npy)") from None
    if member.compress_type not in METHODS or member.flag_bits & 1:
        raise UserError(f"{name} of {quoted(path)} is compressed in another way than NumPy does, or encrypted")
    if member.file_size > MOST_DEFLATED * member.compress_size:
        raise ValueError(f"{name} cannot have the {member.file_size} bytes that it announces")
    with container.open(member) as stream:
        shape, is_fortran, dtype, start = _header(stream)
        if dtype.hasobject:
            raise UserError(
                f"{name} of {quoted(path)} holds objects and not numbers, as arrays of several sizes do: give one array"
            )
        announced = dtype.itemsize * int(np.prod(shape, dtype=object))
        if announced != member.file_size - start:
            raise ValueError(f"{name}: {dtype} {shape} is not what its {member.file_size} bytes can hold")
        content = stream.read()
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    return np.ascontiguousarray(array, dtype.newbyteorder("="))


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, whether in Fortran's order, dtype, and where the numbers begin."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"the format {version} is unknown")
    shape, is_fortran, dtype = readers[version](stream)
    if any(size < 0 for size in shape):
        raise ValueError(f"the shape {shape} has a side below 0")
    return shape, is_fortran, dtype, stream.tell()
