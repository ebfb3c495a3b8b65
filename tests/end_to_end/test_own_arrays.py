"""Arrays as people save them, after public bug reports: used as meant, or refused in one line with the remedy."""

import re

import numpy as np
import pytest

from distdl import cli, train_command

N = 120
RNG = np.random.default_rng(0)
Y = np.arange(N) % 3
X = RNG.integers(0, 80, (N, 12, 12, 3), dtype=np.uint8)
for label in range(3):
    X[label == Y, 4 * label : 4 * label + 4] += 120  # a bright band shows the class
GRAY = X[..., 0]
ONE_HOT = np.eye(3)[Y]
PARTS = np.split(np.arange(N), [60, 90])


def in_parts(images, labels, form="{part}_{kind}", parts=("train", "val", "test")):
    kinds = {"x": images, "y": labels} if form.startswith("{kind}") else {"images": images, "labels": labels}
    rows = dict(zip(("train", "val", "test"), PARTS, strict=True))
    return {form.format(part=p, kind=kind): array[rows[p]] for p in parts for kind, array in kinds.items()}


#: Arrays, flags, the first lines of the run (a pattern), and its warnings (a pattern; None: there are none).
TRAINED = {
    "Keras: labels (N, 1)": (in_parts(X, Y[:, None], "{kind}_{part}"), [], "60 training, 30 val.*classification", None),
    "MedMNIST: three parts": (
        in_parts(X, Y[:, None].astype(np.uint8)),
        [],
        "60 training, 30 validation, 30 test",
        None,
    ),
    "no test part": (
        in_parts(X, Y, "{kind}_{part}", ("train", "val")),
        [],
        "51 training, 30 val.* 9 test",
        "no test part",
    ),
    "np.loadtxt: whole floats": (
        {"images": X, "labels": Y * 1.0},
        ["--loss=cross_entropy"],
        "classification · 3 c",
        None,
    ),
    "to_categorical": ({"images": X, "labels": ONE_HOT}, ["--loss=cross_entropy"], "classification · 3 classes", None),
    "float32 (N, 1) for BCELoss": (
        {"images": X, "labels": (Y[:, None] % 2).astype(np.float32)},
        ["--loss=binary_cross_entropy"],
        "classification · 2 classes",
        None,
    ),
    "whole numbers to predict": ({"images": X, "labels": Y * 1.0}, ["--loss=mean_squared_error"], "regression", None),
    "texts": ({"images": X, "labels": np.array(["10", "9", "a"])[Y]}, [], "3 classes: 9, 10, a", None),
    "True/False": ({"images": X, "labels": Y > 0}, [], "2 classes: False, True", None),
    "names": ({"images": X, "labels": Y, "class_names": np.array(["a", "b", "c"])}, [], "3 classes: a, b, c", None),
    "scikit-learn: flat images": (
        {"data": GRAY.reshape(N, -1), "target": Y},
        [],
        "12×12×1",
        "are read as 12x12 pixels",
    ),
    "labels from 1": ({"images": X, "labels": Y + 1}, [], "4 classes", "labels are 1 to 3.*labels - 1 starts at 0"),
    "letters": ({"images": X, "labels": Y + 97}, [], "100 classes", "97 classes have no sample"),
    "wrapped bytes": ({"images": X, "labels": Y.astype(np.uint8) - 1}, [], "256 classes", "255 may be the -1"),
    "smoothed labels": ({"images": X, "labels": ONE_HOT * 0.9 + 1 / 30}, [], "regression", "sum to 1"),
    "one part divided by 255": (
        {**in_parts(X / 255, Y, "{kind}_{part}", ("train",)), "x_test": X[90:] * 1.0, "y_test": Y[90:]},
        [],
        "30 test",
        "the test images reach 199 and the training images 0.7",
    ),
}
#: Arrays and a pattern of the error.
REFUSED = {
    "np.loadtxt: whole floats": (
        {"images": X, "labels": Y * 1.0},
        "give --loss cross_entropy .*or --loss mean_squared",
    ),
    "to_categorical": ({"images": X, "labels": ONE_HOT}, "one-hot labels of 3 classes; .*give --loss cross_entropy"),
    "several classes": ({"images": X, "labels": RNG.integers(0, 2, (N, 14))}, "several are not supported"),
    "PyTorch: channels first": ({"images": np.moveaxis(X, -1, 1), "labels": Y}, r"numpy.moveaxis\(images, 1, -1\)"),
    "gray channels first": ({"images": GRAY[:, None], "labels": Y}, r"numpy.moveaxis\(images, 1, -1\)"),
    "SVHN: samples last": ({"X": np.moveaxis(X, 0, -1), "y": Y[:, None]}, r"numpy.moveaxis\(images, -1, 0\)"),
    "CIFAR-10: flat colors": ({"data": X.reshape(N, -1), "labels": Y}, r"reshape\(-1, 3, 12, 12\).transpose"),
    "two ways of naming": ({"images": X, "labels": Y, "x_test": X, "y_test": Y}, "has images and x_test, named in two"),
    "another array": ({"images": X, "labels": Y, "filenames": Y}, "has the array 'filenames': remove it"),
    "images without labels": ({"x_train": X, "y_train": Y, "x_val": X}, "has x_val but no y_val"),
    "positional arrays": ({"arr_0": X, "arr_1": Y}, "numpy.savez.file, images=…, labels=…"),
    "ids": ({"images": X, "labels": np.array([0, 1, 10_000_019])[Y]}, "10000020 classes, of which 3 have samples"),
    "an id for each image": ({"images": X, "labels": np.arange(N)}, "120 different labels .0 to 119. for 120 samples"),
    "a single class": ({"images": X, "labels": 0 * Y}, "the single class 0"),
    "labels from -1": ({"images": X, "labels": Y - 1}, "labels -1 to 1; expected 0 to 1 .*numpy.unique"),
    "texts of pandas": ({"images": X, "labels": np.array(["a", "b", "c"], object)[Y]}, r"labels.astype\(str\)"),
    "int32 pixels": ({"images": X.astype(np.int32), "labels": Y}, r"images.astype\(numpy.uint8\) converts"),
}


def run(folder, arrays, flags, capsys):
    np.savez(folder / "mine.npz", **arrays)
    given = [f"--dataset=npz:{folder}/mine.npz", "--model=mlp", "--batch-size=32", "--max-steps=1", *flags]
    code = cli.run(train_command.main, [*given, f"--run-dir={folder}/run"])
    printed = capsys.readouterr()
    return code, " ".join(printed.out.split()), printed.err


@pytest.mark.parametrize("what", TRAINED)
def test_arrays_of_one_meaning_are_trained_as_meant(what, tmp_path, capsys):
    arrays, flags, shown, warned = TRAINED[what]
    code, out, err = run(tmp_path, arrays, flags, capsys)
    assert code == 0, err
    assert re.search(shown, out), out
    assert re.search(f"^distdl: warning: .*{warned}", err) if warned else err == ""


@pytest.mark.parametrize("resume", ["--resume={run}", "--resume=auto"])
def test_a_run_whose_data_has_moved_names_the_flag_for_its_new_place(resume, tmp_path, capsys):
    arrays = {"images": X, "labels": Y}
    assert run(tmp_path, arrays, ["--max-steps=1"], capsys)[0] == 0
    [old] = tmp_path.glob("*.npz")
    old.rename(tmp_path / "moved")
    flags = [resume.format(run=tmp_path / "run"), f"--run-dir={tmp_path}/run", "--epochs=1"]
    assert cli.run(train_command.main, flags) == 2
    said = capsys.readouterr().err
    assert f"there is no {old}; give its place by --dataset npz:PATH" in said
    (tmp_path / "moved").rename(tmp_path / "new.npz")
    assert cli.run(train_command.main, [*flags, f"--dataset=npz:{tmp_path}/new.npz"]) == 0


@pytest.mark.parametrize("what", REFUSED)
def test_arrays_of_two_meanings_or_none_are_one_line_with_the_remedy(what, tmp_path, capsys):
    arrays, said = REFUSED[what]
    code, out, err = run(tmp_path, arrays, [], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(said, err), err
    assert not (tmp_path / "run").exists()
