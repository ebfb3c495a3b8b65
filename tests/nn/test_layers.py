"""Affine, the activations, dropout, the loss and the initializers follow the book."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distdl.errors import UserError
from distdl.nn import (
    Affine,
    Dropout,
    Flatten,
    He,
    Normal,
    ReLU,
    Sigmoid,
    SoftmaxCrossEntropy,
    Workspace,
    Xavier,
    Zeros,
    count_correct,
)
from distdl.rng import Key

from . import oracles
from .oracles import built, normal, relative_error


@pytest.mark.parametrize(("N", "inputs", "outputs"), [(1, 1, 1), (1, 7, 3), (16, 20, 10), (5, 3, 8)])
def test_affine_in_float32_is_within_1e_5_of_plain_loops(N, inputs, outputs):
    layer = built(Affine(outputs), (inputs,), np.float32)
    x, dy = normal((N, inputs), dtype=np.float32), normal((N, outputs), "dy", np.float32)
    weight, bias = layer.parameters["weight"], layer.parameters["bias"]
    y = layer.forward(x, training=True, key=None)
    assert relative_error(y, oracles.affine(x, weight, bias)) < 1e-5
    actual = (layer.backward(dy), layer.gradients["weight"], layer.gradients["bias"])
    for a, e in zip(actual, oracles.affine_gradients(x, weight, dy), strict=True):
        assert a.dtype == np.float32
        assert relative_error(a, e) < 1e-5


def test_the_three_layer_network_of_the_book():
    """Section 3.4: first layer and its sigmoid."""
    layer = built(Affine(3), (2,))
    layer.parameters["weight"][...] = [[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]]
    layer.parameters["bias"][...] = [0.1, 0.2, 0.3]
    a = layer.forward(np.array([[1.0, 0.5]]), training=False, key=None)
    assert a == pytest.approx(np.array([[0.3, 0.7, 1.1]]))
    z = built(Sigmoid(), (3,)).forward(a, training=False, key=None)
    assert z == pytest.approx(np.array([[0.57444252, 0.66818777, 0.75026011]]))


def test_relu_passes_no_gradient_at_zero():
    layer = built(ReLU(), (5,))
    assert layer.forward(np.array([[-2.0, -0.0, 0.0, 1e-300, 3.0]]), training=True, key=None).tolist() == [
        [0, 0, 0, 1e-300, 3]
    ]
    assert layer.backward(np.arange(1.0, 6).reshape(1, 5)).tolist() == [[0, 0, 0, 4, 5]]


def test_sigmoid_does_not_overflow():
    layer = built(Sigmoid(), (5,), np.float32)
    y = layer.forward(np.array([[-np.inf, -1e4, -90, 1e4, np.inf]], np.float32), training=True, key=None)
    assert y[0] == pytest.approx([0, 0, 0, 1, 1], rel=0, abs=1e-38)
    assert layer.backward(np.ones((1, 5), np.float32))[0] == pytest.approx([0] * 5, rel=0, abs=1e-38)
    assert np.isnan(layer.forward(np.full((1, 5), np.nan, np.float32), training=True, key=None)).all()


@pytest.mark.parametrize(("dtype", "least", "tolerance"), [(np.float32, -87, 5e-7), (np.float64, -708, 1e-15)])
def test_sigmoid_is_exact_in_both_tails(dtype, least, tolerance):
    x = np.linspace(least, 50, 10_001).astype(dtype)
    layer = built(Sigmoid(), x.shape, dtype)
    y = layer.forward(x[None], training=True, key=None)[0]
    exact = np.array([math.exp(z) / (1 + math.exp(z)) for z in x.tolist()])
    assert np.abs(y / exact - 1).max() < tolerance
    dx = layer.backward(np.ones((1, x.size), dtype))[0]
    left = x < -1
    assert np.abs(dx[left] / (exact * (1 - exact))[left] - 1).max() < tolerance


def test_flatten_keeps_the_order_height_width_channels():
    layer = built(Flatten(), (2, 3, 2))
    x = np.arange(24.0).reshape(2, 2, 3, 2)
    y = layer.forward(x, training=True, key=None)
    assert y.tolist() == [list(range(12)), list(range(12, 24))]
    assert (layer.backward(y) == x).all()


def test_layers_do_not_change_their_arguments():
    for layer in (Affine(4), ReLU(), Sigmoid(), Dropout(0.3), Flatten()):
        built(layer, (6,))
        x = normal((3, 6))
        dy = normal(layer.forward(x, training=True, key=Key(0)).shape, "dy")
        layer.backward(dy)
        assert (x == normal((3, 6))).all()
        assert (dy == normal(dy.shape, "dy")).all()


def test_the_dropout_mask_depends_on_the_key_alone():
    one, other = built(Dropout(0.5), (1000,)), built(Dropout(0.5), (1000,))
    x = np.ones((4, 1000))
    key = Key(3).of("step", 9)
    masks = one.forward(x, training=True, key=key).copy()
    one.forward(x, training=True, key=Key(3).of("step", 10))
    assert (one.forward(x, training=True, key=key) == masks).all()
    assert (other.forward(-x, training=True, key=key) == -masks).all()
    assert (other.forward(x, training=True, key=Key(4).of("step", 9)) != masks).any()


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(ratio):
    layer = built(Dropout(ratio), (100_000,))
    x = np.ones((1, 100_000))
    y = layer.forward(x, training=True, key=Key(0)).copy()
    assert (y == 0).mean() == pytest.approx(ratio, abs=0.01)
    assert set(np.unique(y)) <= {0.0, 1 / (1 - ratio)}
    assert y.mean() == pytest.approx(1, abs=0.03)
    assert (layer.backward(x) == y).all(), "the gradient passes at the same elements as the value"


def test_dropout_passes_everything_in_evaluation():
    layer = built(Dropout(0.5), (10,))
    x = normal((2, 10))
    assert (layer.forward(x, training=False, key=None) == x).all()
    assert (layer.backward(x) == x).all()


def test_dropout_without_a_key_in_training_is_an_error():
    with pytest.raises(ValueError, match="pass key="):
        built(Dropout(0.5), (10,)).forward(normal((2, 10)), training=True, key=None)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_a_dropout_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(UserError, match="expected at least 0 and below 1"):
        Dropout(ratio)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1, 100, 1e30])
def test_the_loss_is_the_summed_cross_entropy_and_does_not_overflow(dtype, scale):
    logits = (scale * normal((6, 10))).astype(dtype)
    labels = np.array([0, 9, 3, 3, 5, 1])
    loss = SoftmaxCrossEntropy()
    expected, gradient = oracles.softmax_cross_entropy(logits, labels)
    assert loss.forward(logits, labels) == pytest.approx(expected, rel=1e-12)
    assert loss.backward().dtype == dtype
    assert relative_error(loss.backward(), gradient) < 1e-6


def test_losses_and_gradients_of_parts_add_up_to_those_of_the_whole():
    logits, labels = normal((8, 4)), np.arange(8) % 4
    loss = SoftmaxCrossEntropy()
    parts = [(loss.forward(logits[i : i + 2], labels[i : i + 2]), loss.backward()) for i in range(0, 8, 2)]
    assert loss.forward(logits, labels) == pytest.approx(sum(value for value, _ in parts), rel=1e-14)
    assert np.concatenate([d for _, d in parts]) == pytest.approx(loss.backward(), rel=1e-14)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 4]), r"labels lie in 0 \.\. 4; expected 0 \.\. 3"),
        (np.array([-1, 0]), r"labels lie in -1 \.\. 0"),
        (np.array([0, 1, 2]), "expected 2 integers"),
        (np.array([0.0, 1.0]), "labels are float64"),
    ],
)
def test_labels_outside_the_classes_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        SoftmaxCrossEntropy().forward(np.zeros((2, 4)), labels)


def test_the_first_of_equal_logits_is_the_prediction():
    logits = np.array([[1, 1, 0], [0, 2, 2], [0, 0, 5]], np.float32)
    assert count_correct(logits, np.array([0, 1, 2])) == 3
    assert count_correct(logits, np.array([1, 2, 2])) == 1


@pytest.mark.parametrize(
    ("initializer", "std"),
    [(Normal(), 0.01), (Normal(0.02), 0.02), (Normal(1.0), 1.0), (Xavier(), 1 / 20), (He(), math.sqrt(2) / 20)],
)
def test_initializers_have_the_standard_deviation_of_the_book(initializer, std):
    w = initializer(Key(0), (400, 250), 400)
    assert w.shape == (400, 250)
    assert w.dtype == np.float64
    assert w.std() == pytest.approx(std, rel=0.01)
    assert abs(w.mean()) < 0.02 * std
    assert (w == initializer(Key(0), (400, 250), 400)).all()
    assert (w != initializer(Key(1), (400, 250), 400)).any()


def test_zeros_are_zeros():
    assert (Zeros()(Key(0), (3, 2), 3) == np.zeros((3, 2))).all()


def test_a_workspace_makes_each_array_once_and_aligned():
    workspace = Workspace(np.float32)
    array = workspace.array("y", (3, 5), fill=2)
    assert (array == 2).all()
    array[...] = 1
    assert workspace.array("y", (3, 5), fill=2) is array
    assert workspace.array("y", (5, 3)) is not array
    assert workspace.array("x", (3, 5)) is not array
    assert array.ctypes.data % 64 == 0
