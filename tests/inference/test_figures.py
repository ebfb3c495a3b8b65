"""Figures show the right axes, images and titles. The tests compare no pixels."""

import itertools
import json

import numpy as np
import pytest

from distdl.engine.pictures import confusion_matrix
from distdl.errors import UserError
from distdl.inference import figures
from distdl.nn import Affine, Conv2d, Flatten, ReLU, Residual, Sequential, build_model
from distdl.nn.network_copies import layer_outputs
from distdl.rng import Key

pytest.importorskip("matplotlib")


def network_of(channels=1, filters=6):
    network = Sequential([Conv2d(filters, 3), ReLU(), Flatten(), Affine(4)], (8, 8, channels))
    network.initialize(Key(0).of("initialization"))
    return network


def random(*shape):
    return Key(1).normal(int(np.prod(shape))).reshape(shape)


def drawn(figure):
    """Return the arrays of all images in a figure, in order."""
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


# ------------------------------------------------------------------------------------------------------------ numbers


def test_confusion_matrix_counts_each_pair_once():
    labels, predictions = Key(2).permutation(500) % 7, Key(3).permutation(500) % 7
    expected = np.zeros((7, 7), np.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        expected[label, prediction] += 1
    found = confusion_matrix(labels, predictions, 7)
    assert np.array_equal(found, expected)
    assert found.dtype == np.int64
    assert found.sum() == 500


def test_absent_classes_have_rows_and_columns_of_zeros():
    assert confusion_matrix(np.array([0]), np.array([1]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_each_scaled_image_ranges_from_0_to_1_and_keeps_the_order_of_its_pixels():
    images = random(5, 4, 3, 2) * np.arange(1, 6).reshape(5, 1, 1, 1)
    found = figures.scaled(images)
    for before, after in zip(images, found, strict=True):
        assert (after.min(), after.max()) == (0, 1)
        assert np.array_equal(np.argsort(before, axis=None), np.argsort(after, axis=None))
        assert np.allclose(after, (before - before.min()) / (before.max() - before.min()), rtol=1e-15)


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (5, 1)])
def test_filter_images_are_the_filters_each_scaled_separately(channels, shown):
    weight = random(3, 2, channels, 4)
    found = figures.filter_images(weight)
    assert found.shape == (4, 3, 2, shown)
    for f in range(4):
        one = weight[..., f] if shown == channels else weight[..., f].mean(axis=2, keepdims=True)
        assert np.allclose(found[f], (one - one.min()) / (one.max() - one.min()), atol=1e-12)


def test_the_first_convolution_is_found_and_its_absence_is_an_error():
    network = network_of()
    name, weight = figures.first_convolution(network)
    assert name == "conv2d_1"
    assert np.shares_memory(weight, network.parameters)
    assert weight.shape == (3, 3, 1, 6)
    with pytest.raises(UserError, match=r"no convolution.*simple_convnet"):
        figures.first_convolution(build_model("mlp", (8, 8, 1), 10))


# ------------------------------------------------------------------------------------------------------------ figures


def test_filters_of_several_networks_are_side_by_side_under_their_titles():
    before, after = network_of(), network_of()
    after.parameters[:] *= -1
    figure = figures.filters({"before training": before, "after training": after})
    assert [part.get_suptitle() for part in figure.subfigs] == ["before training", "after training"]
    expected = [*figures.filter_images(before.layers[0].parameters["weight"])]
    expected += [*figures.filter_images(after.layers[0].parameters["weight"])]
    for found, image in zip(drawn(figure), expected, strict=True):
        assert np.array_equal(found, image[..., 0])


def test_filters_of_colours_are_drawn_in_colour():
    assert {image.shape for image in drawn(figures.filters(network_of(channels=3)))} == {(3, 3, 3)}


def test_feature_maps_are_the_input_and_the_channels_of_the_layer():
    network, image = network_of(), random(8, 8, 1).astype(np.float32)
    outputs = layer_outputs(network, image[np.newaxis])
    for layer in (None, "relu_1"):
        figure = figures.feature_maps(network, image, layer)
        first, *maps = drawn(figure)
        assert figure.get_suptitle() == (layer or "conv2d_1")
        assert np.array_equal(first, figures.scaled(image[np.newaxis])[0, ..., 0])
        channels = outputs[layer or "conv2d_1"][0].transpose(2, 0, 1)[..., np.newaxis]
        assert np.array_equal(maps, figures.scaled(channels)[..., 0])


def test_the_first_convolution_inside_another_layer_gives_the_maps_of_that_layer():
    network = Sequential([Residual([Conv2d(3, 3, padding=1)], [Conv2d(3, 1)]), ReLU(), Flatten()], (8, 8, 1))
    network.initialize(Key(0))
    figure = figures.feature_maps(network, random(8, 8, 1).astype(np.float32))
    assert figure.get_suptitle() == "residual_1"
    assert len(drawn(figure)) == 1 + 3


@pytest.mark.parametrize("layer", ["affine_1", "relu_7"])
def test_a_layer_without_maps_is_named_together_with_those_that_have_maps(layer):
    with pytest.raises(UserError, match=f"{layer}.*conv2d_1, relu_1"):
        figures.feature_maps(network_of(), random(8, 8, 1), layer)


def test_misclassified_shows_only_misclassified_images_with_both_names():
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1) * 3 % 7
    labels, predictions = np.array([0, 1, 2, 0, 1]), np.array([0, 2, 2, 1, 1])
    figure = figures.misclassified(images, labels, predictions, ["cat", "dog", "eel"])
    assert figure.get_suptitle() == "2 of 5 misclassified"
    assert titles(figure)[:2] == ["dog,\npredicted eel", "cat,\npredicted dog"]
    assert np.array_equal(drawn(figure), figures.scaled(images[[1, 3]])[..., 0])
    assert titles(figures.misclassified(images, labels, predictions))[:2] == ["1,\npredicted 2", "0,\npredicted 1"]


def test_the_title_of_misclassified_counts_those_not_shown_and_also_none():
    images, labels = np.zeros((9, 2, 2, 1), np.uint8), np.zeros(9, np.int64)
    figure = figures.misclassified(images, labels, labels + 1, most=4)
    assert (len(drawn(figure)), figure.get_suptitle()) == (4, "9 of 9 misclassified, the first 4")
    figure = figures.misclassified(images, labels, labels)
    assert (drawn(figure), figure.get_suptitle()) == ([], "0 of 9 misclassified")


def test_confusion_shows_every_count_and_colours_shares_of_each_row():
    matrix = np.array([[8, 2, 0], [3, 1, 0], [0, 0, 0]])
    figure = figures.confusion(matrix, ["cat", "dog", "eel"])
    (axes,) = figure.axes
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((column, row), str(matrix[row, column])) for row in range(3) for column in range(3)
    }
    correct, mistakes = (image.get_array() for image in axes.images)
    assert correct.filled(-1).tolist() == [[0.8, -1, -1], [-1, 0.25, -1], [-1, -1, 0]]
    assert mistakes.filled(-1).tolist() == [[-1, 0.2, 0], [0.75, -1, 0], [0, 0, -1]]
    assert [image.get_clim() for image in axes.images] == [(0, 1), (0, 0.75)]
    assert axes.get_title() == "9 of 14 correct"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "eel"]


def test_names_of_classes_are_shown_as_they_are_and_long_ones_shortened():
    names = ["$a_1$", "a very long name of a class, too long for a picture"]
    (axes,) = figures.confusion(np.eye(2, dtype=np.int64), names).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["$a_1$", "a very long name of a c…"]
    figure = figures.misclassified(np.zeros((1, 2, 2, 1), np.uint8), np.array([0]), np.array([1]), names)
    assert titles(figure)[0] == "$a_1$,\npredicted a very long name of a c…"
    for text in (*axes.get_yticklabels(), figure.axes[0].title):
        assert not text.get_parse_math()


def test_a_large_confusion_matrix_has_no_counts_in_its_cells():
    (axes,) = figures.confusion(np.eye(30, dtype=np.int64)).axes
    assert len(axes.texts) == 0


def test_square_contents_have_about_square_figures():
    images, labels = np.zeros((36, 2, 2, 1), np.uint8), np.zeros(36, np.int64)
    of_filters = figures.filters(network_of(filters=36))
    of_misclassified = figures.misclassified(images, labels, labels + 1)
    of_confusion = figures.confusion(np.eye(30, dtype=np.int64))
    for figure in (of_filters, of_misclassified, of_confusion):
        width, height = figure.get_size_inches()
        assert 0.8 < width / height < 1.25


def test_activation_histograms_count_every_activation():
    outputs = {"relu_1": random(10, 3), "relu_2": np.zeros((4, 4))}
    figure = figures.activation_histograms({"": outputs}, bins=5)
    assert titles(figure) == ["relu_1", "relu_2"]
    counts, edges = np.histogram(outputs["relu_1"], bins=5)
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == counts.tolist()
    assert np.allclose([bar.get_x() for bar in bars], edges[:-1])
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == 16
    limited = figures.activation_histograms({"": {"a": np.array([-5, 0.5, 5])}}, limits=(0, 1))
    assert sum(bar.get_height() for bar in limited.axes[0].patches) == 1


def test_activation_histograms_of_several_networks_are_in_rows():
    figure = figures.activation_histograms({"one": {"a": np.ones(3), "b": np.ones(5)}, "two": {"c": np.ones(7)}})
    assert titles(figure) == ["one: a", "one: b", "two: c", ""]
    assert [sum(bar.get_height() for bar in axes.patches) for axes in figure.axes] == [3, 5, 7, 0]


@pytest.mark.parametrize("scale", [1e-7, 0.0003, 0.0013, 0.02, 0.11, 1.0, 77.0, 6000.0, 123456.0])
def test_the_labels_of_histograms_do_not_touch(scale):
    layers = {f"maxpool2d_{k}": scale * (random(50) + k) for k in range(8)}
    figure = figures.activation_histograms({"before training": layers, "after training": layers})
    figures.content_of(figure, "png")  # this draws it
    boxes = []
    for axes in figure.axes:
        left, right = axes.get_xlim()
        ticks = [label for label in axes.get_xticklabels() if left <= label.get_position()[0] <= right]
        assert len(ticks) >= 2
        texts = [axes.title, *ticks]
        boxes += [text.get_window_extent().padded(5) for text in texts if text.get_text()]
    touching = [one for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    assert touching == []


RECORDS = [
    {"step": 1, "epoch": 1, "loss": 9.0, "accuracy": 0.1, "lr": 0.1},
    *(
        {
            "step": 5 * epoch,
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "train_accuracy": 0.1 * epoch,
            "validation_loss": 2 / epoch,
            "validation_accuracy": 0.2 * epoch,
        }
        for epoch in (1, 2, 3)
    ),
    {"step": 15, "test_loss": 0.1, "test_accuracy": 0.9},
]


@pytest.mark.parametrize("as_file", [False, True])
def test_curves_show_the_epochs(as_file, tmp_path):
    metrics = RECORDS
    if as_file:
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    figure = figures.curves(metrics)
    assert titles(figure) == ["loss", "accuracy"]
    for axes, of_train, of_validation in zip(
        figure.axes, ([1, 1 / 2, 1 / 3], [0.1, 0.2, 0.1 * 3]), ([2, 1, 2 / 3], [0.2, 0.4, 0.2 * 3]), strict=True
    ):
        train, validation = axes.lines
        assert (train.get_label(), validation.get_label()) == ("train", "validation")
        assert list(train.get_xdata()) == [1, 2, 3]
        assert list(train.get_ydata()) == of_train
        assert list(validation.get_ydata()) == of_validation


@pytest.mark.parametrize("content", [None, "no json\n", '{"step": 1}\n'])
def test_metrics_without_curves_are_one_clear_error(content, tmp_path):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError):
        figures.curves(path)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'distdl-mpi\[plots\]'"):
        figures.confusion(np.eye(2))


def test_figures_need_no_display_and_leave_no_global_state(tmp_path):
    import sys

    figures.filters(network_of()).savefig(tmp_path / "filters.png")
    assert (tmp_path / "filters.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "matplotlib.pyplot" not in sys.modules
