"""A data set of images in folders: classes in the order of their names, and what does not fit is one line."""

import sys
from dataclasses import replace

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
#: In the order of the names, which is not that of the numbers; and a class whose name sorts behind it.
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


def test_one_image_in_color_gives_all_three_channels_and_transparency_is_dropped(tmp_path):
    write(tmp_path, GRAY)
    Image.fromarray(np.concatenate([COLORED[5], GRAY[0][..., None]], axis=-1)).save(tmp_path / "cowrie/c.png")
    data = loaded(tmp_path)
    assert np.array_equal(data.images[:5], np.repeat(GRAY[:5, ..., None], 3, axis=-1))
    assert np.array_equal(data.images[5], COLORED[5])


def test_what_is_hidden_and_what_lies_beside_the_classes_is_passed_over(tmp_path):
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


def test_what_does_not_fit_is_named(tmp_path):
    assert "cannot be read (No such file" in refusal(tmp_path / "nowhere")
    assert "0 folders" in refusal(tmp_path)
    write(tmp_path / "one", GRAY[:2], ["a/1.png", "a/2.png"])
    assert "expected one for each class, two or more" in refusal(tmp_path / "one")
    (write(tmp_path / "empty", GRAY) / "whelk").mkdir()
    assert "whelk' has no images" in refusal(tmp_path / "empty")
    (write(tmp_path / "other", GRAY) / "cone/notes.txt").write_text("")
    assert "notes.txt' is no image: expected only .png" in refusal(tmp_path / "other")
    (write(tmp_path / "deep", GRAY) / "cone/more.png").mkdir()
    assert "more.png' is no image" in refusal(tmp_path / "deep")
    Image.fromarray(GRAY[0, :4]).save(write(tmp_path / "size", GRAY) / "cowrie/b.ppm")
    assert "b.ppm' has 4x4 pixels" in (message := refusal(tmp_path / "size"))
    assert "1.png' has 4x5: expected one size" in message
    Image.fromarray(GRAY[0].astype(np.uint16) * 256).save(write(tmp_path / "deep16", GRAY) / "cone/1.png")
    assert "pixels of the kind I;16: expected 8 bits" in refusal(tmp_path / "deep16")
    names = ["train/a/1.png", "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/b/1.png", "test/d/1.png"]
    assert "the class 'c' in one of train and test only" in refusal(write(tmp_path / "parts", GRAY, names))


def test_a_damaged_image_is_named(tmp_path):
    whole = (write(tmp_path, GRAY) / "cone/1.png").read_bytes()
    for content in (b"", whole[:20], whole[:-30], whole[:45] + b"\xff" + whole[46:], b"GIF89a" + whole[6:]):
        (tmp_path / "cone/1.png").write_bytes(content)
        assert "1.png' is damaged" in refusal(tmp_path, DamagedFileError)


def test_an_image_that_announces_more_pixels_than_memory_has_is_refused_from_its_head(tmp_path):
    write(tmp_path, GRAY)
    (tmp_path / "cone/1.png").unlink()
    (tmp_path / "cone/1.ppm").write_bytes(b"P5 2000000 2000000 255\n")
    assert "1.ppm' is damaged or no image: " in refusal(tmp_path, DamagedFileError)


def test_a_folder_is_trained_on_resumed_and_evaluated_like_any_other_dataset(tmp_path, capsys):
    images = RNG.integers(0, 256, (60, 8, 8), np.uint8)
    names = [f"{'ab'[number % 2]}/{number}.png" for number in range(60)]
    dataset = f"folder:{write(tmp_path / 'data', images, names)}"
    config = TrainConfig(dataset=dataset, epochs=2, batch_size=16, run_dir=tmp_path / "whole")
    receipt = train(config, OneProcess()).weights_sha256
    train(replace(config, run_dir=tmp_path / "halves", max_steps=3), OneProcess())
    assert train(replace(config, resume="auto", run_dir=tmp_path / "halves"), OneProcess()).weights_sha256 == receipt
    assert evaluate.main([str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    (tmp_path / "data/a/0.png").unlink()
    with pytest.raises(UserError, match="data"):
        train(replace(config, resume="auto", run_dir=tmp_path / "halves"), OneProcess())


def test_without_pillow_the_way_to_get_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert "pip install 'distdl-mpi[images]'" in refusal(write(tmp_path, GRAY[:0], []))
