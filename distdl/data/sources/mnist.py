"""MNIST (handwritten digits), Fashion-MNIST (clothes) and KMNIST (Japanese characters): four IDX files each, from a
folder or downloaded.

All have 60,000 images of 28x28 pixels, 0 .. 255, in ten classes, and 10,000 more, their test part.

Sources: Y. LeCun, C. Cortes, C. J. C. Burges, *The MNIST database of handwritten digits*, 1998; H. Xiao, K. Rasul,
R. Vollgraf, *Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms*, 2017,
https://github.com/zalandoresearch/fashion-mnist (MIT licence); T. Clanuwat et al., *Deep learning for classical
Japanese literature*, 2018, https://github.com/rois-codh/kmnist (CC BY-SA 4.0).
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distdl.data.dataset import Dataset
from distdl.data.room import Room
from distdl.data.sources.downloads import Published, download_all
from distdl.data.sources.idx import read_idx
from distdl.errors import DamagedFileError, UserError, quoted

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"

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
KMNIST = Published(
    "kmnist",
    "KMNIST",
    ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
    {
        TRAIN_IMAGES: (18_165_135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
        TRAIN_LABELS: (29_497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
        TEST_IMAGES: (3_041_136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
        TEST_LABELS: (5_120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
    },
    ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
)


def load_mnist(data_dir: Path | None, room: Room | None = None) -> Dataset:
    """Return MNIST."""
    return _load(MNIST, data_dir, room)


def load_fashion_mnist(data_dir: Path | None, room: Room | None = None) -> Dataset:
    """Return Fashion-MNIST."""
    return _load(FASHION_MNIST, data_dir, room)


def load_kmnist(data_dir: Path | None, room: Room | None = None) -> Dataset:
    """Return KMNIST."""
    return _load(KMNIST, data_dir, room)


def _load(published: Published, data_dir: Path | None, room: Room | None) -> Dataset:
    """Read the four files from `data_dir`, each plain or gzipped (``.gz``); without `data_dir` download them.

    The files of a folder may hold any valid IDX data. Downloads stay in the user's cache folder; their sha256 is
    checked at every start. Raises `UserError` if a file cannot be read or does not fit the others, `DamagedFileError`
    if a file is damaged.
    """
    paths = download_all(published) if data_dir is None else _find_in(data_dir, published)
    room = room or Room()
    train_images, train_labels = _read_pair(paths[0], paths[1], room)
    test_images, test_labels = _read_pair(paths[2], paths[3], room)
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


def _read_pair(images_path: Path, labels_path: Path, room: Room) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the images (N, H, W) and the labels (N,) of one part."""
    images = read_idx(images_path, kind="images", room=room)
    labels = read_idx(labels_path, kind="labels", room=room)
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
    """Return the paths of the four files in a folder, or in the folder ``raw`` of torchvision in it."""
    try:
        list(data_dir.iterdir())
    except OSError as error:
        raise UserError(
            f"the data folder {quoted(data_dir)} cannot be read ({error.strerror or error}): "
            f"expected a folder with the four {published.title} files; give another --data-dir"
        ) from error
    plain = [name.removesuffix(".gz") for name in published.files]
    folders = (data_dir, data_dir / "raw", data_dir / published.title.replace("-", "") / "raw")
    found = [[_find(folder, name) for name in plain] for folder in folders]
    paths = max(found, key=lambda of_folder: sum(path is not None for path in of_folder))
    missing = [name for name, path in zip(plain, paths, strict=True) if path is None]
    if missing:
        raise UserError(
            f"the data folder {quoted(data_dir)} lacks {', '.join(missing)}: expected the four {published.title} "
            "files, plain or gzipped (.gz at the end of the name); give another --data-dir, or none to download them"
        )
    return [path for path in paths if path is not None]


def _find(folder: Path, name: str) -> Path | None:
    """Return the path of a file in a folder, plain or gzipped; None if there is none.

    Some copies are named ``train-images.idx3-ubyte``, or have a folder with the name of the file.
    """
    try:
        present = {path.name.lower(): path for path in sorted(folder.iterdir()) if not path.is_dir()}
    except OSError:
        return None
    other = name.replace("-idx", ".idx")
    return next((present[one] for one in (name, f"{name}.gz", other, f"{other}.gz") if one in present), None)
