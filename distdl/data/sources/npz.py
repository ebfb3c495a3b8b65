"""A user's own data in one ``.npz`` file, as `numpy.savez` and `numpy.savez_compressed` write it.

    images        (N, H, W) or (N, H, W, C), uint8 or floats (converted to float32)
    labels        integers from 0, texts or True/False, (N,); or one for each pixel (N, H, W); or numbers to predict,
                  floats (N, D)
    val_images, val_labels, test_images, test_labels    the dataset's own parts, if it has them
    class_names   texts (K,), if the labels are numbers

Other words for images and labels, as in `WORDS`, are also accepted. Every array is used or refused. The file is not
trusted: nothing is unpickled, and memory is allocated only if an array's size agrees with the archive.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from distdl.data.dataset import Dataset
from distdl.data.image_shapes import canonical_images
from distdl.data.labels import Unfit
from distdl.data.room import Room, on_disk
from distdl.errors import DamagedFileError, DistdlError, UserError, quoted
from distdl.regular_files import NotRegularError, open_regular

T = TypeVar("T")
#: The words in the names of arrays, for images and labels and for the parts in the order of their rows.
WORDS = {"images": ("images", "x", "data"), "labels": ("labels", "y", "target", "targets")}
PARTS = {"training": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
KIND_OF = {word: kind for kind, words in WORDS.items() for word in words}
PART_OF = {word: part for part, words in PARTS.items() for word in words}
ARRAY = re.compile(rf"(?:({'|'.join(PART_OF)})_)?({'|'.join(KIND_OF)})(?:_({'|'.join(PART_OF)}))?", re.IGNORECASE)
CLASS_NAMES = "class_names"
EXPECTED = "images and labels, optionally val_images, val_labels, test_images, test_labels and class_names"
#: The largest expansion by deflate, a limit of the format.
MOST_DEFLATED = 1032
#: The compression methods of a zip file that NumPy uses: stored and deflated.
METHODS = (0, 8)


def load_npz(path: Path, room: Room | None = None) -> Dataset:
    """Return the dataset in an ``.npz`` file. The labels, or `class_names`, determine the number of classes.

    Raises `UserError` if the file cannot be read or holds no such dataset, `DamagedFileError` if it is damaged.
    """
    parts, class_names = _read(path, lambda archive: _contents(archive, path, room or Room()))
    starts: dict[str, int] = {}
    count = 0
    for part, (images, labels) in parts.items():
        if not (images.ndim and labels.ndim) or len(images) != len(labels) != images.shape[-1]:
            raise UserError(
                f"the {part} part of {quoted(path)} has {len(images) if images.ndim else 0} images and "
                f"{len(labels) if labels.ndim else 0} labels: expected equal numbers"
            )
        for what, array, first in zip(("images", "labels"), (images, labels), parts["training"], strict=True):
            if array.shape[1:] != first.shape[1:] or _kind(array) != _kind(first):
                raise UserError(
                    f"{quoted(path)} has {what} {first.dtype} {first.shape} for training and {array.dtype} "
                    f"{array.shape} for the {part}: expected one kind of number, and one shape except for the first "
                    "axis"
                )
        starts[part] = count
        count += len(images)
    all_images, all_labels = (_joined([arrays[i] for arrays in parts.values()]) for i in (0, 1))
    return Dataset.from_labels(
        f"npz:{path}",
        all_images[..., np.newaxis] if all_images.ndim == 3 else all_images,
        all_labels,
        test_start=starts.get("test"),
        validation_start=starts.get("validation"),
        class_names=class_names,
        notes=_scale_notes({part: images for part, (images, _) in parts.items()}),
    )


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    if len(arrays) == 1:
        return arrays[0]
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) > 1 and _kind(arrays[0]) == "i":  # NumPy turns signed and unsigned numbers of 64 bits into floats
        arrays = [array.astype(np.int64) for array in arrays]
    return np.concatenate(arrays)


def _kind(array: NDArray[Any]) -> str:
    return "i" if array.dtype.kind in "iu" else array.dtype.kind


def _scale_notes(images: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    """Return a warning if the pixels of one part were divided by 255, and those of another were not."""
    most = {part: float(np.abs(array).max(initial=0)) for part, array in images.items() if array.dtype.kind == "f"}
    low, high = (choose(most, key=most.__getitem__, default="") for choose in (min, max))
    if not most or most[high] < 50 * most[low]:
        return ()
    return (
        f"the {high} images reach {most[high]:g} and the {low} images {most[low]:g}: divide all by the same number",
    )


def _read(path: Path, read: Callable[[NpzFile], T]) -> T:
    """Return the result of `read` on the archive; its exceptions become errors that name the file."""
    try:
        with open_regular(path, follow=True) as file:
            _check_is_zip(file, path)
            with np.load(file, allow_pickle=False) as archive:
                return read(archive)
    except DistdlError:
        raise
    except MemoryError:
        raise UserError(f"there is not enough memory for {quoted(path)}: give a smaller dataset") from None
    except (NotRegularError, FileNotFoundError) as error:
        what = "is not a regular file" if isinstance(error, NotRegularError) else "does not exist"
        raise UserError(f"the data file {quoted(path)} {what}: give the path of an .npz file") from None
    except OSError as error:
        raise UserError(f"the data file {quoted(path)} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # NumPy and zipfile raise many kinds for bytes that are not an archive or an array
        raise DamagedFileError(
            f"{quoted(path)} is damaged: {error}; expected a file from numpy.savez; write or copy it again"
        ) from error


def _contents(
    archive: NpzFile, path: Path, room: Room
) -> tuple[dict[str, tuple[NDArray[Any], NDArray[Any]]], tuple[str, ...] | None]:
    """Return images and labels of each part, and the names of the classes."""
    names = _names_in(archive.files, path)
    sizes = [_member(archive, path, name).file_size for name in archive.files]
    room.take(quoted(path), sum(sizes), on_disk(path))
    parts = {
        part: (_floats_as_float32(_array(archive, path, images)), _array(archive, path, labels))
        for part, (images, labels) in names.items()
    }
    return parts, _class_names(archive, path)


def _check_is_zip(file: IO[bytes], path: Path) -> None:
    """Raise `UserError` for any other file: NumPy would read it as a single array, and trust its size."""
    if file.read(2) != b"PK":
        raise UserError(f"{quoted(path)} is not an .npz file: expected a file from numpy.savez")
    file.seek(0)


def _names_in(present: list[str], path: Path) -> dict[str, tuple[str, str]]:
    """Return the names of images and labels of each part, in the order of `PARTS`.

    Raises `UserError` for an array that has no place in the dataset.
    """
    found: dict[tuple[str, str], str] = {}
    words: dict[str, str] = {}
    unknown = []
    for name in present:
        match = ARRAY.fullmatch(name)
        if name == CLASS_NAMES:
            continue
        if match is None or (match[1] and match[3]):
            unknown.append(name)
            continue
        kind, part = KIND_OF[match[2].lower()], PART_OF[(match[1] or match[3] or "train").lower()]
        if (part, kind) in found or match[2].lower() != words.setdefault(kind, match[2].lower()):
            other = found.get((part, kind)) or next(name for (_, other), name in found.items() if other == kind)
            named_twice = f"{quoted(path)} has {other} and {name}, named in two ways"
            raise UserError(f"{named_twice}: rename or remove one; expected {EXPECTED}")
        found[part, kind] = name
    if not {("training", "images"), ("training", "labels")} <= found.keys():
        names = ", ".join(map(repr, sorted(present)[:8])) or "nothing"
        raise UserError(
            f"{quoted(path)} holds {names}; expected the arrays {EXPECTED}: write them by "
            "numpy.savez(file, images=…, labels=…)"
        )
    if unknown:
        raise UserError(f"{quoted(path)} has the array {unknown[0]!r}: remove it, or rename it; expected {EXPECTED}")
    for (part, kind), name in found.items():
        [other] = {"images", "labels"} - {kind}
        if (part, other) not in found:
            missing = re.sub(words[kind], words[other], name, flags=re.IGNORECASE)
            raise UserError(f"{quoted(path)} has {name} but no {missing}: give both, or neither")
    return {part: (found[part, "images"], found[part, "labels"]) for part in PARTS if (part, "images") in found}


def _class_names(archive: NpzFile, path: Path) -> tuple[str, ...] | None:
    if CLASS_NAMES not in archive.files:
        return None
    names = _array(archive, path, CLASS_NAMES)
    if names.dtype.kind != "U" or names.ndim != 1:
        raise UserError(
            f"{CLASS_NAMES} of {quoted(path)} is {names.dtype} {names.shape}; expected texts, one for each class"
        )
    return tuple(names.tolist())


def _floats_as_float32(array: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # `Dataset.checked` reports values that become infinite in float32
        return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def _array(archive: NpzFile, path: Path, name: str) -> NDArray[Any]:
    """Return the array as stored, in this machine's byte order."""
    container: Any = archive.zip
    member = _member(archive, path, name)
    with container.open(member) as stream:
        shape, is_fortran, dtype, start = _header(stream)
        if dtype.hasobject:
            raise UserError(
                f"{name} of {quoted(path)} holds Python objects instead of numbers (arrays of different sizes "
                "cause this): give one array; for labels, labels.astype(str)"
            )
        announced = dtype.itemsize * int(np.prod(shape, dtype=object))
        if announced != member.file_size - start:
            raise ValueError(f"{name}: {dtype} {shape} does not match its {member.file_size} bytes")
        content = stream.read()
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")
    return np.ascontiguousarray(array, dtype.newbyteorder("="))


def _member(archive: NpzFile, path: Path, name: str) -> Any:
    """Return what the archive says about an array; raise an error if it cannot be read, or cannot have that size."""
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
    return member


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


def load_images(name: str, room: Room | None = None) -> NDArray[Any]:
    """Return the images (N, H, W, C) of an ``.npz`` file without labels: the array ``images``, or the only one.

    ``FILE.npz:ARRAY`` names another array. Raises the errors of `load_npz`.
    """
    path, wanted = Path(name), None
    if not path.exists() and ":" in name:
        file, _, wanted = name.rpartition(":")
        path = Path(file)

    def read(archive: NpzFile) -> NDArray[Any]:
        array = _images_name(archive, path, wanted)
        (room or Room()).take(quoted(path), _member(archive, path, array).file_size, on_disk(path))
        return _floats_as_float32(_array(archive, path, array))

    images = _read(path, read)
    try:
        return canonical_images(images[..., np.newaxis] if images.ndim == 3 else images)[0]
    except Unfit as error:
        raise UserError(f"{quoted(path)} has {error}") from None


def _images_name(archive: NpzFile, path: Path, wanted: str | None) -> str:
    """Return the name of the array with the images."""
    found = [wanted] if wanted else list(archive.files)
    if wanted is None and len(found) > 1:
        of_images = {name: ARRAY.fullmatch(name) for name in found}
        found = [name for name, match in of_images.items() if match and KIND_OF[match[2].lower()] == "images"]
    if len(found) != 1 or found[0] not in archive.files:
        raise UserError(
            f"{quoted(path)} holds {', '.join(map(repr, sorted(archive.files)[:8])) or 'nothing'}: name the array of "
            f"images, as in npz:{path}:images"
        )
    return found[0]
