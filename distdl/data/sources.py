"""The data sets by name: `load` turns bytes from files or the network into one `Dataset`.

A further data set is one more function in `SOURCES`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.idx import quoted, read_idx
from distdl.data.npz import read_npz
from distdl.errors import DamagedFileError, UserError, unknown_name

MOST_CLASSES = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and what is to be told of them, and where the set's own test part starts.

    The labels say what the task is: a label for each image (classification), for each of its pixels
    (segmentation), or numbers for each image (regression).
    """

    name: str
    images: NDArray[Any]
    """(N, H, W, C), uint8 or float32."""
    labels: NDArray[Any]
    """Whole numbers in 0 .. classes-1, (N,) or (N, H, W); or float32 (N, D)."""
    classes: int
    """How many classes there are; for regression D."""
    test_start: int | None
    """Rows from here on are the set's own test part; None: it has none."""

    def checked(self) -> Dataset:
        """Return it as the rest of the trainer takes it (whole labels as int64); for one that a script has made.

        Raises `UserError` where a field is not what is said of it above.
        """
        images, labels, classes, test_start = self.images, self.labels, self.classes, self.test_start
        for kind, array in (("images", images), ("labels", labels)):
            if not isinstance(array, np.ndarray):
                raise self._wrong(f"{kind} of type {type(array).__name__}", "a NumPy array")
        if images.ndim != 4 or not images.size or images.dtype not in (np.uint8, np.float32):
            raise self._wrong(
                f"images {images.dtype} {images.shape}",
                "uint8 or float32 (N, H, W, C): images[..., None] adds an axis for channels, "
                "images.astype(np.float32) converts other numbers",
            )
        count = len(images)
        if images.dtype == np.float32 and not np.isfinite(images).all():
            sample = int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
            raise self._wrong(f"NaN or infinity in images, first in sample {sample}", "finite pixels")
        if not isinstance(classes, int | np.integer) or not 1 <= classes <= MOST_CLASSES:
            raise self._wrong(f"classes {classes!r}", "an int, how many classes there are")
        labels = self._checked_numbers() if labels.dtype == np.float32 and labels.ndim == 2 else self._checked_labels()
        if test_start is not None and not (isinstance(test_start, int | np.integer) and 0 < test_start < count):
            raise self._wrong(
                f"test_start {test_start!r}", f"None, or the first row of the test part, 1 to {count - 1}"
            )
        test_start = None if test_start is None else int(test_start)
        return replace(self, labels=labels, classes=int(classes), test_start=test_start)

    def _checked_labels(self) -> NDArray[np.int64]:
        labels, classes = self.labels, self.classes
        count, height, width, _ = self.images.shape
        if labels.shape not in {(count,), (count, height, width)} or labels.dtype.kind not in "iu":
            raise self._wrong(
                f"labels {labels.dtype} {labels.shape}",
                f"{count} integers, one for each image; or {(count, height, width)}, one for each pixel; or float32 "
                f"({count}, D), numbers for each image",
            )
        if not 0 <= labels.min() <= labels.max() < classes:
            raise self._wrong(f"labels {labels.min()} to {labels.max()}", f"0 to {classes - 1} for {classes} classes")
        return labels.astype(np.int64)

    def _checked_numbers(self) -> NDArray[np.float32]:
        labels, expected = self.labels, (len(self.images), self.classes)
        if labels.shape != expected:
            raise self._wrong(
                f"labels float32 {labels.shape}",
                f"{expected}, as many numbers for each image as `classes` says; or integers, a label for each image",
            )
        if not np.isfinite(labels).all():
            sample = int(np.argmin(np.isfinite(labels).all(axis=1)))
            raise self._wrong(f"NaN or infinity in labels, first in sample {sample}", "finite numbers")
        return labels

    def _wrong(self, given: str, expected: str) -> UserError:
        return UserError(f"the data set {self.name!r} has {given}; expected {expected}")


def load(name: str, data_dir: Path | None) -> Dataset:
    """Return the data set of that name, read from `data_dir` where it comes in files, or that of ``npz:PATH``.

    Raises `UserError` where the name is unknown or a file is not to be had, `DamagedFileError` if damaged.

    >>> load("digits", None).images.shape
    (1797, 8, 8, 1)
    """
    if name.startswith(NPZ):
        return npz(Path(name.removeprefix(NPZ)))
    if name not in SOURCES:
        raise unknown_name("dataset", name, SOURCES)
    return SOURCES[name](data_dir)


# ---------------------------------------------------------------------------------------------------- digits

DIGITS_SHA256 = "516461765719e9f81b246f52d21473a2e9006efb68053ba7c60c53a89fe9dcb6"


def digits(_data_dir: Path | None) -> Dataset:
    """Return the 1,797 handwritten digits of 8x8 pixels, 0 .. 16, that are part of this package.

    They are the test part of E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI
    Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, in the copy that scikit-learn
    distributes; licensed under CC BY 4.0 (see DIGITS-LICENSE.txt beside this file). No folder is needed.
    """
    file = resources.files("distdl.data") / "digits.npz"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedFileError(
            f"{str(file)!r} cannot be read: {error.strerror or error}; install distdl-mpi again"
        ) from error
    # Compared before anything is decoded, so nothing in the file has to be trusted.
    found = hashlib.sha256(content).hexdigest()
    if found != DIGITS_SHA256:
        raise DamagedFileError(
            f"{str(file)!r} is damaged: its sha256 is {found}, expected {DIGITS_SHA256}; install distdl-mpi again"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return Dataset(
            name="digits",
            images=arrays["images"],
            labels=arrays["labels"].astype(np.int64),
            classes=10,
            test_start=None,
        )


# ----------------------------------------------------------------------------------------------------- MNIST

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
"""The files as they were first published; the order is that in which they are read."""
MNIST_BYTES = {
    "train-images-idx3-ubyte.gz": 9_912_422,
    "train-labels-idx1-ubyte.gz": 28_881,
    "t10k-images-idx3-ubyte.gz": 1_648_877,
    "t10k-labels-idx1-ubyte.gz": 4_542,
}
#: How every address starts that a download is asked from or sent on to.
DOWNLOADS_FROM = "https://"
MOST_REDIRECTS = 5
TIMEOUT_SECONDS = 30
BLOCK_BYTES = 2**16


def mnist(data_dir: Path | None) -> Dataset:
    """Return MNIST: 60,000 handwritten digits of 28x28 pixels, 0 .. 255, and 10,000 more, its test part.

    With `data_dir`, the four IDX files are read from there, each as it is or gzipped (with ``.gz`` behind its
    name); whatever valid IDX files bear those names are taken. Without, the gzipped files are downloaded once
    into the user's cache folder, and their sha256 compared at every start.

    Source: Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, 1998.
    """
    paths = _downloaded() if data_dir is None else _found_in(data_dir)
    train_images, train_labels = _pair(paths[0], paths[1])
    test_images, test_labels = _pair(paths[2], paths[3])
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{quoted(paths[2])} has images of shape {test_images.shape[1:]}, "
            f"expected {train_images.shape[1:]} as in {quoted(paths[0])}; give files of one data set"
        )
    return Dataset(
        name="mnist",
        images=np.concatenate([train_images, test_images])[..., np.newaxis],
        labels=np.concatenate([train_labels, test_labels]).astype(np.int64),
        classes=10,
        test_start=len(train_labels),
    )


def _pair(images_path: Path, labels_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the images (N, H, W) and labels (N,) of two files that belong together."""
    images = read_idx(images_path, kind="images")
    labels = read_idx(labels_path, kind="labels")
    if len(images) != len(labels):
        raise UserError(
            f"{quoted(labels_path)} has {len(labels)} labels, expected {len(images)}, one for each image of "
            f"{quoted(images_path)}; give files of one data set"
        )
    if labels.max() > 9:
        raise DamagedFileError(
            f"{quoted(labels_path)} is damaged: sample {labels.argmax()} has label {labels.max()}, "
            "expected 0 to 9; fetch the file again"
        )
    return images, labels


def _found_in(data_dir: Path) -> list[Path]:
    """Return the paths of the four files in a folder."""
    try:
        present = {path.name for path in data_dir.iterdir()}
    except OSError as error:
        raise UserError(
            f"the data folder {quoted(data_dir)} cannot be read ({error.strerror or error}): "
            "expected a folder with the four MNIST files; give another --data-dir"
        ) from error
    paths, missing = [], []
    for compressed in MNIST_SHA256:
        plain = compressed.removesuffix(".gz")
        name = next((name for name in (plain, compressed) if name in present), None)
        if name is None:
            missing.append(plain)
        else:
            paths.append(data_dir / name)
    if missing:
        raise UserError(
            f"the data folder {quoted(data_dir)} lacks {', '.join(missing)}: expected the four MNIST files, "
            "each as it is or with .gz behind its name; give another --data-dir, or none to download them"
        )
    return paths


def _downloaded() -> list[Path]:
    """Return the paths of the four files in the user's cache folder, downloading those not there yet."""
    try:
        pooch = importlib.import_module("pooch")
    except ImportError as error:
        raise UserError(
            "downloading MNIST needs pooch, which is not installed: pip install 'distdl-mpi[data]', "
            "or give the folder with the four files by --data-dir"
        ) from error
    return [_download(pooch, name, sha256) for name, sha256 in MNIST_SHA256.items()]


def _download(pooch: Any, name: str, sha256: str) -> Path:
    """Return the path of one file, from the cache or from the first mirror that has it intact."""
    cache = pooch.os_cache("distdl") / "mnist"
    failures = []
    for mirror in MNIST_MIRRORS:
        try:
            fetch = functools.partial(_fetch, MNIST_BYTES[name])
            pinned = f"sha256:{sha256}"
            return Path(pooch.retrieve(mirror + name, known_hash=pinned, fname=name, path=cache, downloader=fetch))
        except (OSError, ValueError) as error:  # the network or the disk; another sha256
            failures.append(f"{mirror}: {textwrap.shorten(str(error), 160)}")
    raise UserError(
        f"{name} could not be downloaded to {quoted(cache)} ({'; '.join(failures)}): expected network access "
        "and room there; or fetch the four MNIST files elsewhere and give their folder by --data-dir"
    )


def _fetch(size: int, url: str, output: str, _pooch: Any) -> None:
    """Write what is at `url` to the file `output`: exactly `size` bytes, over HTTPS on all of the way.

    Called by pooch, which compares the sha256 and only then puts the file into its place. Raises `OSError` or
    `ValueError` where anything is otherwise, at the first byte too many.
    """
    requests = importlib.import_module("requests")  # pooch needs it too
    with requests.Session() as session:
        for _ in range(MOST_REDIRECTS):
            if not url.startswith(DOWNLOADS_FROM):
                raise ValueError(f"it leads to {url}, which does not start with {DOWNLOADS_FROM}")
            answer = session.get(url, stream=True, timeout=TIMEOUT_SECONDS, allow_redirects=False)
            if not answer.is_redirect:
                break
            url = answer.next.url
        else:
            raise ValueError(f"it leads on more than {MOST_REDIRECTS} times")
        answer.raise_for_status()
        left = size
        with Path(output).open("wb") as file:
            for block in answer.iter_content(BLOCK_BYTES):
                left -= len(block)
                if left < 0:
                    raise ValueError(f"it is longer than the {size} bytes that it should have")
                file.write(block)
        if left:
            raise ValueError(f"it ends {left} of {size} bytes early")


# ----------------------------------------------------------------------------------------------- a file of the user's

#: What the path of such a file has in front of it, as the name of a data set.
NPZ = "npz:"


def npz(path: Path) -> Dataset:
    """Return the data set in an ``.npz`` file; see `distdl.data.npz` for what it holds.

    As many classes as the greatest label says, or as many numbers as each image has.
    """
    images, labels, *test = read_npz(path)
    for part, (of_part, its_labels) in {"training": (images, labels), "test": test or (images, labels)}.items():
        if len(of_part) != len(its_labels):
            raise UserError(
                f"the {part} part of {quoted(path)} has {len(of_part)} images and {len(its_labels)} labels: expected "
                "as many of both"
            )
    start = None
    if test:
        for what, array, of_test in (("images", images, test[0]), ("labels", labels, test[1])):
            if array.shape[1:] != of_test.shape[1:] or array.dtype.kind != of_test.dtype.kind:
                raise UserError(
                    f"{quoted(path)} has {what} {array.dtype} {array.shape} for training and {of_test.dtype} "
                    f"{of_test.shape} for the test: expected one kind, and the same shape but for how many there are"
                )
        start = len(images)
        images, labels = np.concatenate([images, test[0]]), np.concatenate([labels, test[1]])
    classes = labels.shape[-1] if labels.dtype.kind == "f" else int(labels.max(initial=0)) + 1
    return Dataset(f"{NPZ}{path}", images, labels, classes, start).checked()


SOURCES: dict[str, Callable[[Path | None], Dataset]] = {"digits": digits, "mnist": mnist}
