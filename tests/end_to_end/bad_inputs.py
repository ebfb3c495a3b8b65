"""Shared by the tests of bad input: tiny MNIST folders, and pictures of a folder to compare."""

import hashlib
import os
import random
import stat
import struct
from pathlib import Path

import numpy as np

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
MNIST_FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

#: Flags of a training that takes a hundredth of a second, if it starts by mistake.
TINY = ["--model", "mlp", "--batch-size", "8", "--micro-batch-size", "4", "--epochs", "2"]

#: Larger files are compared by size and time instead of by content.
COMPARED_BYTES = 2**20


def idx_bytes(array, declared=None):
    """Return an IDX file of bytes. Its header may declare another shape."""
    shape = array.shape if declared is None else declared
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + array.astype(np.uint8).tobytes()


def mnist_files(training=20, test=5, height=4, width=4):
    """Return the four files of a small MNIST, {name: bytes}."""
    rng = random.Random(f"{training} {test} {height} {width}")

    def random_array(*shape, below=256):
        count = int(np.prod(shape))
        return np.array([rng.randrange(below) for _ in range(count)]).reshape(shape)

    return {
        TRAIN_IMAGES: idx_bytes(random_array(training, height, width)),
        TRAIN_LABELS: idx_bytes(random_array(training, below=10)),
        TEST_IMAGES: idx_bytes(random_array(test, height, width)),
        TEST_LABELS: idx_bytes(random_array(test, below=10)),
    }


def write_files(folder, files):
    """Write the files into a folder, create it if necessary, and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def picture(folder):
    """Return the state of every file and folder below `folder`. Any change gives another picture."""
    seen = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(root) / name
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                seen[str(path)] = stat.S_IFMT(status.st_mode)
            elif status.st_size > COMPARED_BYTES:
                seen[str(path)] = (status.st_size, status.st_mtime_ns)
            else:
                seen[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return seen


def changes(before, after):
    """Return the differences between two pictures, as texts."""
    return [
        f"{'new' if path not in before else 'removed' if path not in after else 'changed'}: {path}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def without_launcher(environment):
    """Return the environment without the variables of any launcher."""
    prefixes = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_", "HYDRA_", "MPIR_")
    return {name: value for name, value in environment.items() if not name.startswith(prefixes)}
