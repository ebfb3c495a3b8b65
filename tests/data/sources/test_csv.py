"""Images and labels that a CSV file lists: columns by name, classes keep their names, a wrong line is named."""

import numpy as np
import pytest

from distdl.data.sources import load
from distdl.errors import DamagedFileError, UserError
from distdl.image_options import ImageOptions

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'distdl-mpi[images]'")

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4), np.uint8)
NAMES = [f"images/{number}.png" for number in range(6)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, image in zip(NAMES, PIXELS, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    return tmp_path


def table(*labels, header="path,label", separator=","):
    return "\n".join([header, *(separator.join([name, label]) for name, label in zip(NAMES, labels, strict=True))])


def loaded(folder, text, **options):
    (folder / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(f"csv:{folder / 'list.csv'}", None, ImageOptions(**options))


def refusal(folder, text, **options):
    with pytest.raises(UserError) as caught:
        loaded(folder, text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CATS = ("cat", "dog", "cat", "dog", "cat", "dog")


@pytest.mark.parametrize(
    "text",
    [
        table(*CATS),
        table(*CATS) + "\n\n",
        table(*CATS).replace("\n", "\r\n"),
        "\ufeff" + table(*CATS),
        table(*CATS, header="Image Path;Class", separator=";"),
        table(*CATS, header="filename\tcategory", separator="\t"),
        table(*CATS, header=" file , y "),
        table(*(f' "{label}"' for label in CATS)).replace(', "', ',"'),
        table(*CATS).replace("images/", "images\\"),
        table(*CATS).replace("images/", "./images/"),
        table(*CATS).replace(".png", ""),
    ],
    ids=["plain", "blank line", "CRLF", "BOM", "semicolon", "tab", "blanks", "quotes", "Windows", "dot", "no suffix"],
)
def test_paths_and_labels_are_read_in_the_order_of_the_file(text, folder):
    data = loaded(folder, text)
    assert np.array_equal(data.images[..., 0], PIXELS)
    assert (data.labels.tolist(), data.class_names, data.classes) == ([0, 1, 0, 1, 0, 1], ("cat", "dog"), 2)
    assert (data.test_start, data.validation_start, data.notes) == (None, None, ())
    assert data.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("10", "2", "10", "2", "10", "2"), ("2", "10")),
        (("-1", "1", "0", "1", "0", "-1"), ("-1", "0", "1")),
        (("a10", "a9", "a10", "a9", "a10", "a9"), ("a9", "a10")),
        (("7", "x", "7", "x", "7", "x"), ("7", "x")),
        (("True", "False", "True", "False", "True", "False"), ("False", "True")),
        (("nan", "1.5", "nan", "1.5", "nan", "1.5"), ("1.5", "nan")),
        (("猫", "chat é", "猫", "chat é", "猫", "chat é"), ("chat é", "猫")),
    ],
)
def test_texts_and_whole_numbers_are_classes_and_keep_their_names(labels, names, folder):
    data = loaded(folder, table(*labels))
    assert (data.class_names, data.task) == (names, "classification")
    assert [data.class_names[label] for label in data.labels] == list(labels)


def test_numbers_with_decimals_are_to_predict(folder):
    data = loaded(folder, table("1.5", "2", "-3e2", ".5", "0.", "+7.25"))
    assert (data.task, data.classes, data.class_names) == ("regression", 1, ("label",))
    assert np.array_equal(data.labels, np.array([[1.5], [2], [-300], [0.5], [0], [7.25]], np.float32))


def test_several_label_columns_are_numbers_to_predict(folder):
    text = "x,id,file,y\n" + "".join(f"{row},{row},{name},{row / 2}\n" for row, name in enumerate(NAMES))
    data = loaded(folder, text, csv_columns="file, y,x")
    assert (data.task, data.class_names) == ("regression", ("y", "x"))
    assert data.labels.tolist() == [[row / 2, row] for row in range(6)]
    assert data.notes == (f"columns of {str(folder / 'list.csv')!r} that are not used: 'id'",)


def test_a_column_of_parts_gives_the_parts(folder):
    parts = ["test", "Train", "val", "train", "Validation", "testing"]
    lines = [f"{name},{label},{part}" for name, label, part in zip(NAMES, "aaabbb", parts, strict=True)]
    data = loaded(folder, "\n".join(["path,label,split", *lines]))
    assert np.array_equal(data.images[..., 0], PIXELS[[1, 3, 2, 4, 0, 5]])
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert (data.validation_start, data.test_start) == (2, 4)


def test_files_that_cannot_be_used_are_named_or_skipped(folder):
    (folder / "images/0.png").write_bytes(b"")
    (folder / "images/1.png").unlink()
    message = refusal(folder, table(*CATS))
    assert "2 of 6 files in" in message
    assert "0.png' (it is empty); " in message
    assert "1.png' (it does not exist)" in message
    data = loaded(folder, table(*CATS), skip_damaged=True)
    assert np.array_equal(data.images[..., 0], PIXELS[2:])
    assert data.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(DamagedFileError):
        loaded(folder, table(*CATS))


def test_images_are_resized(folder):
    Image.fromarray(PIXELS[0, :3]).save(folder / NAMES[0])
    assert "give --resize" in refusal(folder, table(*CATS))
    assert loaded(folder, table(*CATS), resize="3x2").images.shape == (6, 3, 2, 1)


def test_a_name_without_suffix_that_fits_two_files_is_refused(folder):
    Image.fromarray(PIXELS[0]).save(folder / "images/0.jpg")
    assert "0' cannot be used: it does not exist" in refusal(folder, table(*CATS).replace(".png", ""))


def test_an_image_that_is_listed_twice_is_noted_or_refused(folder):
    [note] = loaded(folder, table(*CATS) + f"\n{NAMES[0]},cat").notes
    assert note.startswith("1 lines of ")
    message = refusal(folder, table(*CATS) + f"\n{NAMES[1]},cat")
    assert "with two labels, in the lines 3 and 8" in message


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", {}, "has no column for the path: its first line has ; expected names such as path and label"),
        ("path,label\n", {}, "lists no images"),
        ("a/1.png,cat\na/2.png,dog\n", {}, "no column for the path: its first line has 'a/1.png', 'cat'"),
        ("path,kind\nx,y\n", {}, "no column for the label: its first line has 'path', 'kind'"),
        ("path,image,label\nx,x,y\n", {}, "the columns 'path' and 'image', each of which may hold the path"),
        ("path,path,label\nx,x,y\n", {}, "two columns with the name 'path'"),
        (table(*CATS), {"csv_columns": "path,labels"}, "no column 'labels' of --csv-columns"),
        (table(*CATS), {"csv_columns": "path,labels"}, "did you mean 'label'?"),
        (table(*CATS), {"csv_columns": "path"}, "no column for the label"),
        (table(*CATS) + "\nx", {}, "has 1 values in line 8, expected 2"),
        (table(*CATS) + "\nx,a,b", {}, "has 3 values in line 8, expected 2"),
        (table(*CATS[:5], ""), {}, "no path or label in 1 of its lines (7)"),
        ("path,label,split\nx,a,train\ny,b,holdout\n", {}, "has the part 'holdout' in line 3: expected train, val or"),
        ("path,label,split\nx,a,test\ny,b,val\n", {}, "no line for training"),
        ("path,a,b\nx,1,2\ny,1,cat\n", {"csv_columns": "path,a,b"}, "has 'cat' in the column 'b', line 3"),
        ("path,a,b\nx,1,2\ny,1,1e999\n", {"csv_columns": "path,a,b"}, "has '1e999' in the column 'b', line 3"),
        (table(*CATS).encode("utf-16"), {}, "is not a text in UTF-8"),
        (b"path,label\n\xff,x", {}, "is not a text in UTF-8"),
        ('path,label\n"x,y', {}, "is not a CSV file"),
        ("path,label\n" + "x" * 200_000 + ",y", {}, "is not a CSV file"),
        ("path,label\nx\0,a\ny,b\n", {}, "2 of 2 files"),
    ],
)
def test_a_wrong_file_is_refused_and_the_place_is_named(text, options, said, folder):
    assert said in refusal(folder, text, **options)


def test_a_path_that_is_no_file_is_refused(folder):
    with pytest.raises(UserError, match=r"nowhere.csv' cannot be read: No such file"):
        load(f"csv:{folder / 'nowhere.csv'}", None)
    with pytest.raises(UserError, match=r"images' is not a regular file: expected a CSV file"):
        load(f"csv:{folder / 'images'}", None)


def test_a_class_without_training_images_is_refused(folder):
    lines = [
        f"{name},{label},{part}"
        for name, label, part in zip(NAMES, "abcabc", ["train"] * 2 + ["test"] * 4, strict=True)
    ]
    assert "has no image for the training part of 'c'" in refusal(folder, "\n".join(["path,label,split", *lines]))
