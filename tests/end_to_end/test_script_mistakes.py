"""A mistake in a script that calls the library is one line, which says what is given and what is expected."""

import numpy as np
import pytest
from small_runs import small_config

import distdl
from distdl import nn
from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.parallel import OneProcess

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="in one process")

IMAGES = np.arange(60 * 64, dtype=np.uint8).reshape(60, 8, 8, 1)
LABELS = np.arange(60) % 3


def network(input_shape, classes):
    return nn.Sequential([nn.Flatten(), nn.Affine(classes)], input_shape)


def dataset(**given):
    return distdl.Dataset.from_labels(**{"name": "mine", "images": IMAGES, "labels": LABELS, **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"class_names": "abc"}, "class_names of type str; expected a tuple of texts, in the order of the classes"),
        ({"class_names": {"a", "b", "c"}}, "class_names of type set; expected a tuple"),
        ({"class_names": {"a": 0, "b": 1, "c": 2}}, "class_names of type dict; expected a tuple"),
        ({"class_names": np.array(["a", "b", "c"])}, "class_names of type ndarray; expected a tuple"),
        ({"class_names": (letter for letter in "abc")}, "class_names of type generator; expected a tuple"),
        ({"class_names": ([1], "b", "c")}, r"class_names with \[1\]; expected a tuple of texts"),
        ({"class_names": ("a", None, "c")}, "class_names with None; expected a tuple of texts"),
        ({"class_names": ("a", "b", "a")}, "class_names with 'a' 2 times; expected different texts"),
        ({"images": np.ma.masked_array(IMAGES, IMAGES > 8)}, r"images with a mask; .*images.filled\(VALUE\)"),
        ({"labels": np.ma.masked_array(LABELS, LABELS > 1)}, r"labels with a mask; .*labels.filled\(VALUE\)"),
    ],
)
def test_a_dataset_is_refused_in_one_line(given, said):
    with pytest.raises(UserError, match=f"the dataset 'mine' has {said}"):
        dataset(**given)


def test_a_list_of_class_names_is_as_good_as_a_tuple():
    assert dataset(class_names=["a", "b", "c"]).class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"config": {"epochs": 1}}, r"the config is a dict: expected distdl.TrainConfig\(…\)"),
        ({"config": "my-run"}, "the config is a str: expected distdl.TrainConfig"),
        ({"build_network": 5}, "build_network is an int; expected a function"),
        ({"build_network": [nn.Flatten()]}, "build_network is a list; expected a function"),
        ({"build_network": nn}, "build_network is a module; expected a function"),
        ({"callbacks": distdl.Callback()}, "callbacks is an object of Callback: expected a list"),
        ({"callbacks": None}, "callbacks is an object of NoneType: expected a list"),
        ({"dataset": dataset(name="\udcff")}, r"--dataset '\\udcff' is not valid UTF-8: give another name"),
    ],
)
def test_an_argument_of_train_is_refused_in_one_line_and_nothing_is_written(given, said, tmp_path):
    usual = {"config": small_config(tmp_path / "run"), "dataset": dataset(), "build_network": network}
    with pytest.raises(UserError, match=said):
        distdl.train(**usual | given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", [None, 3, b"run"])
def test_something_else_than_a_path_is_not_loaded(run):
    with pytest.raises(UserError, match=f"cannot load {run!r}: expected the path of a run folder"):
        distdl.load(run)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model that takes arrays of floats, with names of classes over several lines."""
    images, names = IMAGES.astype(np.float32), ("a\nb", "<b>", "c")
    config = small_config(tmp_path_factory.mktemp("mistakes") / "run", epochs=1)
    given = dataset(images=images, class_names=names)
    result = distdl.train(config, dataset=given, build_network=network, communicator=OneProcess())
    return distdl.load(result.run_dir, build_network=network)


@pytest.mark.parametrize("pixel", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_not_predicted(model, pixel):
    images = IMAGES[:4].astype(np.float32)
    images[2, 1, 1, 0] = pixel
    with pytest.raises(UserError, match="the array has NaN or infinity in image 2: expected finite pixels"):
        model.predict(images)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([[1], [1, 2]], "cannot predict an object of list: .*; expected an array"),
        (np.ma.masked_array(np.zeros((2, 8, 8, 1), np.float32), True), "cannot predict images with a mask"),
        (np.full((2, 8, 8, 1), 1e300), "NaN or infinity in image 0"),
    ],
)
def test_images_that_are_no_plain_array_are_refused(model, images, said):
    with pytest.raises(UserError, match=said):
        model.predict(images)


def test_a_message_is_one_line_even_if_it_quotes_a_name_of_several(model):
    assert model.class_names == ("a\nb", "<b>", "c")
    other = dataset(images=IMAGES.astype(np.float32), class_names=("x", "y", "z"))
    with pytest.raises(UserError, match="classes that the network does not know") as caught:
        model.evaluate(other)
    assert "\n" not in str(caught.value)
    assert "expected a b, <b>, c" in str(caught.value)
