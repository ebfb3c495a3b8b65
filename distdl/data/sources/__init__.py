"""The data sets by name: `load` turns bytes from files or the network into one `Dataset`.

A further data set is one more function in `SOURCES`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np

from distdl.data.dataset import Dataset
from distdl.data.sources.folder import read_folder
from distdl.data.sources.idx import quoted
from distdl.data.sources.mnist import FASHION_MNIST, MNIST, Published, read_published
from distdl.data.sources.npz import read_npz
from distdl.errors import DamagedFileError, UserError, unknown_name

__all__ = ["FROM_PATH", "SOURCES", "Dataset", "load"]


def load(name: str, data_dir: Path | None) -> Dataset:
    """Return the data set of that name, from `data_dir` if it comes in files; or that of ``npz:PATH``, ``folder:PATH``.

    Raises `UserError` where the name is unknown or a file is not to be had, `DamagedFileError` if damaged.

    >>> load("digits", None).images.shape
    (1797, 8, 8, 1)
    """
    for prefix, kind in FROM_PATH.items():
        if name.startswith(prefix):
            return kind(Path(name.removeprefix(prefix)))
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


# ------------------------------------------------------------------------------------------- MNIST and its like


def mnist(data_dir: Path | None) -> Dataset:
    """Return MNIST: 60,000 handwritten digits of 28x28 pixels, 0 .. 255, and 10,000 more, its test part.

    The four files come from `data_dir`, or are downloaded: see `distdl.data.sources.mnist`.

    Source: Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, 1998.
    """
    return _published(MNIST, data_dir)


def fashion_mnist(data_dir: Path | None) -> Dataset:
    """Return Fashion-MNIST: as many images of clothes as MNIST has of digits, of the same form, in ten classes.

    Source: H. Xiao, K. Rasul, R. Vollgraf, *Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms*, 2017, https://github.com/zalandoresearch/fashion-mnist (MIT licence).
    """
    return _published(FASHION_MNIST, data_dir)


def _published(published: Published, data_dir: Path | None) -> Dataset:
    images, labels, test_start = read_published(published, data_dir)
    return Dataset(
        name=published.name,
        images=images[..., np.newaxis],
        labels=labels.astype(np.int64),
        classes=10,
        test_start=test_start,
    )


# ------------------------------------------------------------------------------------------- files of the user's

#: What the path of such a file, or folder, has in front of it, as the name of a data set.
NPZ = "npz:"
FOLDER = "folder:"


def npz(path: Path) -> Dataset:
    """Return the data set in an ``.npz`` file; see `distdl.data.sources.npz` for what it holds.

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


def folder(path: Path) -> Dataset:
    """Return the images in a folder, one folder below it for each class; see `distdl.data.sources.folder`."""
    images, labels, classes, test_start = read_folder(path)
    return Dataset(f"{FOLDER}{path}", images, labels, classes, test_start).checked()


SOURCES: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
}
FROM_PATH: dict[str, Callable[[Path], Dataset]] = {NPZ: npz, FOLDER: folder}
