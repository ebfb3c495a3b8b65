"""MNIST (handwritten digits) and Fashion-MNIST (clothes): four IDX files each, from a folder or downloaded.

Both have 60,000 images of 28x28 pixels, 0 .. 255, in ten classes, and 10,000 more, their test part.

Sources: Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, 1998; H. Xiao, K. Rasul,
R. Vollgraf, *Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms*, 2017,
https://github.com/zalandoresearch/fashion-mnist (MIT licence).
"""

import functools
import importlib
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.dataset import Dataset
from distdl.data.sources.idx import read_idx
from distdl.errors import DamagedFileError, UserError, quoted

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
#: The start of every URL of a download, redirects included.
DOWNLOADS_FROM = "https://"
MOST_REDIRECTS = 5
TIMEOUT_SECONDS = 30
BLOCK_BYTES = 2**16


@dataclass(frozen=True)
class Published:
    """A dataset of four gzipped files, as first published, and its mirrors."""

    name: str
    title: str
    mirrors: tuple[str, ...]
    files: dict[str, tuple[int, str]]
    """Bytes and sha256 of each file, in the order in which they are read."""
    class_names: tuple[str, ...] | None = None
    """None: the classes are the digits."""


MNIST = Published(
    "mnist",
    "MNIST",
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    {
        TRAIN_IMAGES: (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        TRAIN_LABELS: (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        TEST_IMAGES: (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        TEST_LABELS: (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    },
)
FASHION_MNIST = Published(
    "fashion-mnist",
    "Fashion-MNIST",
    (
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    {
        TRAIN_IMAGES: (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        TRAIN_LABELS: (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        TEST_IMAGES: (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        TEST_LABELS: (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    },
    (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
)


def load_mnist(data_dir: Path | None) -> Dataset:
    """Return MNIST."""
    return _load(MNIST, data_dir)


def load_fashion_mnist(data_dir: Path | None) -> Dataset:
    """Return Fashion-MNIST."""
    return _load(FASHION_MNIST, data_dir)


def _load(published: Published, data_dir: Path | None) -> Dataset:
    """Read the four files from `data_dir`, each plain or gzipped (``.gz``); without `data_dir` download them.

    The files of a folder may hold any valid IDX data. Downloads stay in the user's cache folder; their sha256 is
    checked at every start. Raises `UserError` if a file cannot be read or does not fit the others, `DamagedFileError`
    if a file is damaged.
    """
    paths = _download_all(published) if data_dir is None else _find_in(data_dir, published)
    train_images, train_labels = _read_pair(paths[0], paths[1])
    test_images, test_labels = _read_pair(paths[2], paths[3])
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{quoted(paths[2])} has images of shape {test_images.shape[1:]}, "
            f"expected {train_images.shape[1:]} as in {quoted(paths[0])}; give files of one dataset"
        )
    images, labels = np.concatenate([train_images, test_images]), np.concatenate([train_labels, test_labels])
    return Dataset(
        published.name,
        images[..., np.newaxis],
        labels.astype(np.int64),
        classes=10,
        test_start=len(train_labels),
        class_names=published.class_names,
    )


def _read_pair(images_path: Path, labels_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the images (N, H, W) and the labels (N,) of one part."""
    images = read_idx(images_path, kind="images")
    labels = read_idx(labels_path, kind="labels")
    if len(images) != len(labels):
        raise UserError(
            f"{quoted(labels_path)} has {len(labels)} labels, expected {len(images)}, one for each image of "
            f"{quoted(images_path)}; give files of one dataset"
        )
    if labels.max() > 9:
        raise DamagedFileError(
            f"{quoted(labels_path)} is damaged: sample {labels.argmax()} has label {labels.max()}, "
            "expected 0 to 9; fetch the file again"
        )
    return images, labels


def _find_in(data_dir: Path, published: Published) -> list[Path]:
    """Return the paths of the four files in a folder."""
    try:
        present = {path.name for path in data_dir.iterdir()}
    except OSError as error:
        raise UserError(
            f"the data folder {quoted(data_dir)} cannot be read ({error.strerror or error}): "
            f"expected a folder with the four {published.title} files; give another --data-dir"
        ) from error
    plain = [name.removesuffix(".gz") for name in published.files]
    missing = [name for name in plain if not {name, f"{name}.gz"} & present]
    if missing:
        raise UserError(
            f"the data folder {quoted(data_dir)} lacks {', '.join(missing)}: expected the four {published.title} "
            "files, plain or gzipped (.gz at the end of the name); give another --data-dir, or none to download them"
        )
    return [data_dir / (name if name in present else f"{name}.gz") for name in plain]


def _download_all(published: Published) -> list[Path]:
    """Return the paths of the four files in the user's cache folder; download the missing ones."""
    try:
        pooch = importlib.import_module("pooch")
    except ImportError as error:
        raise UserError(
            f"downloading {published.title} needs pooch, which is not installed: pip install 'distdl-mpi[data]', "
            "or give the folder with the four files by --data-dir"
        ) from error
    return [_download(pooch, published, name) for name in published.files]


def _download(pooch: Any, published: Published, name: str) -> Path:
    """Return the path of one file, from the cache or from the first mirror that has it intact."""
    cache = pooch.os_cache("distdl") / published.name
    size, sha256 = published.files[name]
    fetch = functools.partial(_fetch, size)
    failures = []
    for mirror in published.mirrors:
        try:
            return Path(pooch.retrieve(mirror + name, f"sha256:{sha256}", fname=name, path=cache, downloader=fetch))
        except (OSError, ValueError) as error:  # the internet access or the disk; another sha256
            failures.append(f"{mirror}: {textwrap.shorten(str(error), 160)}")
    raise UserError(
        f"{name} could not be downloaded to {quoted(cache)} ({'; '.join(failures)}): expected internet access and "
        f"free space there; or fetch the four {published.title} files elsewhere and give their folder by --data-dir"
    )


def _fetch(size: int, url: str, output: str, _pooch: Any) -> None:
    """Download exactly `size` bytes from `url` to the file `output`, over HTTPS only, redirects included.

    pooch calls it, and compares the sha256. Raises `OSError` or `ValueError` if the download fails or is too long.
    """
    requests = importlib.import_module("requests")  # pooch needs it too
    with requests.Session() as session:
        for _ in range(MOST_REDIRECTS):
            if not url.startswith(DOWNLOADS_FROM):
                raise ValueError(f"it redirects to {url}, which does not start with {DOWNLOADS_FROM}")
            response = session.get(url, stream=True, timeout=TIMEOUT_SECONDS, allow_redirects=False)
            if not response.is_redirect:
                break
            url = response.next.url
        else:
            raise ValueError(f"it redirects more than {MOST_REDIRECTS} times")
        response.raise_for_status()
        missing = size
        with Path(output).open("wb") as file:
            for block in response.iter_content(BLOCK_BYTES):
                missing -= len(block)
                if missing < 0:
                    raise ValueError(f"it is longer than the {size} bytes expected")
                file.write(block)
        if missing:
            raise ValueError(f"it ends {missing} of {size} bytes early")
