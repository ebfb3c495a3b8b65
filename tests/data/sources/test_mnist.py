"""MNIST and Fashion-MNIST, from a folder or by download.

Tests must not need internet access. So they test the whole download, pooch and HTTP included, from servers on this
machine, with small files of the same names. No test checks that the real mirrors hold the files with the pinned sha256.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import os
import struct
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distdl.data.sources import downloads, load, mnist
from distdl.errors import DamagedFileError, UserError


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def idx_bytes(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


TRAIN_IMAGES = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
TRAIN_LABELS = np.array([0, 9, 2, 3, 4, 5], np.uint8)
TEST_IMAGES = 255 - np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
TEST_LABELS = np.array([7, 8], np.uint8)


def write_mnist(folder, compressed=(), **replaced):
    """Write four small files with the names of MNIST; gzip those in `compressed`."""
    arrays = {
        "train_images": ("train-images-idx3-ubyte", TRAIN_IMAGES),
        "train_labels": ("train-labels-idx1-ubyte", TRAIN_LABELS),
        "test_images": ("t10k-images-idx3-ubyte", TEST_IMAGES),
        "test_labels": ("t10k-labels-idx1-ubyte", TEST_LABELS),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for key, (name, array) in arrays.items():
        content = idx_bytes(replaced.get(key, array))
        if key in compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name).write_bytes(content)
    return folder


ALL = ("train_images", "train_labels", "test_images", "test_labels")


def assert_is_the_small_mnist(dataset):
    assert dataset.name == "mnist"
    assert (dataset.classes, dataset.test_start) == (10, 6)
    assert (dataset.images.dtype, dataset.labels.dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(dataset.images[:6, ..., 0], TRAIN_IMAGES)
    np.testing.assert_array_equal(dataset.images[6:, ..., 0], TEST_IMAGES)
    assert dataset.images.shape == (8, 4, 3, 1)
    assert dataset.labels.tolist() == [0, 9, 2, 3, 4, 5, 7, 8]


# ---------------------------------------------------------------------------------------- MNIST from a folder


@pytest.mark.parametrize("compressed", [(), ALL, ("train_images", "test_labels")], ids=["plain", "gzip", "mixed"])
def test_training_rows_come_first_then_the_test_part(tmp_path, compressed):
    assert_is_the_small_mnist(load("mnist", write_mnist(tmp_path, compressed)))


def test_fashion_mnist_is_read_like_mnist_and_keeps_its_own_name(tmp_path):
    dataset = load("fashion-mnist", write_mnist(tmp_path))
    assert dataset.name == "fashion-mnist"
    assert_is_the_small_mnist(replace(dataset, name="mnist"))
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="the four Fashion-MNIST files"):
        load("fashion-mnist", tmp_path)


def test_files_are_only_read(tmp_path):
    write_mnist(tmp_path, ALL)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    load("mnist", tmp_path)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_missing_files_are_listed_with_the_folder(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(UserError) as caught:
        load("mnist", tmp_path)
    message = one_line(caught)
    assert f"{str(tmp_path)!r} lacks train-labels-idx1-ubyte, t10k-images-idx3-ubyte:" in message
    assert "--data-dir" in message
    assert "train-images" not in message


def test_a_missing_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder, reason in (("nowhere", "No such file"), ("file", "Not a directory")):
        with pytest.raises(UserError, match=reason) as caught:
            load("mnist", tmp_path / folder)
        assert str(tmp_path / folder) in one_line(caught)
        assert not isinstance(caught.value, DamagedFileError)


@pytest.mark.parametrize(
    ("dataset", "place", "rename"),
    [
        ("mnist", "raw", str),
        ("mnist", "MNIST/raw", str),
        ("fashion-mnist", "FashionMNIST/raw", str),
        ("kmnist", "KMNIST/raw", str),
        ("mnist", ".", lambda name: name.replace("-idx", ".idx")),
        ("mnist", ".", lambda name: name.replace(".gz", ".GZ")),
        ("kmnist", "raw", lambda name: name.replace("-idx", ".idx")),
    ],
)
def test_files_under_other_usual_names_are_found(dataset, place, rename, tmp_path):
    write_mnist(tmp_path / "written", ["train_images", "test_labels"])
    folder = tmp_path / "data" / place
    folder.mkdir(parents=True)
    for file in (tmp_path / "written").iterdir():
        file.rename(folder / rename(file.name))
    data = load(dataset, tmp_path / "data")
    assert np.array_equal(data.images[..., 0], np.concatenate([TRAIN_IMAGES, TEST_IMAGES]))
    assert (data.name, data.test_start) == (dataset, 6)


def test_a_folder_with_the_name_of_a_file_is_not_taken_for_it(tmp_path):
    for file in list(write_mnist(tmp_path).iterdir()):
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
        (tmp_path / file.name).mkdir()
    assert len(load("mnist", tmp_path).images) == 8


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read every folder, so the refusal is simulated
    with pytest.raises(UserError, match="Permission denied") as caught:
        load("mnist", tmp_path)
    assert str(tmp_path) in one_line(caught)


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"train_labels": TRAIN_LABELS[:5]}, ["train-labels", "5 labels, expected 6", "train-images"]),
        ({"test_images": TEST_IMAGES[:1]}, ["t10k-labels", "2 labels, expected 1", "t10k-images"]),
        ({"test_images": TEST_IMAGES[:, :2]}, ["t10k-images", "(2, 3)", "(4, 3)", "train-images"]),
    ],
    ids=["training labels", "test images", "image size"],
)
def test_files_that_do_not_belong_together_are_named(tmp_path, replaced, words):
    with pytest.raises(UserError) as caught:
        load("mnist", write_mnist(tmp_path, **replaced))
    assert not isinstance(caught.value, DamagedFileError)
    message = one_line(caught)
    for word in words:
        assert word in message


def test_a_label_beyond_nine_is_damage(tmp_path):
    write_mnist(tmp_path, train_labels=np.array([0, 1, 2, 10, 3, 4], np.uint8))
    with pytest.raises(DamagedFileError, match="sample 3 has label 10, expected 0 to 9") as caught:
        load("mnist", tmp_path)
    assert "train-labels-idx1-ubyte" in one_line(caught)


def test_a_damaged_file_is_named(tmp_path):
    write_mnist(tmp_path)
    os.truncate(tmp_path / "t10k-images-idx3-ubyte", 30)
    with pytest.raises(DamagedFileError, match="30 bytes") as caught:
        load("mnist", tmp_path)
    assert "t10k-images-idx3-ubyte" in one_line(caught)


# ------------------------------------------------------------------------------------------ MNIST by download


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args):
        pass


@contextmanager
def served(folder):
    """Serve a folder over HTTP on this machine, like a mirror."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Pin the sha256 of a folder's gzipped files instead of MNIST's; start with an empty cache folder."""
    pytest.importorskip("pooch", reason="pooch is not installed: pip install 'distdl-mpi[data]'")
    folder = write_mnist(tmp_path / "mirror", ALL)
    contents = {name: (folder / name).read_bytes() for name in mnist.MNIST.files}
    files = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()}
    for name in ("MNIST", "FASHION_MNIST", "KMNIST"):
        monkeypatch.setattr(mnist, name, replace(getattr(mnist, name), files=files))
    monkeypatch.setattr(downloads, "DOWNLOADS_FROM", "http://127.0.0.1")  # only HTTPS except in these tests
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return folder


def ask(monkeypatch, *urls):
    """Make these the mirrors."""
    for name in ("MNIST", "FASHION_MNIST", "KMNIST"):
        monkeypatch.setattr(mnist, name, replace(getattr(mnist, name), mirrors=urls))


def test_downloaded_files_are_kept_in_the_cache(mirror, tmp_path, monkeypatch):
    with served(mirror) as url:
        ask(monkeypatch, url)
        assert_is_the_small_mnist(load("mnist", None))
    assert len(list((tmp_path / "cache" / "distdl" / "mnist").iterdir())) == 4
    assert_is_the_small_mnist(load("mnist", None))  # the server is gone
    with pytest.raises(UserError, match="could not be downloaded"):
        load("fashion-mnist", None)  # the same names, in another folder of the cache
    with served(mirror) as url:
        ask(monkeypatch, url)
        load("fashion-mnist", None)
    assert len(list((tmp_path / "cache" / "distdl" / "fashion-mnist").iterdir())) == 4


def test_a_file_that_a_mirror_lacks_or_altered_comes_from_the_next(mirror, tmp_path, monkeypatch):
    broken = write_mnist(tmp_path / "broken", ALL, train_images=TRAIN_IMAGES + 1)
    (broken / "t10k-labels-idx1-ubyte.gz").unlink()
    with served(broken) as first, served(mirror) as second:
        ask(monkeypatch, first, second)
        assert_is_the_small_mnist(load("mnist", None))


def test_a_file_altered_in_the_cache_is_downloaded_again(mirror, tmp_path, monkeypatch):
    with served(mirror) as url:
        ask(monkeypatch, url)
        load("mnist", None)
        (tmp_path / "cache" / "distdl" / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"altered")
        assert_is_the_small_mnist(load("mnist", None))


@pytest.mark.usefixtures("mirror")
def test_a_download_that_fails_everywhere_names_the_remedy(tmp_path, monkeypatch):
    with served(tmp_path / "empty") as first, served(write_mnist(tmp_path / "altered")) as second:
        pass
    with served(tmp_path / "empty") as third:
        ask(monkeypatch, first, second, third)
        with pytest.raises(UserError) as caught:
            load("mnist", None)
    message = one_line(caught)
    assert message.startswith("train-images-idx3-ubyte.gz could not be downloaded")
    assert "--data-dir" in message
    assert "404" in message
    for url in (first, second, third):
        assert url in message


@pytest.mark.usefixtures("mirror")
def test_a_long_reason_for_a_failed_download_is_cut_to_one_line(monkeypatch):
    def fail(*_args, **_settings):
        raise ConnectionError("Max retries exceeded\n" * 100)

    monkeypatch.setattr("pooch.retrieve", fail)
    with pytest.raises(UserError, match="Max retries exceeded") as caught:
        load("mnist", None)
    assert len(one_line(caught)) < 1000


def test_a_read_only_cache_names_the_remedy(mirror, tmp_path, monkeypatch):
    (tmp_path / "cache").touch()  # a file instead of the folder
    with served(mirror) as url:
        ask(monkeypatch, url)
        with pytest.raises(UserError, match="could not be downloaded") as caught:
            load("mnist", None)
    assert str(tmp_path / "cache") in one_line(caught)


def test_without_pooch_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(UserError, match=r"pip install 'distdl-mpi\[data\]'") as caught:
        load("mnist", None)
    assert "--data-dir" in one_line(caught)


class Misbehaving(QuietHandler):
    """Answers every request by calling `answer`."""

    answer = None
    asked = 0

    def do_GET(self):
        type(self).asked += 1
        self.answer(self)


@contextmanager
def misbehaving(answer):
    handler = type("Handler", (Misbehaving,), {"answer": staticmethod(answer), "asked": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", handler
        finally:
            server.shutdown()
            thread.join()


def refusal_of(url, monkeypatch):
    ask(monkeypatch, url)
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        load("mnist", None)
    return one_line(caught)


@pytest.mark.usefixtures("mirror")
def test_an_endless_download_stops_at_the_first_byte_too_many(tmp_path, monkeypatch):
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while len(sent) < 10_000:  # 640 MB
                handler.wfile.write(bytes(2**16))
                sent.append(1)
        except OSError:
            pass

    with misbehaving(endless) as (url, _):
        size = mnist.MNIST.files["train-images-idx3-ubyte.gz"][0]
        assert f"longer than the {size} bytes" in refusal_of(url, monkeypatch)
    assert len(sent) < 1000
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_download_that_ends_early_is_refused(mirror, tmp_path, monkeypatch):
    def torn(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write((mirror / handler.path[1:]).read_bytes()[:-3])

    with misbehaving(torn) as (url, _):
        assert "ends 3 of" in refusal_of(url, monkeypatch)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.usefixtures("mirror")
def test_a_redirect_away_from_https_is_not_followed(monkeypatch):
    def ok(handler):
        handler.send_response(200)
        handler.end_headers()

    with misbehaving(ok) as (plain, visited):
        elsewhere = plain.replace("127.0.0.1", "localhost")  # plays the part of http://

        def leads_away(handler):
            handler.send_response(302)
            handler.send_header("Location", elsewhere)
            handler.end_headers()

        with misbehaving(leads_away) as (url, asked):
            assert f"it redirects to {elsewhere}" in refusal_of(url, monkeypatch)
        assert (asked.asked, visited.asked) == (1, 0)


@pytest.mark.usefixtures("mirror")
def test_endless_redirects_are_refused(monkeypatch):
    def circles(handler):
        handler.send_response(302)
        handler.send_header("Location", handler.path)
        handler.end_headers()

    with misbehaving(circles) as (url, asked):
        assert "redirects more than 5 times" in refusal_of(url, monkeypatch)
    assert asked.asked == 5


@pytest.mark.parametrize("published", [mnist.MNIST, mnist.FASHION_MNIST, mnist.KMNIST], ids=lambda one: one.name)
def test_every_mirror_is_reached_over_https_and_every_file_is_pinned(published):
    assert downloads.DOWNLOADS_FROM == "https://"
    assert list(published.files) == list(mnist.MNIST.files)
    assert len(published.mirrors) >= (1 if published is mnist.KMNIST else 2)
    assert all(url.startswith("https://") and url.endswith("/") for url in published.mirrors)
    sizes, digests = zip(*published.files.values(), strict=True)
    assert min(sizes) > 4000
    assert len(set(digests)) == len(digests) == 4
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)


# --------------------------------------------------------------------------------------------- the true MNIST


@pytest.fixture(scope="module")
def true_mnist():
    beside = Path(__file__).parents[3].parent / "shared" / "data" / "mnist"
    folder = Path(os.environ.get("DISTDL_MNIST_DIR", beside))
    if not folder.is_dir():
        pytest.skip(f"no MNIST files in {folder}: set DISTDL_MNIST_DIR to their folder")
    return load("mnist", folder)


def test_the_true_mnist_is_read_whole(true_mnist):
    assert (true_mnist.images.shape, true_mnist.images.dtype) == ((70000, 28, 28, 1), np.uint8)
    assert (true_mnist.classes, true_mnist.test_start) == (10, 60000)
    # The sha256 of the four published files, decompressed; they do not depend on the compressor.
    training, test = np.split(true_mnist.images[..., 0], [60000])
    training_labels, test_labels = np.split(true_mnist.labels.astype(np.uint8), [60000])
    assert [hashlib.sha256(idx_bytes(part)).hexdigest() for part in (training, training_labels, test, test_labels)] == [
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ]


def test_the_true_mnist_has_the_known_mean_and_deviation(true_mnist):
    # Known from the literature: 0.1307 and 0.3081 of 255.
    training = true_mnist.images[:60000]
    assert training.mean() / 255 == pytest.approx(0.13066, abs=5e-6)
    assert training.std() / 255 == pytest.approx(0.30811, abs=5e-6)


def test_the_true_mnist_has_the_known_number_of_each_digit(true_mnist):
    training, test = np.split(true_mnist.labels, [60000])
    assert np.bincount(training).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert training[:5].tolist() == [5, 0, 4, 1, 9]
    assert test[:5].tolist() == [7, 2, 1, 0, 4]
