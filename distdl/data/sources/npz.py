"""A user's own data in one ``.npz`` file, as `numpy.savez` and `numpy.savez_compressed` write it.

    images        (N, H, W) or (N, H, W, C), uint8 or floats (converted to float32)
    labels        integers from 0, (N,) or one for each pixel (N, H, W); or floats, numbers to predict, (N, D)
    test_images, test_labels    the test part, if the dataset has its own

The names of Keras, as in `NAMES`, are also accepted. The file is not trusted: nothing is unpickled, and memory is
allocated only if an array's size agrees with the archive.
"""

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from distdl.data.dataset import Dataset
from distdl.errors import DamagedFileError, DistdlError, UserError, quoted

NAMES = (("images", "labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test"))
#: The largest expansion by deflate, a limit of the format.
MOST_DEFLATED = 1032
#: The compression methods of a zip file that NumPy uses: stored and deflated.
METHODS = (0, 8)


def load_npz(path: Path) -> Dataset:
    """Return the dataset in an ``.npz`` file. The largest label, or D, determines `classes`.

    Raises `UserError` if the file cannot be read or holds no such dataset, `DamagedFileError` if it is damaged.
    """
    images, labels, *test = _read(path, lambda archive: _names_in(archive, path))
    for part, (of_part, its_labels) in {"training": (images, labels), "test": test or (images, labels)}.items():
        if len(of_part) != len(its_labels):
            raise UserError(
                f"the {part} part of {quoted(path)} has {len(of_part)} images and {len(its_labels)} labels: expected "
                "equal numbers"
            )
    start = None
    if test:
        for what, array, of_test in (("images", images, test[0]), ("labels", labels, test[1])):
            if array.shape[1:] != of_test.shape[1:] or array.dtype.kind != of_test.dtype.kind:
                raise UserError(
                    f"{quoted(path)} has {what} {array.dtype} {array.shape} for training and {of_test.dtype} "
                    f"{of_test.shape} for the test: expected one kind of number, and one shape except for the first "
                    "axis"
                )
        start = len(images)
        images, labels = np.concatenate([images, test[0]]), np.concatenate([labels, test[1]])
    classes = labels.shape[-1] if labels.dtype.kind == "f" else int(labels.max(initial=0)) + 1
    return Dataset(f"npz:{path}", images, labels, classes, start).checked()


def _read(path: Path, names_in: Callable[[NpzFile], list[str]]) -> list[NDArray[Any]]:
    """Return the arrays that `names_in` chooses, images as (N, H, W, C)."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"the data file {quoted(path)} {what}: give the path of an .npz file")
    try:
        with path.open("rb") as file:
            _check_is_zip(file, path)
            with np.load(file, allow_pickle=False) as archive:
                return [_converted(archive, path, name) for name in names_in(archive)]
    except DistdlError:
        raise
    except MemoryError:
        raise UserError(f"there is not enough memory for {quoted(path)}: give a smaller dataset") from None
    except OSError as error:
        raise UserError(f"the data file {quoted(path)} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # NumPy and zipfile raise many kinds for bytes that are not an archive or an array
        raise DamagedFileError(
            f"{quoted(path)} is damaged: {error}; expected a file from numpy.savez; write or copy it again"
        ) from error


def _check_is_zip(file: IO[bytes], path: Path) -> None:
    """Raise `UserError` for any other file: NumPy would read it as a single array, and trust its size."""
    if file.read(2) != b"PK":
        raise UserError(f"{quoted(path)} is not an .npz file: expected a file from numpy.savez")
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


def _converted(archive: NpzFile, path: Path, name: str) -> NDArray[Any]:
    """Return an array with the axes and the dtype that training needs."""
    array = _array(archive, path, name)
    if array.dtype.kind not in "uif":
        raise UserError(f"{name} of {quoted(path)} is {array.dtype}; expected integers or floats")
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # `Dataset.checked` reports values that become infinite in float32
            array = array.astype(np.float32, copy=False)
    if name in {names[place] for names in NAMES for place in (0, 2)}:
        return array[..., np.newaxis] if array.ndim == 3 else array
    return array[:, np.newaxis] if array.dtype.kind == "f" and array.ndim == 1 else array


def _array(archive: NpzFile, path: Path, name: str) -> NDArray[Any]:
    """Return the array as stored, in this machine's byte order."""
    container: Any = archive.zip
    try:
        member = container.getinfo(f"{name}.npy")
    except KeyError:
        raise UserError(f"{quoted(path)} has {name} in another form than numpy.savez writes it ({name}.npy)") from None
    if member.compress_type not in METHODS or member.flag_bits & 1:
        what = f"{name} of {quoted(path)} is encrypted, or compressed by another method"
        raise UserError(f"{what}: expected a file from numpy.savez")
    if member.file_size > MOST_DEFLATED * member.compress_size:
        raise ValueError(f"{name} cannot have the {member.file_size} bytes that it announces")
    with container.open(member) as stream:
        shape, is_fortran, dtype, start = _header(stream)
        if dtype.hasobject:
            raise UserError(
                f"{name} of {quoted(path)} holds Python objects instead of numbers (arrays of different sizes "
                "cause this): give one array"
            )
        announced = dtype.itemsize * int(np.prod(shape, dtype=object))
        if announced != member.file_size - start:
            raise ValueError(f"{name}: {dtype} {shape} does not match its {member.file_size} bytes")
        content = stream.read()
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    return np.ascontiguousarray(array, dtype.newbyteorder("="))


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return the shape, True for Fortran order, the dtype, and the position of the first element."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"the format {version} is unknown")
    shape, is_fortran, dtype = readers[version](stream)
    if any(size < 0 for size in shape):
        raise ValueError(f"the shape {shape} has a negative number")
    return shape, is_fortran, dtype, stream.tell()


def load_images(name: str) -> NDArray[Any]:
    """Return the images (N, H, W, C) of an ``.npz`` file without labels: the array ``images``, or the only one.

    ``FILE.npz:ARRAY`` names another array. Raises the errors of `load_npz`.
    """
    path, wanted = Path(name), None
    if not path.exists() and ":" in name:
        file, _, wanted = name.rpartition(":")
        path = Path(file)
    [images] = _read(path, lambda archive: [_images_name(archive, path, wanted)])
    images = images[..., np.newaxis] if images.ndim == 3 else images
    if images.ndim != 4 or not images.size or (images.dtype != np.uint8 and images.dtype.kind != "f"):
        raise UserError(
            f"{quoted(path)} has an array {images.dtype} {images.shape}: expected images (N, H, W) or (N, H, W, C) of "
            "uint8 or floats"
        )
    return images


def _images_name(archive: NpzFile, path: Path, wanted: str | None) -> str:
    """Return the name of the array with the images."""
    known = [names[place] for names in NAMES for place in (0, 2)]
    found = [wanted] if wanted else list(archive.files)
    if wanted is None and len(found) > 1:
        found = [one for one in found if one in known]
    if len(found) != 1 or found[0] not in archive.files:
        raise UserError(
            f"{quoted(path)} holds {', '.join(map(repr, sorted(archive.files)[:8])) or 'nothing'}: name the array of "
            f"images, as in npz:{path}:{known[0]}"
        )
    return found[0]
