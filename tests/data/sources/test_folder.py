"""A dataset of images in folders: classes in the order of their names; a misplaced file is one line."""

import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distdl import evaluate
from distdl.config import TrainConfig
from distdl.data.sources import load
from distdl.engine import train
from distdl.errors import DamagedFileError, UserError
from distdl.parallel import OneProcess

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'distdl-mpi[images]'")

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (6, 5, 4), np.uint8)
COLORED = RNG.integers(0, 256, (6, 5, 4, 3), np.uint8)
#: In the order of the names, which is not the order of the numbers; the name of the second class sorts later.
NAMES = ("cone/1.png", "cone/10.PNG", "cone/2.bmp", "cowrie/a.png", "cowrie/b.ppm", "cowrie/c.png")


def write(folder, images, names=NAMES):
    for name, image in zip(names, images, strict=True):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return folder


def loaded(folder):
    return load(f"folder:{folder}", None)


@pytest.mark.parametrize("images", [GRAY, COLORED], ids=["gray", "colored"])
def test_classes_are_numbered_by_name_and_images_are_in_the_order_of_names(images, tmp_path):
    data = loaded(write(tmp_path, images))
    assert np.array_equal(data.images, images if images.ndim == 4 else images[..., None])
    assert data.images.dtype == np.uint8
    assert (data.labels.tolist(), data.classes, data.test_start) == ([0, 0, 0, 1, 1, 1], 2, None)
    assert data.name == f"folder:{tmp_path}"


def test_folders_train_and_test_are_the_two_parts(tmp_path):
    names = [f"{part}/{name}" for part in ("train", "test") for name in ("a/1.png", "a/2.png", "b/1.png")]
    data = loaded(write(tmp_path, GRAY, names))
    assert np.array_equal(data.images[..., 0], GRAY)
    assert (data.labels.tolist(), data.classes, data.test_start) == ([0, 0, 1, 0, 0, 1], 2, 3)


def test_one_color_image_gives_all_three_channels_and_transparency_is_ignored(tmp_path):
    write(tmp_path, GRAY)
    Image.fromarray(np.concatenate([COLORED[5], GRAY[0][..., None]], axis=-1)).save(tmp_path / "cowrie/c.png")
    data = loaded(tmp_path)
    assert np.array_equal(data.images[:5], np.repeat(GRAY[:5, ..., None], 3, axis=-1))
    assert np.array_equal(data.images[5], COLORED[5])


def test_hidden_files_and_files_beside_the_classes_are_ignored(tmp_path):
    write(tmp_path, GRAY)
    (tmp_path / "README.txt").write_text("shells")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cone/.DS_Store").write_text("")
    assert len(loaded(tmp_path).images) == 6


def refusal(folder, kind=UserError):
    with pytest.raises(UserError) as caught:
        loaded(folder)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_misplaced_file_or_folder_is_named(tmp_path):
    assert "cannot be read (No such file" in refusal(tmp_path / "nowhere")
    assert "0 folders" in refusal(tmp_path)
    write(tmp_path / "one", GRAY[:2], ["a/1.png", "a/2.png"])
    assert "expected one for each class, two or more" in refusal(tmp_path / "one")
    (write(tmp_path / "empty", GRAY) / "whelk").mkdir()
    assert "whelk' has no images" in refusal(tmp_path / "empty")
    (write(tmp_path / "other", GRAY) / "cone/notes.txt").write_text("")
    assert "notes.txt' is not an image: expected only .png" in refusal(tmp_path / "other")
    (write(tmp_path / "deep", GRAY) / "cone/more.png").mkdir()
    assert "more.png' is not an image" in refusal(tmp_path / "deep")
    Image.fromarray(GRAY[0, :4]).save(write(tmp_path / "size", GRAY) / "cowrie/b.ppm")
    assert "b.ppm' has 4x4 pixels" in (message := refusal(tmp_path / "size"))
    assert "1.png' has 4x5: expected one size" in message
    names = ["train/a/1.png", "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/b/1.png", "test/d/1.png"]
    assert "the class 'c' in one of train and test only" in refusal(write(tmp_path / "parts", GRAY, names))


def test_a_damaged_image_is_named(tmp_path):
    whole = (write(tmp_path, GRAY) / "cone/1.png").read_bytes()
    for content in (b"", whole[:20], whole[:-30], whole[:45] + b"\xff" + whole[46:]):
        (tmp_path / "cone/1.png").write_bytes(content)
        assert "1.png' is damaged" in refusal(tmp_path, DamagedFileError)
    for other_format in ("GIF", "TIFF", "TGA"):  # formats that the folder does not accept
        Image.fromarray(GRAY[0]).save(tmp_path / "cone/1.png", other_format)
        assert "1.png' is damaged or not an image" in refusal(tmp_path, DamagedFileError)


def test_an_image_header_with_more_pixels_than_memory_is_refused(tmp_path):
    write(tmp_path, GRAY)
    (tmp_path / "cone/1.png").unlink()
    (tmp_path / "cone/1.ppm").write_bytes(b"P5 2000000 2000000 255\n")
    assert "1.ppm' has more pixels than Pillow accepts" in refusal(tmp_path)


def png_of_16_bits(kind, channels):
    """Return a PNG of 4x5 pixels by the specification of the format: Pillow writes only gray ones with 16 bits."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = (b"\0" + bytes(range(4 * channels * 2))) * 5
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content"),
    [(f"{kind}.png", png_of_16_bits(kind, channels)) for kind, channels in {0: 1, 2: 3, 4: 2, 6: 4}.items()]
    + [("1.pgm", b"P5 4 5 65535\n" + bytes(40)), ("1.ppm", b"P6 4 5 65535\n" + bytes(120))],
    ids=["gray", "colored", "gray with alpha", "colored with alpha", "pgm", "ppm"],
)
def test_more_than_8_bits_a_channel_are_refused_and_never_truncated(name, content, tmp_path):
    (write(tmp_path, COLORED) / "cone" / name).write_bytes(content)
    assert f"{name}' has more than 8 bits a channel" in refusal(tmp_path)


def test_a_gray_map_with_fewer_bits_is_accepted(tmp_path):
    (write(tmp_path, GRAY) / "cone/0.pgm").write_bytes(b"P5 4 5 7\n" + bytes([0, 7] * 10))
    assert loaded(tmp_path).images[0].ravel().tolist() == [0, 255] * 10


def test_warnings_of_pillow_are_silenced(tmp_path, recwarn):
    file = write(tmp_path, COLORED) / "cone/1.png"
    Image.fromarray(COLORED[0]).quantize(8).save(file, transparency=bytes([0, 128, 255]))
    expected = np.asarray(Image.fromarray(COLORED[0]).quantize(8).convert("RGB"))
    assert np.array_equal(loaded(tmp_path).images[0], expected)
    assert not recwarn.list


def test_refusals_of_the_system_are_named(tmp_path, monkeypatch):
    (write(tmp_path / "link", GRAY) / "cone/x.png").symlink_to("x" * 300)
    assert "cone' cannot be read (File name too long)" in refusal(tmp_path / "link")
    write(tmp_path / "data", GRAY)
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError))
        assert "there is not enough memory for" in refusal(tmp_path / "data")
    with monkeypatch.context() as patch:  # root may read every file, so the refusal is simulated
        patch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        assert "1.png' cannot be read: Permission denied" in refusal(tmp_path / "data")


def test_a_folder_is_trained_on_resumed_and_evaluated_like_any_other_dataset(tmp_path, capsys):
    images = RNG.integers(0, 256, (60, 8, 8), np.uint8)
    names = [f"{'ab'[number % 2]}/{number}.png" for number in range(60)]
    dataset = f"folder:{write(tmp_path / 'data', images, names)}"
    config = TrainConfig(dataset=dataset, epochs=2, batch_size=16, run_dir=tmp_path / "whole")
    receipt = train(config, OneProcess()).weights_sha256
    train(replace(config, run_dir=tmp_path / "halves", max_steps=3), OneProcess())
    assert train(replace(config, resume="auto", run_dir=tmp_path / "halves"), OneProcess()).weights_sha256 == receipt
    assert evaluate.main([str(tmp_path / "whole")]) == 0
    with pytest.raises(UserError, match="--data-dir has no effect with folder:"):
        evaluate.main([str(tmp_path / "whole"), "--data-dir=elsewhere"])

    moved = f"folder:{(tmp_path / 'data').rename(tmp_path / 'moved')}"
    further = replace(config, resume="auto", run_dir=tmp_path / "halves", dataset=moved, epochs=3)
    train(further, OneProcess())
    assert evaluate.main([str(tmp_path / "whole"), f"--dataset={moved}"]) == 0
    (tmp_path / "moved/a/0.png").unlink()
    with pytest.raises(UserError, match="other images or labels, or with another split"):
        train(replace(further, epochs=4), OneProcess())
    with pytest.raises(UserError, match="give the same data by --dataset"):
        evaluate.main([str(tmp_path / "whole"), f"--dataset={moved}"])
    capsys.readouterr()


def test_without_pillow_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert "pip install 'distdl-mpi[images]'" in refusal(write(tmp_path, GRAY[:0], []))
