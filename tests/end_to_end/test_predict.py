"""Predictions have the bits of an evaluation on any number of ranks, need no training data, and name every bad file."""

import csv
import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import changes, picture
from small_runs import piece_of_digits, small_config
from test_tasks import TASKS, center_of_the_ink, pixelwise

from distdl import cli, predict
from distdl import evaluate as evaluate_command
from distdl.data import Dataset
from distdl.data.sources import load as load_source
from distdl.engine import train
from distdl.engine.storage import checkpoints
from distdl.inference import prediction
from distdl.inference.load import load
from distdl.inference.score import evaluate
from distdl.job.launched_by import read_launch
from distdl.parallel import OneProcess

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")
Image = pytest.importorskip("PIL.Image")

NAMES = ("cat", "dog", "a-class-with-a-very-long-name")
#: The last micro-batches, of 16 and of 7 images, are ragged.
TEST_IMAGES = 45


def write_photos(folder):
    """Write images of three digits into folders of classes, with a test part."""
    digits = load_source("digits", None)
    chosen = np.flatnonzero(digits.labels < 3)[: 200 + TEST_IMAGES]
    for number, row in enumerate(chosen.tolist()):
        part = "train" if number < 200 else "test"
        place = folder / part / NAMES[digits.labels[row]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[row, ..., 0] * 15).astype(np.uint8)).save(place / f"{number}.png")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Return a folder with photos, and with two runs on them that have different micro-batch sizes."""
    folder = tmp_path_factory.mktemp("shop")
    write_photos(folder / "photos")
    for name, settings in {"convnet": {}, "mlp": {"model": "mlp", "micro_batch_size": 7, "batch_size": 56}}.items():
        config = small_config(folder / name, dataset=f"folder:{folder}/photos", micro_batch_size=16, epochs=1)
        train(dataclasses.replace(config, **settings), OneProcess())
    return folder


@pytest.fixture
def alone(shop, tmp_path, monkeypatch):
    """Return a folder with both runs, some test images, and without the training data."""
    for name in ("convnet", "mlp"):
        shutil.copytree(shop / name, tmp_path / name)
    shutil.copytree(shop / "photos" / "test", tmp_path / "new")
    hidden = shop.with_name(shop.name + "-away")
    shop.rename(hidden)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    hidden.rename(shop)


def command(*arguments, program=predict):
    """Run a command in this process; return its exit code, its lines of output and of errors."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = cli.run(program.main, list(map(str, arguments)))
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def predicted(*arguments):
    """Return the content of the JSON file of a command that succeeds."""
    assert command(*arguments, "--json=out.json")[::2] == (0, [])
    return json.loads(Path("out.json").read_text(encoding="utf-8"))


def probabilities(found):
    """Return the probabilities of all classes, in the order of the network."""
    return [
        [one["probability"] for one in sorted(image["classes"], key=lambda one: one["index"])]
        for image in found["predictions"]
    ]


# ------------------------------------------------------------------------------------------------------------ the bits


@pytest.mark.parametrize("runs", [["convnet"], ["mlp"], ["convnet", "mlp"]], ids="+".join)
@pytest.mark.parametrize("most", [1024, 20])
def test_predictions_are_bitwise_those_of_an_evaluation(runs, most, shop, monkeypatch, tmp_path):
    """`most`: in one block, and in several."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prediction, "MOST_IMAGES", most)
    trained = load([shop / name for name in runs], OneProcess())
    expected = evaluate(trained, "test", OneProcess()).probabilities
    found = predicted(shop / runs[0], *(f"--with={shop / name}" for name in runs[1:]), shop / "photos/test", "--top=9")
    assert expected.shape == (TEST_IMAGES, 3)
    assert probabilities(found) == expected.tolist()
    images = trained[0].data.images[trained[0].data.parts.test]
    np.savez("images.npz", images=images)
    again = predicted(shop / runs[0], *(f"--with={shop / name}" for name in runs[1:]), "images.npz", "--top=9")
    assert probabilities(again) == expected.tolist()
    assert [one["file"] for one in again["predictions"]] == [str(row) for row in range(TEST_IMAGES)]


def test_any_number_of_ranks_gives_the_same_bytes(alone, run_on_ranks):
    """There are damaged files, an ensemble with two micro-batch sizes, and more ranks than units of work."""
    for name in ("new/cat/broken.png", "new/dog/also.jpg"):
        (alone / name).write_bytes(b"no image")
    program = [sys.executable, "-m", "distdl.predict", "convnet", "--with=mlp", "new", "--top=2"]
    found = []
    for ranks in (1, 2, 3):
        files = [f"--csv={ranks}.csv", f"--json={ranks}.json"]
        done = run_on_ranks(ranks, [*program, *files], cwd=alone, timeout=60)
        assert done.returncode == 3
        told = [line for line in done.stderr.splitlines() if line.startswith("distdl: ")]
        found.append([done.stdout, told, *((alone / f"{ranks}.{kind}").read_bytes() for kind in ("csv", "json"))])
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert len(found[0][0].splitlines()) == TEST_IMAGES


def test_an_unusable_file_does_not_change_the_predictions_of_the_others(alone):
    files = sorted(map(str, (alone / "new").rglob("*.png")))
    expected = {one["file"]: one for one in predicted("convnet", *files)["predictions"]}
    (alone / files[3]).write_bytes(b"")
    code, _, _ = command("convnet", *files, "--json=others.json")
    found = {one["file"]: one for one in json.loads((alone / "others.json").read_text())["predictions"]}
    assert code == 3
    assert found == {name: one for name, one in expected.items() if name != files[3]}


# ----------------------------------------------------------------------------------------------------- without the data


def test_a_run_without_its_data_predicts_scores_other_data_and_has_a_report(alone):
    assert len(predicted("convnet", "new")["predictions"]) == TEST_IMAGES
    code, lines, _ = command("convnet", "--on=folder:new", program=evaluate_command)
    summary = json.loads((alone / "convnet/summary.json").read_text())
    assert code == 0
    assert lines[-1].startswith(f"accuracy on folder:new: {summary['test_accuracy']:.2%} (")
    code, _, [told] = command("convnet", program=evaluate_command)
    assert code == 2
    assert "/photos; give its place by --dataset folder:PATH" in told


def without_signature(run):
    """Make the checkpoints of a run those of an older version."""
    for path in (run / "checkpoints").iterdir():
        found = checkpoints.read(path)
        header = {name: value for name, value in found.header.items() if name != "signature"}
        checkpoints.write(path, dataclasses.replace(found, header=header))


def test_a_checkpoint_of_an_older_version_needs_its_data_once(shop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shop / "convnet", "old")
    expected = predicted("old", shop / "photos/test")["predictions"]
    without_signature(tmp_path / "old")
    assert predicted("old", shop / "photos/test")["predictions"] == expected
    shutil.copytree(shop / "photos", "moved")
    monkeypatch.setattr("distdl.inference.load.Path.exists", lambda path: "shop" not in str(path))
    code, _, [told] = command("old", "moved/test")
    assert code == 2
    assert "older version" in told
    assert "--dataset folder:PATH" in told
    assert "resume it" in told
    assert "do not need it" not in told
    assert predicted("old", "moved/test", "--dataset=folder:moved")["members"][0]["run"] == "old"


# -------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
def test_names_come_from_standard_input(separator, alone, monkeypatch):
    names = ["new/dog", "new/cat/" + next((alone / "new" / "cat").iterdir()).name]
    content = io.TextIOWrapper(io.BytesIO(separator.join(name.encode() for name in names) + separator))
    monkeypatch.setattr(sys, "stdin", content)
    found = [one["file"] for one in predicted("convnet", "-")["predictions"]]
    assert found[-1] == names[1]
    assert {name.rpartition("/")[0] for name in found[:-1]} == {"new/dog"}


def test_a_folder_is_read_in_natural_order_and_other_files_are_named(alone):
    (alone / "mixed" / "sub").mkdir(parents=True)
    image = next((alone / "new").rglob("*.png")).read_bytes()
    for name in ("10.png", "9.png", "sub/1.PNG", ".hidden.png", "Thumbs.db", "notes.txt"):
        (alone / "mixed" / name).write_bytes(image)
    code, lines, told = command("convnet", "mixed")
    assert code == 0
    assert [line.split()[0] for line in lines] == ["mixed/9.png", "mixed/10.png", "mixed/sub/1.PNG"]
    assert told == ["distdl: warning: skipped, because the name is not that of an image: mixed/notes.txt"]


def test_every_bad_file_is_named_and_the_others_are_predicted(alone):
    good = next((alone / "new").rglob("*.png"))
    (alone / "empty.png").touch()
    Image.new("L", (9, 8)).save(alone / "wide.png")
    code, lines, told = command("convnet", good, "wide.png", "absent.png")
    assert code == 2
    assert [line.split()[0] for line in lines] == [str(good)]
    assert len(told) == 3
    assert "'wide.png'" in told[0]
    assert "8x9" in told[0]
    assert "8x8" in told[0]
    assert "'absent.png' cannot be used: it does not exist" in told[1]
    assert told[2] == "distdl: error: 2 of 3 images have no prediction; the lines above name them"
    code, _, told = command("convnet", good, "empty.png")
    assert (code, len(told)) == (3, 2)
    assert "'empty.png' is damaged" in told[0]


def test_colours_become_gray_for_a_network_of_gray_images(alone):
    gray = next((alone / "new").rglob("*.png"))
    Image.open(gray).convert("RGB").save(alone / "colour.png")
    first, second = (one["classes"] for one in predicted("convnet", gray, "colour.png")["predictions"])
    assert [one["class"] for one in first] == [one["class"] for one in second]


@pytest.fixture
def wrong(alone):
    """Return a folder with inputs that cannot be predicted."""
    np.savez(alone / "two.npz", a=np.zeros((2, 8, 8), np.uint8), b=np.zeros((2, 8, 8), np.uint8))
    np.savez(alone / "large.npz", images=np.zeros((2, 9, 8), np.uint8))
    np.savez(alone / "float.npz", images=np.zeros((2, 8, 8)))
    (alone / "text.npz").write_text("no archive")
    (alone / "nothing").mkdir()
    shutil.copytree(alone / "convnet", alone / "copy")
    other = piece_of_digits(94)
    train(small_config(alone / "other", epochs=1), OneProcess(), dataset=other)
    floats = dataclasses.replace(other, images=other.images.astype(np.float32))
    train(small_config(alone / "floats", epochs=1), OneProcess(), dataset=floats)
    four = dataclasses.replace(other, images=np.repeat(other.images, 4, axis=3))
    train(small_config(alone / "four", epochs=1), OneProcess(), dataset=four)
    return alone


USER, DAMAGED = 2, 3
REFUSED = {
    "no run": ([], USER, ["RUN", "IMAGES", "--help"]),
    "no images": (["convnet"], USER, ["IMAGES", "--help"]),
    "no such run": (["nowhere", "new"], USER, ["nowhere", "no such checkpoint or run folder"]),
    "an image as the run": (["two.npz", "new"], DAMAGED, ["two.npz", "no checkpoint of distdl"]),
    "an empty folder": (["convnet", "nothing"], USER, ["nothing", ".png"]),
    "standard input twice": (["convnet", "-", "-"], USER, ["twice"]),
    "an array and files": (["convnet", "npz:two.npz", "new"], USER, ["two.npz", "1 other"]),
    "no such array file": (["convnet", "npz:none.npz"], USER, ["none.npz", "does not exist"]),
    "two arrays": (["convnet", "two.npz"], USER, ["'a', 'b'", "npz:two.npz:"]),
    "no such array": (["convnet", "npz:two.npz:c"], USER, ["'a', 'b'"]),
    "an array of another size": (["convnet", "large.npz"], USER, ["9x8", "8x8"]),
    "an array of other numbers": (["convnet", "float.npz"], USER, ["float32", "uint8"]),
    "no archive": (["convnet", "text.npz"], USER, ["text.npz", "not an .npz file"]),
    "a run among the images": (["convnet", "copy", "new"], USER, ["copy", "run folder", "--with copy"]),
    "the same run twice": (["convnet", "new", "--with=copy"], USER, ["convnet", "copy", "same weights"]),
    "members of other classes": (["convnet", "new", "--with=other"], USER, ["other outputs", "4, expected 3"]),
    "files for a network of floats": (["floats", "new"], USER, ["floats", "npz:FILE.npz"]),
    "files for a network of four channels": (["four", "new"], USER, ["4 channels", "npz:FILE.npz"]),
    "no class": (["convnet", "new", "--top=0"], USER, ["--top", "at least 1"]),
    "masks of whole images": (["convnet", "new", "--masks=m"], USER, ["--masks", "label pixels"]),
    "one file for two": (["convnet", "new", "--csv=a", "--json=a"], USER, ["--csv", "--json", "same file"]),
    "csv into a folder": (["convnet", "new", "--csv=nothing"], USER, ["--csv", "nothing", "is a folder"]),
}


def test_a_refusal_is_one_line_and_writes_nothing(wrong):
    before = picture(wrong)
    for what, (arguments, expected, words) in REFUSED.items():
        code, out, told = command(*arguments)
        assert (code, out, len(told)) == (expected, [], 1), f"{what}: {told}"
        assert [word for word in words if word not in told[0]] == [], f"{what}: {told}"
    assert changes(before, picture(wrong)) == []


# ------------------------------------------------------------------------------------------------------------- outputs


def test_lines_fit_80_columns_and_only_they_shorten_names(alone):
    (alone / "n").mkdir()
    for image in (alone / "new").rglob("*.png"):
        image.rename(alone / "n" / f"photo-{image.name}")
    code, lines, _ = command("convnet", "n", "--csv=out.csv")
    with (alone / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert code == 0
    assert max(map(len, lines)) <= 80
    assert rows[0] == ["file", *(f"{column}_{place}" for place in (1, 2, 3) for column in ("class", "probability"))]
    for line, row in zip(lines, rows[1:], strict=True):
        assert line.split()[0] == row[0]
        for name, probability in zip(row[1::2], row[2::2], strict=True):
            assert name in NAMES
            assert f"{float(probability):.2%}" in line
        assert sorted(map(float, row[2::2]), reverse=True) == list(map(float, row[2::2]))
        assert np.isclose(sum(map(float, row[2::2])), 1)
    assert all("  a-class-wi…  " in line for line in lines)


def run_of(task, folder, names):
    """Train one of the small tasks with named outputs."""
    dataset, build, _ = TASKS[task]
    named = dataclasses.replace(dataset, class_names=names)
    train(small_config(folder, lr=0.01), OneProcess(), dataset=named, build_network=build)
    return dataset


OWN = (
    "from distdl.nn import *\n"
    "def flat(shape, outputs):\n"
    "    return Sequential([Flatten(), Affine(32), ReLU(), Affine(outputs)], shape)\n"
)


def test_a_regression_predicts_its_numbers_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    digits = piece_of_digits(600)
    labels = center_of_the_ink(digits.images[..., 0].astype(np.float32), None)
    np.savez("numbers.npz", images=digits.images, labels=labels, class_names=np.array(["row", "column"]))
    config = small_config(tmp_path / "run", dataset="npz:numbers.npz", model="own.py:flat", standardize_targets=True)
    train(config, OneProcess())
    trained = load([tmp_path / "run"], OneProcess(), models=["own.py:flat"])
    expected = evaluate(trained, "test", OneProcess()).probabilities
    np.savez("test.npz", images=digits.images[trained[0].data.parts.test])
    found = predicted("run", "test.npz", "--model=own.py:flat", "--csv=out.csv")["predictions"]
    assert [[one["numbers"]["row"], one["numbers"]["column"]] for one in found] == expected.tolist()
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[:2] == ["file,row,column", "0,{!r},{!r}".format(*expected[0].tolist())]
    assert np.abs(expected - 3.5).mean() < 2, "in pixels"


def test_a_segmentation_predicts_shares_and_writes_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset, _, _ = TASKS["segmentation"]
    named = Dataset(**{**vars(dataset), "class_names": ("paper", "ink")})
    train(small_config(tmp_path / "run", lr=0.01), OneProcess(), dataset=named, build_network=pixelwise)
    trained = load([tmp_path / "run"], OneProcess(), dataset=named, build_network=pixelwise)
    expected = evaluate(trained, "test", OneProcess()).predictions
    np.savez("test.npz", images=named.images[trained[0].data.parts.test])
    with pytest.MonkeyPatch.context() as patch:  # the network comes from a script
        patch.setattr("distdl.inference.predict_images.load_without_data", lambda *_, **__: trained)
        found = predicted("run", "test.npz", "--masks=masks")["predictions"]
    for row, one in enumerate(found):
        with Image.open(tmp_path / "masks" / f"{row}.png") as mask:
            assert np.array_equal(np.asarray(mask), expected[row])
        shares = {share["class"]: share["share"] for share in one["classes"]}
        assert shares == {"paper": (expected[row] == 0).mean(), "ink": (expected[row] == 1).mean()}
