"""MNIST, and the data sets published in its form and under its names: four IDX files, from a folder or downloaded."""

from __future__ import annotations

import functools
import importlib
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.sources.idx import quoted, read_idx
from distdl.errors import DamagedFileError, UserError

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
"""In the order in which they are read."""
#: How every address starts that a download is asked from or sent on to.
DOWNLOADS_FROM = "https://"
MOST_REDIRECTS = 5
TIMEOUT_SECONDS = 30
BLOCK_BYTES = 2**16


@dataclass(frozen=True)
class Published:
    """Four gzipped files as they were first published, and where they are to be had."""

    name: str
    title: str
    mirrors: tuple[str, ...]
    sha256: dict[str, str]
    sizes: dict[str, int]
    """Bytes of each."""


MNIST = Published(
    "mnist",
    "MNIST",
    (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    dict(zip(FILES, (9_912_422, 28_881, 1_648_877, 4_542), strict=True)),
)
FASHION_MNIST = Published(
    "fashion-mnist",
    "Fashion-MNIST",
    (
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    dict(zip(FILES, (26_421_880, 29_515, 4_422_102, 5_148), strict=True)),
)


def read_published(published: Published, data_dir: Path | None) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
    """Return images (N, H, W) and labels (N,), and the row from which on they are the test part.

    With `data_dir`, the four files are read from there, each as it is or gzipped (with ``.gz`` behind its name);
    whatever valid IDX files bear those names are taken. Without, the gzipped files are downloaded once into the
    user's cache folder, and their sha256 compared at every start.

    Raises `UserError` where a file is not to be had or does not fit the others, `DamagedFileError` if damaged.
    """
    paths = _downloaded(published) if data_dir is None else _found_in(data_dir, published.title)
    train_images, train_labels = _pair(paths[0], paths[1])
    test_images, test_labels = _pair(paths[2], paths[3])
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{quoted(paths[2])} has images of shape {test_images.shape[1:]}, "
            f"expected {train_images.shape[1:]} as in {quoted(paths[0])}; give files of one data set"
        )
    images, labels = np.concatenate([train_images, test_images]), np.concatenate([train_labels, test_labels])
    return images, labels, len(train_labels)


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


def _found_in(data_dir: Path, title: str) -> list[Path]:
    """Return the paths of the four files in a folder."""
    try:
        present = {path.name for path in data_dir.iterdir()}
    except OSError as error:
        raise UserError(
            f"the data folder {quoted(data_dir)} cannot be read ({error.strerror or error}): "
            f"expected a folder with the four {title} files; give another --data-dir"
        ) from error
    paths, missing = [], []
    for compressed in FILES:
        plain = compressed.removesuffix(".gz")
        name = next((name for name in (plain, compressed) if name in present), None)
        if name is None:
            missing.append(plain)
        else:
            paths.append(data_dir / name)
    if missing:
        raise UserError(
            f"the data folder {quoted(data_dir)} lacks {', '.join(missing)}: expected the four {title} files, "
            "each as it is or with .gz behind its name; give another --data-dir, or none to download them"
        )
    return paths


def _downloaded(published: Published) -> list[Path]:
    """Return the paths of the four files in the user's cache folder, downloading those not there yet."""
    try:
        pooch = importlib.import_module("pooch")
    except ImportError as error:
        raise UserError(
            f"downloading {published.title} needs pooch, which is not installed: pip install 'distdl-mpi[data]', "
            "or give the folder with the four files by --data-dir"
        ) from error
    return [_download(pooch, published, name) for name in FILES]


def _download(pooch: Any, published: Published, name: str) -> Path:
    """Return the path of one file, from the cache or from the first mirror that has it intact."""
    cache = pooch.os_cache("distdl") / published.name
    failures = []
    for mirror in published.mirrors:
        try:
            fetch = functools.partial(_fetch, published.sizes[name])
            pinned = f"sha256:{published.sha256[name]}"
            return Path(pooch.retrieve(mirror + name, known_hash=pinned, fname=name, path=cache, downloader=fetch))
        except (OSError, ValueError) as error:  # the network or the disk; another sha256
            failures.append(f"{mirror}: {textwrap.shorten(str(error), 160)}")
    raise UserError(
        f"{name} could not be downloaded to {quoted(cache)} ({'; '.join(failures)}): expected network access "
        f"and room there; or fetch the four {published.title} files elsewhere and give their folder by --data-dir"
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
