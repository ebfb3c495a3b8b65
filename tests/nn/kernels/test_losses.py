"""Compiled losses: the bits of their formulas, and the meaning of the definitions."""

import numpy as np
import pytest

pytest.importorskip("numba")
from distdl.errors import UserError
from distdl.nn import MeanSquaredError, SigmoidCrossEntropy, SoftmaxCrossEntropy
from distdl.nn.kernels import NUMPY
from distdl.nn.kernels.compiled import COMPILED
from distdl.nn.losses import count_correct

from . import oracles_functions as oracles
from .exact import assert_same_bits, numbers

WEIGHTS = np.random.default_rng(5).uniform(0.1, 3, 300)


def labels_of(shape, classes, *, missing=0.0):
    rng = np.random.default_rng(2)
    labels = rng.integers(0, classes, shape)
    labels[rng.random(shape) < missing] = -1
    return labels


def softmax_case(shape, *, missing=0.0, special=0.0, **settings):
    outputs = numbers(shape, 1, special) * (1 if special else 4)
    return SoftmaxCrossEntropy(**settings), outputs, labels_of(shape[:-1], shape[-1], missing=missing)


def oracle(loss, outputs, targets):
    if isinstance(loss, SoftmaxCrossEntropy):
        return oracles.softmax_cross_entropy(outputs, targets, loss.label_smoothing, loss.class_weights)
    if isinstance(loss, SigmoidCrossEntropy):
        return oracles.sigmoid_cross_entropy(outputs, targets, loss.class_weights)
    return oracles.mean_squared_error(outputs, targets)


CASES = {
    "one": softmax_case((1, 1)),
    "digits": softmax_case((64, 10)),
    "many classes": softmax_case((20, 300), class_weights=WEIGHTS),
    "smoothed": softmax_case((5, 7), label_smoothing=0.1, class_weights=WEIGHTS[:7]),
    "pixels": softmax_case((3, 2, 5, 4)),
    "pixels without label": softmax_case((6, 3, 2, 4), missing=0.7, label_smoothing=0.2, class_weights=WEIGHTS[:4]),
    "binary": (SigmoidCrossEntropy(), 9 * numbers((40, 1)), labels_of(40, 2)),
    "weighted binary": (SigmoidCrossEntropy(class_weights=WEIGHTS[:2]), 9 * numbers((40, 1)), labels_of(40, 2)),
    "numbers": (MeanSquaredError(), numbers((7, 3)), numbers((7, 3), 4)),
    "images of numbers": (MeanSquaredError(), numbers((2, 3, 2, 1)), numbers((2, 3, 2, 1), 4).astype(np.float64)),
    "no sample": softmax_case((0, 3)),
}
SPECIAL = {
    "rows": softmax_case((200, 6), special=0.1),
    "pixels": softmax_case((4, 5, 5, 3), special=0.02, missing=0.2),
    "binary": (SigmoidCrossEntropy(), numbers((200, 1), 3, 0.5), labels_of(200, 2)),
    "numbers": (MeanSquaredError(), numbers((50, 2), 3, 0.2), numbers((50, 2), 4)),
}


@pytest.mark.parametrize(
    "case", [*CASES.values(), *SPECIAL.values()], ids=[*CASES, *(f"special {one}" for one in SPECIAL)]
)
def test_a_loss_has_the_bits_of_its_formula(case):
    loss, outputs, targets = case
    compiled = COMPILED.loss(loss)
    assert type(compiled) is not type(loss)
    value, gradient = oracle(loss, outputs, targets)
    assert np.float64(compiled.forward(outputs, targets)).tobytes() == np.float64(value).tobytes() or np.isnan(value)
    assert_same_bits(compiled.backward(), gradient)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_loss_means_what_its_definition_means(case):
    loss, outputs, targets = case
    compiled = COMPILED.loss(loss)
    assert compiled.forward(outputs, targets) == pytest.approx(loss.forward(outputs, targets), rel=1e-14)
    np.testing.assert_allclose(compiled.backward(), loss.backward(), rtol=3e-7, atol=1e-12)
    assert compiled.count_correct(outputs, targets) == loss.count_correct(outputs, targets)


@pytest.mark.parametrize("case", SPECIAL.values(), ids=SPECIAL)
def test_infinities_and_nan_reach_the_loss_and_the_gradient_as_in_the_definition(case):
    loss, outputs, targets = case
    compiled = COMPILED.loss(loss)
    with np.errstate(all="ignore"):
        value = loss.forward(outputs, targets)
    np.testing.assert_equal(compiled.forward(outputs, targets), value)
    np.testing.assert_array_equal(np.isnan(compiled.backward()), np.isnan(loss.backward()))
    assert compiled.count_correct(outputs, targets) == loss.count_correct(outputs, targets)


def test_the_first_of_equal_outputs_is_the_prediction():
    outputs = numbers((300, 4)).round().astype(np.float32)
    labels = labels_of(300, 4)
    assert COMPILED.loss(SoftmaxCrossEntropy()).count_correct(outputs, labels) == count_correct(outputs, labels)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (SoftmaxCrossEntropy(), np.zeros((2, 3), np.float32), np.array([0, 3])),
        (SoftmaxCrossEntropy(), np.zeros((2, 3), np.float32), np.array([0, -1])),
        (SoftmaxCrossEntropy(), np.zeros((2, 3), np.float32), np.array([0.0, 1.0])),
        (SoftmaxCrossEntropy(), np.zeros((1, 2, 3), np.float32), np.array([[0, -2]])),
        (SigmoidCrossEntropy(), np.zeros((2, 1), np.float32), np.array([0, 2])),
        (SigmoidCrossEntropy(), np.zeros((2, 2), np.float32), np.array([0, 1])),
        (MeanSquaredError(), np.zeros((2, 1), np.float32), np.zeros((2, 2))),
    ],
)
def test_wrong_targets_are_refused_as_by_the_definition(loss, outputs, targets):
    messages = []
    for one in (loss, COMPILED.loss(loss)):
        with pytest.raises(UserError) as found:
            one.forward(outputs, targets)
        messages.append(str(found.value))
    assert messages[0] == messages[1]


def test_a_loss_of_another_class_and_the_numpy_form_stay_as_they_are():
    class Own(SoftmaxCrossEntropy):
        pass

    for kernels, loss in ((COMPILED, Own()), (NUMPY, SoftmaxCrossEntropy())):
        assert kernels.loss(loss) is loss


def test_float64_outputs_are_computed_by_the_definition():
    loss, outputs, targets = CASES["digits"]
    outputs = outputs.astype(np.float64)
    compiled = COMPILED.loss(loss)
    assert compiled.forward(outputs, targets) == loss.forward(outputs, targets)
    assert compiled.backward().dtype == np.float64
