"""A dataset of images in folders: classes in the order of their names; a misplaced file is one line."""

import json
import struct
import sys
import zlib
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest

from distdl import evaluate, train_command
from distdl.config import TrainConfig
from distdl.data import room
from distdl.data.sources import images as images_module
from distdl.data.sources import load
from distdl.engine import train
from distdl.errors import DamagedFileError, UserError
from distdl.image_options import ImageOptions
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


def loaded(folder, **options):
    return load(f"folder:{folder}", None, ImageOptions(**options))


@pytest.mark.parametrize("images", [GRAY, COLORED], ids=["gray", "colored"])
def test_classes_are_numbered_by_name_and_images_are_in_the_order_of_names(images, tmp_path):
    data = loaded(write(tmp_path, images))
    assert np.array_equal(data.images, images if images.ndim == 4 else images[..., None])
    assert data.images.dtype == np.uint8
    assert (data.labels.tolist(), data.classes, data.test_start) == ([0, 0, 0, 1, 1, 1], 2, None)
    assert data.name == f"folder:{tmp_path}"


TWO_CLASSES = ("a/1.png", "a/2.png", "b/1.png")


@pytest.mark.parametrize(
    "names",
    [
        *(("train", "test"), ("Train", "TEST"), ("training", "testing")),
        *(("train", "val"), ("train", "valid"), ("Training", "Validation"), ("train", "dev")),
        *(("train", "val", "test"), ("train", "valid", "test")),
    ],
    ids=" ".join,
)
def test_folders_with_the_names_of_parts_are_the_parts(names, tmp_path):
    images = RNG.integers(0, 256, (3 * len(names), 5, 4), np.uint8)
    data = loaded(write(tmp_path, images, [f"{part}/{name}" for part in names for name in TWO_CLASSES]))
    assert np.array_equal(data.images[..., 0], images)
    assert (data.labels.tolist(), data.classes, data.class_names) == ([0, 0, 1] * len(names), 2, ("a", "b"))
    has_validation, has_test = names[1][0] in "Vvd", names[-1][0] in "Tt"
    assert data.validation_start == (3 if has_validation else None)
    assert data.test_start == ((6 if has_validation else 3) if has_test else None)


def test_names_of_parts_are_classes_if_they_do_not_stand_together(tmp_path):
    data = loaded(
        write(tmp_path, GRAY, ("train/1.png", "train/2.png", "bus/1.png", "bus/2.png", "car/1.png", "car/2.png"))
    )
    assert (data.class_names, data.test_start) == (("bus", "car", "train"), None)


def test_names_of_classes_are_kept_and_numbers_in_them_count(tmp_path):
    given = ("10", "2", "1", "b", "a10", "a9")
    data = loaded(write(tmp_path, GRAY, [f"{name}/x.png" for name in given]))
    assert data.class_names == ("1", "2", "10", "a9", "a10", "b")
    assert np.array_equal(data.images[..., 0], GRAY[[2, 1, 0, 5, 4, 3]])


def test_a_class_may_be_missing_in_the_test_part_but_not_in_the_training_part(tmp_path):
    names = ["train/a/1.png", "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/b/1.png", "test/b/2.png"]
    data = loaded(write(tmp_path / "note", GRAY, names))
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 1]
    assert data.notes == ()  # the checks of all datasets name the class
    names[-1] = "test/d/2.png"
    assert "test' has 'd', which train has not" in refusal(write(tmp_path / "refused", GRAY, names))


def test_one_color_image_gives_all_three_channels(tmp_path):
    write(tmp_path, GRAY)
    Image.fromarray(COLORED[5]).save(tmp_path / "cowrie/c.png")
    data = loaded(tmp_path)
    assert np.array_equal(data.images[:5], np.repeat(GRAY[:5, ..., None], 3, axis=-1))
    assert np.array_equal(data.images[5], COLORED[5])


JUNK = (
    *("Thumbs.db", "desktop.ini", ".DS_Store", "._1.png", "__MACOSX/a/._1.png", ".ipynb_checkpoints/1.png"),
    *("Icon\r", "@eaDir/1.png"),
)


@pytest.mark.parametrize("name", JUNK)
@pytest.mark.parametrize("place", [".", "cone"])
def test_files_that_systems_leave_are_ignored(place, name, tmp_path):
    file = write(tmp_path, GRAY) / place / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    data = loaded(tmp_path)
    assert (len(data.images), data.class_names, data.notes) == (6, ("cone", "cowrie"), ())


def test_images_beside_the_classes_are_not_used_and_noted(tmp_path):
    Image.fromarray(GRAY[0]).save(write(tmp_path, GRAY) / "overview.png")
    data = loaded(tmp_path)
    assert len(data.images) == 6
    assert data.notes == (f"{str(tmp_path)!r} has images beside its folders, which are not used: 'overview.png'",)


def test_hidden_files_and_files_beside_the_classes_are_ignored(tmp_path):
    write(tmp_path, GRAY)
    (tmp_path / "README.txt").write_text("shells")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cone/.DS_Store").write_text("")
    assert len(loaded(tmp_path).images) == 6


def refusal(folder, kind=UserError, **options):
    with pytest.raises(UserError) as caught:
        loaded(folder, **options)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], ["no folders", "expected one for each class, two or more"]),
        (["a/1.png", "a/2.png"], ["1 folder ", "expected one for each class, two or more"]),
        (["1.png", "2.png"], ["no folders", "2 images itself: move each into a folder with the name of its class"]),
        (["shells/a/1.png", "shells/b/1.png"], ["1 folder ", "did you mean folder:", "shells, which has 'a', 'b'?"]),
        (
            ["a/1.png", "b/1.png", "b/more/2.png"],
            ["b/more' is a folder in the folder of a class", "expected only images"],
        ),
        (
            ["train/a/1.png", "train/b/1.png", "test/1.png"],
            ["test' has images but no folders of classes", "distdl.predict"],
        ),
        (
            ["train/a/1.png", "train/b/1.png", "test/a/1.png", "notes/1.png"],
            ["the parts test, train, and also 'notes'"],
        ),
        (["test/a/1.png", "val/a/1.png"], ["the parts test, val, but none for training"]),
        (
            ["train/a/1.png", "Train/b/1.png", "test/a/1.png"],
            ["expected one folder for the training part; join or move them"],
        ),
        (["train/a/1.png", "test/a/1.png"], ["train' has 1 folder ", "two or more"]),
        (["train/a/1.png", "train/b/1.png"], ["1 folder ", "did you mean folder:", "train, which has 'a', 'b'?"]),
    ],
)
def test_another_layout_is_refused_and_the_folder_is_named(names, said, tmp_path):
    message = refusal(write(tmp_path, GRAY[: len(names)], names))
    for words in said:
        assert words in message


def test_a_misplaced_file_or_folder_is_named(tmp_path):
    assert "cannot be read (No such file" in refusal(tmp_path / "nowhere")
    (write(tmp_path / "empty", GRAY) / "whelk").mkdir()
    assert "whelk' has no images" in refusal(tmp_path / "empty")
    (write(tmp_path / "other", GRAY) / "cone/notes.txt").write_text("")
    assert "notes.txt' cannot be used: it is not an image: expected only .png" in refusal(tmp_path / "other")
    (write(tmp_path / "deep", GRAY) / "cone/more.png").mkdir()
    assert "more.png' is a folder" in refusal(tmp_path / "deep")


def test_images_of_other_sizes_are_named_and_a_size_is_suggested(tmp_path):
    Image.fromarray(GRAY[0, :4]).save(write(tmp_path, GRAY) / "cowrie/b.ppm")
    message = refusal(tmp_path)
    assert "1.png' has 5x4," in message
    assert "b.ppm' has 4x4, 2 sizes in all: expected one size; give --resize 8x8" in message
    data = loaded(tmp_path, resize="4")
    assert (data.images.shape, data.resize) == ((6, 4, 4, 1), "4x4:crop")


def test_a_damaged_image_is_named(tmp_path):
    whole = (write(tmp_path, GRAY) / "cone/1.png").read_bytes()
    for content in (b"", whole[:20], whole[:-30], whole[:45] + b"\xff" + whole[46:]):
        (tmp_path / "cone/1.png").write_bytes(content)
        assert "1.png' is damaged" in refusal(tmp_path, DamagedFileError)
    Image.fromarray(GRAY[0]).save(tmp_path / "cone/1.png", "TGA")  # a format that the folder does not accept
    assert "1.png' is damaged or not an image" in refusal(tmp_path, DamagedFileError)


def test_the_content_decides_the_format_not_the_name(tmp_path):
    write(tmp_path, GRAY)
    for kind in ("GIF", "TIFF", "BMP"):
        Image.fromarray(GRAY[0]).save(tmp_path / "cone/1.png", kind)
        assert np.array_equal(loaded(tmp_path).images[..., 0], GRAY)


def with_damaged(folder):
    """Write six images and four files that cannot be used, and return the folder."""
    write(folder, GRAY)
    (folder / "cone/empty.png").write_bytes(b"")
    (folder / "cone/page.jpg").write_text("<html>404")
    (folder / "cowrie/link.png").symlink_to("nowhere.png")
    (folder / "cowrie/notes.txt").write_text("x")
    return folder


def test_all_files_that_cannot_be_used_are_named_at_once(tmp_path):
    message = refusal(with_damaged(tmp_path), DamagedFileError)
    assert f"4 of 10 files in {str(tmp_path)!r} cannot be used" in message
    for name, reason in {
        "cone/empty.png": "it is empty",
        "cone/page.jpg": "it is a web page",
        "cowrie/link.png": "it is a link to a file that does not exist",
        "cowrie/notes.txt": "it is not an image",
    }.items():
        assert f"{name}' ({reason}" in message
    assert message.endswith("leave them out by --skip-damaged")


def test_a_long_list_of_files_is_cut_and_counted(tmp_path):
    write(tmp_path, GRAY)
    for number in range(30):
        (tmp_path / f"cone/x{number:02}.png").write_bytes(b"")
    message = refusal(tmp_path, DamagedFileError)
    assert "30 of 36 files" in message
    assert ("x09.png" in message, "x10.png" in message) == (True, False)
    assert "and 20 more" in message


def test_skip_damaged_leaves_such_files_out_and_notes_them(tmp_path):
    data = loaded(with_damaged(tmp_path), skip_damaged=True)
    assert np.array_equal(data.images[..., 0], GRAY)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    [note] = data.notes
    assert note.startswith("--skip-damaged left out 4 of 10 files: ")
    for name, skipped in zip(("notes.txt", "empty.png", "page.jpg", "link.png"), data.skipped_files, strict=True):
        assert name in note
        assert name in skipped


def test_a_run_records_all_files_that_it_left_out(tmp_path, capsys):
    images = RNG.integers(0, 256, (60, 8, 8), np.uint8)
    folder = write(tmp_path / "data", images, [f"{'ab'[number % 2]}/{number}.png" for number in range(60)])
    for number in range(12):
        (folder / f"a/x{number:02}.png").write_bytes(b"")
    arguments = [f"--dataset=folder:{folder}", "--skip-damaged", "--resize=4", "--model=mlp", "--epochs=1"]
    assert train_command.main([*arguments, f"--run-dir={tmp_path / 'run'}"]) == 0
    recorded = json.loads((tmp_path / "run/env.json").read_text())
    assert [f"x{number:02}.png" in text for number, text in enumerate(recorded["skipped_files"])] == [True] * 12
    assert "--skip-damaged left out 12 of 72 files" in recorded["data_notes"][0]
    assert evaluate.main([str(tmp_path / "run")]) == 0  # reads the images in the same way
    capsys.readouterr()


def test_skip_damaged_keeps_the_borders_of_the_parts(tmp_path):
    names = [f"{part}/{name}" for part in ("train", "val", "test") for name in ("a/1.png", "b/1.png")]
    write(tmp_path, GRAY, names)
    for part in ("train", "val"):
        (tmp_path / part / "a/0.png").write_bytes(b"")
    data = loaded(tmp_path, skip_damaged=True)
    assert np.array_equal(data.images[..., 0], GRAY)
    assert (data.validation_start, data.test_start) == (2, 4)


def test_a_class_that_loses_all_its_images_is_named(tmp_path):
    write(tmp_path, GRAY)
    for name in NAMES[:3]:
        (tmp_path / name).write_bytes(b"")
    assert "has no image for the training part of 'cone' that can be used" in refusal(tmp_path, skip_damaged=True)
    for name in NAMES[3:]:
        (tmp_path / name).write_bytes(b"")
    assert "has no image that can be used" in refusal(tmp_path, skip_damaged=True)


def test_large_images_are_noted(tmp_path):
    write(tmp_path, RNG.integers(0, 256, (2, 257, 128), np.uint8), ["a/1.png", "b/1.png"])
    [note] = loaded(tmp_path).notes
    assert "have 257x128 pixels, so the training is slow: --resize 128x64, for example" in note
    assert loaded(tmp_path, resize="300").notes == ()


def test_images_of_16_bits_that_use_12_are_noted(tmp_path):
    write(
        tmp_path, RNG.integers(0, 4096, (6, 5, 4)).astype(np.uint16), [f"{'ab'[row % 2]}/{row}.png" for row in range(6)]
    )
    [note] = loaded(tmp_path).notes
    assert "are very dark, at most 15 of 255" in note
    assert loaded(write(tmp_path / "usual", GRAY)).notes == ()


def test_more_images_than_memory_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "available_bytes", lambda: 4 * (6 * 5 * 4 - 1))
    message = refusal(write(tmp_path, GRAY))
    assert "6 images of 5x4x1 (height x width x channels)" in message
    assert "give --resize" in message
    monkeypatch.setattr(room, "available_bytes", lambda: 4 * 6 * 5 * 4)
    assert len(loaded(tmp_path).images) == 6


def test_an_image_header_with_more_pixels_than_memory_is_refused(tmp_path):
    write(tmp_path, GRAY)
    (tmp_path / "cone/1.png").unlink()
    (tmp_path / "cone/1.ppm").write_bytes(b"P5 2000000 2000000 255\n")
    assert "1.ppm' cannot be used: it has more pixels than Pillow accepts" in refusal(tmp_path)


def png_of_16_bits(kind, channels):
    """Return a PNG of 4x5 pixels by the specification of the format: Pillow writes only gray ones with 16 bits."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = (b"\0" + bytes(range(4 * channels * 2))) * 5
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


#: The 16 bits of the test images are 0x0001, 0x0203, ... Their upper 8 are 0, 2, ...
@pytest.mark.parametrize(
    ("name", "content", "channels"),
    [
        ("gray.png", png_of_16_bits(0, 1), 1),
        ("colored.png", png_of_16_bits(2, 3), 3),
        ("1.pgm", b"P5 4 5 65535\n" + bytes(range(8)) * 5, 1),
        ("1.ppm", b"P6 4 5 65535\n" + bytes(range(24)) * 5, 3),
    ],
    ids=["gray", "colored", "pgm", "ppm"],
)
def test_channels_of_16_bits_keep_their_upper_8(name, content, channels, tmp_path):
    (write(tmp_path, COLORED) / "cone" / name).write_bytes(content)
    data = loaded(tmp_path)
    found = data.images[sorted([*NAMES[:3], f"cone/{name}"]).index(f"cone/{name}")]
    row = 2 * np.arange(4 * channels).reshape(4, channels)
    assert np.array_equal(found, np.broadcast_to(row, (5, 4, 3)))


@pytest.mark.parametrize(("kind", "channels"), [(4, 2), (6, 4)], ids=["gray with alpha", "colored with alpha"])
def test_16_bits_with_alpha_lie_over_white(kind, channels, tmp_path):
    (write(tmp_path, COLORED) / "cone/0.png").write_bytes(png_of_16_bits(kind, channels))
    upper = 2 * np.arange(4 * channels).reshape(4, channels)
    alpha = upper[:, -1:] / 255
    expected = upper[:, :-1] * alpha + 255 * (1 - alpha)
    assert np.abs(loaded(tmp_path).images[0] - expected).max() <= 1


def test_a_gray_map_with_fewer_bits_is_accepted(tmp_path):
    (write(tmp_path, GRAY) / "cone/0.pgm").write_bytes(b"P5 4 5 7\n" + bytes([0, 7] * 10))
    assert loaded(tmp_path).images[0].ravel().tolist() == [0, 255] * 10


def test_warnings_of_pillow_are_silenced(tmp_path, recwarn):
    file = write(tmp_path, COLORED) / "cone/1.png"
    Image.fromarray(COLORED[0]).quantize(8).save(file, transparency=bytes([0, 128, 255]))
    indices = np.asarray(Image.fromarray(COLORED[0]).quantize(8))
    colors = np.asarray(Image.fromarray(COLORED[0]).quantize(8).convert("RGB")).astype(float)
    alpha = np.array([0, 128, *[255] * 6])[indices][..., None] / 255
    assert np.abs(loaded(tmp_path).images[0] - (colors * alpha + 255 * (1 - alpha))).max() <= 1
    assert not recwarn.list


def test_refusals_of_the_system_are_named(tmp_path, monkeypatch):
    (write(tmp_path / "link", GRAY) / "cone/x.png").symlink_to("x" * 300)
    assert "x.png' cannot be used: it cannot be read (File name too long)" in refusal(tmp_path / "link")
    write(tmp_path / "data", GRAY)
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError))
        assert "there is not enough memory for" in refusal(tmp_path / "data")
    with monkeypatch.context() as patch:  # root may read every file, so the refusal is simulated
        refuse = Mock(side_effect=PermissionError(13, "Permission denied"))
        patch.setattr(images_module, "open_regular", refuse)
        assert "1.png' (it cannot be read (Permission denied))" in refusal(tmp_path / "data")


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
