"""Images in a mapped cache are the images that would be in memory, decoded once."""

import json

import numpy as np
import pytest

from distdl.data import PreparedDataset
from distdl.data.sources import images as images_module
from distdl.data.sources import load
from distdl.errors import DamagedFileError, UserError
from distdl.image_options import ImageOptions

Image = pytest.importorskip("PIL.Image")


def make_folder(path, modes=("RGB", "L")):
    random = np.random.default_rng(0)
    for label, mode in zip("ab", modes, strict=True):
        (path / label).mkdir(parents=True)
        for k in range(12):
            pixels = random.integers(0, 256, (6, 7, 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(path / label / f"{k:02}.png")


def read(tmp_path, **options):
    return load(f"folder:{tmp_path / 'images'}", None, ImageOptions(**options))


@pytest.mark.parametrize("modes", [("RGB", "RGB"), ("L", "L"), ("L", "RGB")])
@pytest.mark.parametrize("resize", [None, "5x4"])
def test_cached_images_equal_those_in_memory(modes, resize, tmp_path):
    make_folder(tmp_path / "images", modes)
    plain, cached = read(tmp_path, resize=resize), read(tmp_path, resize=resize, cache=tmp_path / "cache")
    assert isinstance(cached.images, np.memmap)
    assert not isinstance(plain.images, np.memmap)
    assert PreparedDataset.prepare(cached, 0).sha256() == PreparedDataset.prepare(plain, 0).sha256()
    first, second = (PreparedDataset.prepare(one, 0).signature() for one in (plain, cached))
    assert first == second


def test_a_second_start_decodes_nothing_and_other_content_is_decoded(tmp_path, monkeypatch):
    make_folder(tmp_path / "images")
    cache = tmp_path / "cache"
    said = []
    before = read(tmp_path, cache=cache, say=said.append)
    [path] = cache.glob("*.npy")
    assert said == [f"--cache: decoding 24 image files into {path}; later starts use it"]
    with monkeypatch.context() as patch:
        patch.setattr(images_module, "decode", None)
        again = read(tmp_path, cache=cache, say=said.append)
        assert said[1:] == [f"--cache: {path} has the images; no file is decoded"]
        (tmp_path / "images").rename(tmp_path / "moved")
        moved = load(f"folder:{tmp_path / 'moved'}", None, ImageOptions(cache=cache))
    assert before.sha256() == again.sha256() == moved.sha256()
    (tmp_path / "moved").rename(tmp_path / "images")
    Image.new("RGB", (7, 6), (1, 2, 3)).save(tmp_path / "images" / "a" / "00.png")
    assert (read(tmp_path, cache=cache).images[0] == [1, 2, 3]).all()
    assert len(list(cache.glob("*.npy"))) == 2


def test_files_left_out_stay_left_out(tmp_path):
    make_folder(tmp_path / "images")
    broken = tmp_path / "images" / "b" / "03.png"
    broken.write_bytes(broken.read_bytes()[:80])
    with pytest.raises(DamagedFileError, match=r"03\.png"):
        read(tmp_path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy*"))
    plain = read(tmp_path, skip_damaged=True)
    for _ in range(2):
        cached = read(tmp_path, skip_damaged=True, cache=tmp_path / "cache")
        assert cached.sha256() == plain.sha256()
        assert cached.notes == plain.notes
        assert len(cached.images) == 23


def test_a_damaged_file_with_colors_leaves_gray_images_gray(tmp_path):
    make_folder(tmp_path / "images", ("L", "L"))
    random = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    broken = tmp_path / "images" / "b" / "03.png"
    Image.fromarray(random).save(broken)
    broken.write_bytes(broken.read_bytes()[:80])
    plain = read(tmp_path, skip_damaged=True)
    for _ in range(2):
        cached = read(tmp_path, skip_damaged=True, cache=tmp_path / "cache")
        assert cached.images.shape == plain.images.shape == (23, 6, 7, 1)
        assert cached.sha256() == plain.sha256()
    [kept] = (tmp_path / "cache").glob("*.npy*")
    assert np.load(kept).shape[-1] == 1


def test_a_file_that_is_no_image_is_refused_or_listed_as_without_a_cache(tmp_path):
    make_folder(tmp_path / "images")
    (tmp_path / "images" / "b" / "03.png").write_bytes(b"\0\0")
    read(tmp_path, skip_damaged=True, cache=tmp_path / "cache")
    (tmp_path / "images" / "b" / "03.png").unlink()
    read(tmp_path, cache=tmp_path / "cache")
    (tmp_path / "images" / "a" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt"):
        read(tmp_path, cache=tmp_path / "cache")
    for name in ("images", "moved"):
        (tmp_path / "images").rename(tmp_path / name)
        plain, cached = (
            load(f"folder:{tmp_path / name}", None, ImageOptions(skip_damaged=True, cache=cache))
            for cache in (None, tmp_path / "cache")
        )
        assert cached.skipped_files == plain.skipped_files
        assert name in plain.skipped_files[0]


@pytest.mark.parametrize("damage", ["facts lost", "images lost", "images cut", "facts cut"])
def test_a_damaged_cache_is_made_again(damage, tmp_path):
    make_folder(tmp_path / "images")
    before = read(tmp_path, cache=tmp_path / "cache").sha256()
    [images], [facts] = ((tmp_path / "cache").glob(f"*.{kind}") for kind in ("npy", "json"))
    path = images if damage.startswith("images") else facts
    if damage.endswith("lost"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    assert read(tmp_path, cache=tmp_path / "cache").sha256() == before
    assert json.loads(facts.read_text())[0] == list(range(24))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    make_folder(tmp_path / "images")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write images to .*file"):
        read(tmp_path, cache=tmp_path / "file")
