"""The handwritten digits that are part of this package.

Source: the test part of E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, in the copy that scikit-learn distributes. The licence is CC BY 4.0
(see DIGITS-LICENSE.txt in this folder).
"""

import hashlib
import io
from importlib import resources
from pathlib import Path

import numpy as np

from distdl.data.dataset import Dataset
from distdl.data.room import Room
from distdl.errors import DamagedFileError

SHA256 = "516461765719e9f81b246f52d21473a2e9006efb68053ba7c60c53a89fe9dcb6"


def load_digits(_data_dir: Path | None = None, _room: Room | None = None) -> Dataset:
    """Return 1,797 handwritten digits of 8x8 pixels, 0 .. 16; raise `DamagedFileError`."""
    file = resources.files("distdl.data.sources") / "digits.npz"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedFileError(
            f"{str(file)!r} cannot be read: {error.strerror or error}; install distdl-mpi again"
        ) from error
    # The hash is compared before anything is decoded. So nothing in the file has to be trusted.
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DamagedFileError(
            f"{str(file)!r} is damaged: its sha256 is {found}, expected {SHA256}; install distdl-mpi again"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return Dataset("digits", arrays["images"], arrays["labels"].astype(np.int64), classes=10, test_start=None)
