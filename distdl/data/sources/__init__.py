"""The datasets by name: `load` returns one as a `Dataset`.

To add a dataset, write a function that returns a `Dataset` in a file of its own, and list it below and in `config.py`.
"""

from collections.abc import Callable
from pathlib import Path

from distdl.data.dataset import Dataset
from distdl.data.room import Room
from distdl.data.sources.cifar10 import load_cifar10
from distdl.data.sources.csv_file import load_csv
from distdl.data.sources.digits import load_digits
from distdl.data.sources.folder import load_folder
from distdl.data.sources.mnist import load_fashion_mnist, load_kmnist, load_mnist
from distdl.data.sources.npz import load_npz
from distdl.errors import unknown_name
from distdl.image_options import ImageOptions

__all__ = ["FROM_PATH", "SOURCES", "Dataset", "load"]

#: The datasets with a name. Their arguments are ``--data-dir`` and the memory for them.
SOURCES: dict[str, Callable[[Path | None, Room], Dataset]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "kmnist": load_kmnist,
    "cifar10": load_cifar10,
}
#: The datasets at a path, by the prefix of the path.
FROM_PATH: dict[str, Callable[[Path, ImageOptions], Dataset]] = {
    "npz:": lambda path, options: load_npz(path, Room(options.data_gigabytes)),
    "folder:": load_folder,
    "csv:": load_csv,
}


def load(name: str, data_dir: Path | None, options: ImageOptions | None = None) -> Dataset:
    """Return the dataset of that name; ``npz:FILE``, ``folder:PATH`` and ``csv:FILE`` name a user's own.

    `data_dir` is the folder with the files of a published dataset; None: download them. `options` are for image files,
    except their limit of memory.

    Raises `UserError` if the name is unknown or a file cannot be read, `DamagedFileError` if a file is damaged.

    >>> load("digits", None).images.shape
    (1797, 8, 8, 1)
    """
    options = options or ImageOptions()
    for prefix, load_path in FROM_PATH.items():
        if name.startswith(prefix):
            return load_path(Path(name.removeprefix(prefix)), options)
    if name not in SOURCES:
        raise unknown_name("dataset", name, SOURCES)
    return SOURCES[name](data_dir, Room(options.data_gigabytes))
