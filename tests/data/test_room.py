"""A small file that expands a thousandfold is refused before its content is expanded."""

import gzip
import tracemalloc

import numpy as np
import pytest
from bad_inputs import MNIST_FILES, idx_bytes

from distdl.data import room as room_module
from distdl.data.room import Room
from distdl.data.sources import load
from distdl.data.sources.npz import load_images
from distdl.errors import UserError
from distdl.image_options import ImageOptions

SIDE, IMAGES = 512, 40
#: The images and labels, in gigabytes.
NEEDED = SIDE * SIDE * IMAGES / 1e9
PARTS = (IMAGES - 2, IMAGES - 2, 2, 2)


def zeros(count):
    return np.zeros((count, SIDE, SIDE), np.uint8)


def make_npz(folder):
    np.savez_compressed(folder / "x.npz", images=zeros(IMAGES), labels=np.arange(IMAGES) % 2)
    return f"npz:{folder}/x.npz", folder / "x.npz"


def make_mnist(folder):
    for name, count, kind in zip(MNIST_FILES, PARTS, ("images", "labels") * 2, strict=True):
        content = idx_bytes(zeros(count) if kind == "images" else np.arange(count) % 2)
        (folder / name).write_bytes(gzip.compress(content))
    return "mnist", folder


def make_images(folder):
    image_module = pytest.importorskip("PIL.Image")
    for number in range(IMAGES):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        image_module.fromarray(zeros(1)[0]).save(folder / "ab"[number % 2] / f"{number}.png")
    return f"folder:{folder}", folder


@pytest.mark.parametrize("make", [make_npz, make_mnist, make_images])
def test_data_beyond_the_limit_are_refused_in_one_line_before_they_are_in_memory(tmp_path, make, monkeypatch):
    name, path = make(tmp_path)
    size = sum(one.stat().st_size for one in [path, *path.rglob("*")] if one.is_file())
    assert size < NEEDED * 1e9 / 100
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as refused:
            load(name, tmp_path, ImageOptions(data_gigabytes=NEEDED / 4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < NEEDED * 1e9 / 4 + 4e6
    words = ("MB of memory are needed, and at most 2.62 MB are allowed (--data-gigabytes): ", "--data-gigabytes 0.1")
    assert [word for word in words if word not in str(refused.value)] == []
    assert "\n" not in str(refused.value)
    assert len(load(name, tmp_path, ImageOptions(data_gigabytes=2 * NEEDED)).images) == IMAGES


def test_an_array_of_images_to_predict_has_the_same_limit(tmp_path):
    make_npz(tmp_path)
    with pytest.raises(UserError, match=r"x.npz': 10.49 MB of memory are needed, and at most"):
        load_images(f"{tmp_path}/x.npz:images", Room(NEEDED / 4))
    assert len(load_images(f"{tmp_path}/x.npz:images", Room(2 * NEEDED))) == IMAGES


def test_the_limit_is_a_quarter_of_the_available_memory_and_never_more_than_that(monkeypatch):
    monkeypatch.setattr(room_module, "available_bytes", lambda: 8e9)
    monkeypatch.setattr(room_module, "available_to_this_process", lambda: 6e9)
    room = Room()
    room.take("x", 1e9, 1e9)
    with pytest.raises(
        UserError, match=r"^x: 2.00 GB of memory are needed, and at most 1.50 GB are allowed \(a quarter"
    ):
        room.take("x", 1e9, 1e9)
    Room(5.5).take("x", 5e9, 0)
    for limit in (Room(), Room(7.0)):
        with pytest.raises(UserError, match=r"^x: 6.50 GB of memory are needed, but 6.00 GB are available: give"):
            limit.take("x", 6.5e9, 6.5e9)


def test_small_files_may_not_expand_into_gigabytes_on_a_large_host(monkeypatch):
    monkeypatch.setattr(room_module, "available_bytes", lambda: 1e12)
    monkeypatch.setattr(room_module, "available_to_this_process", lambda: 1e12)
    with pytest.raises(UserError, match=r"^x: 2.00 GB .* at most 1.07 GB are allowed \(for 1.90 MB of files\): give"):
        Room().take("x", 2e9, 1.9e6)
    Room().take("x", 1e9, 1.9e6)
    Room().take("x", 2e9, 5e7)
    Room(2).take("x", 2e9, 1.9e6)


def test_images_in_a_cache_take_no_memory(tmp_path):
    (tmp_path / "images").mkdir()
    name, _ = make_images(tmp_path / "images")
    options = ImageOptions(data_gigabytes=NEEDED / 4, cache=tmp_path / "cache")
    assert len(load(name, None, options).images) == IMAGES
