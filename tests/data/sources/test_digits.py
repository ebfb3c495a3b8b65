"""The digits that are part of the package."""

from importlib import resources

import numpy as np
import pytest

from distdl.data.sources import digits, load
from distdl.errors import DamagedFileError


def test_digits_are_the_published_ones():
    data = load("digits", None)
    assert data.name == "digits"
    assert (data.images.shape, data.images.dtype) == ((1797, 8, 8, 1), np.uint8)
    assert (data.labels.shape, data.labels.dtype) == ((1797,), np.int64)
    assert (data.classes, data.test_start) == (10, None)
    # Per class, as the UCI repository lists the test part.
    assert np.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (data.images.min(), data.images.max()) == (0, 16)
    # The first two rows of the first image, a zero.
    assert data.images[0, :2, :, 0].tolist() == [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    assert data.labels[:10].tolist() == list(range(10))


def test_digits_come_with_their_licence():
    licence = (resources.files("distdl.data.sources") / "DIGITS-LICENSE.txt").read_text()
    assert "Alpaydin" in licence
    assert "CC BY 4.0" in licence


def test_altered_digits_are_never_loaded(tmp_path, monkeypatch):
    content = bytearray((resources.files("distdl.data.sources") / "digits.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "digits.npz").write_bytes(content)
    monkeypatch.setattr(digits.resources, "files", lambda _package: tmp_path)
    with pytest.raises(DamagedFileError, match="is damaged: its sha256 is") as caught:
        load("digits", None)
    assert str(tmp_path) in str(caught.value)


def test_missing_digits_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(digits.resources, "files", lambda _package: tmp_path)
    with pytest.raises(DamagedFileError, match="install distdl-mpi again") as caught:
        load("digits", None)
    assert str(tmp_path / "digits.npz") in str(caught.value)
