"""Every loss is the sum over samples of its formula, with the gradient of this sum; both equal PyTorch's."""

import math
from functools import partial

import numpy as np
import pytest

from distdl.arrays import NO_LABEL
from distdl.errors import UserError
from distdl.nn import LOSSES, MeanSquaredError, SigmoidCrossEntropy, SoftmaxCrossEntropy, make_loss
from distdl.rng import Key


def normal(*shape):
    return Key(3).normal(int(np.prod(shape))).reshape(shape)


def labels(*shape, classes):
    return (Key(4).words(int(np.prod(shape))) % np.uint64(classes)).astype(np.int64).reshape(shape)


def with_gaps(labels):
    """Return the labels without some: two of the first sample, none of the second, all of the third."""
    labels = labels.copy()
    labels[0, 0, 1] = labels[0, 2, 0] = NO_LABEL
    labels[2] = NO_LABEL
    return labels


CASES = {
    "labels": (SoftmaxCrossEntropy, normal(5, 4), labels(5, classes=4)),
    "a label per pixel": (SoftmaxCrossEntropy, normal(2, 3, 2, 4), labels(2, 3, 2, classes=4)),
    "some pixels without a label": (SoftmaxCrossEntropy, normal(3, 3, 2, 4), with_gaps(labels(3, 3, 2, classes=4))),
    "two classes": (SigmoidCrossEntropy, 3 * normal(7, 1), labels(7, classes=2)),
    "numbers": (MeanSquaredError, normal(5, 3), 2 * normal(5, 3)[::-1]),
    "no samples": (SoftmaxCrossEntropy, normal(0, 4), labels(0, classes=4)),
}
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.5])
SMOOTHED = partial(SoftmaxCrossEntropy, label_smoothing=0.1)
WEIGHTED = partial(SoftmaxCrossEntropy, class_weights=WEIGHTS)
BOTH = partial(SoftmaxCrossEntropy, label_smoothing=0.3, class_weights=WEIGHTS)
WEIGHTED_SIGMOID = partial(SigmoidCrossEntropy, class_weights=WEIGHTS[:2])
#: The kind of loss, its outputs, its targets, and its settings.
WITH_SETTINGS = {
    f"{case}, {settings}": (kind, *CASES[case][1:])
    for settings, kind in {"smoothed": SMOOTHED, "weighted": WEIGHTED, "both": BOTH}.items()
    for case in ("labels", "a label per pixel", "some pixels without a label", "no samples")
} | {"two classes, weighted": (WEIGHTED_SIGMOID, *CASES["two classes"][1:])}


@pytest.mark.parametrize("case", CASES | WITH_SETTINGS)
def test_the_gradient_belongs_to_the_value(case):
    kind, outputs, targets = (CASES | WITH_SETTINGS)[case]
    loss, h = kind(), 1e-6
    loss.forward(outputs, targets)
    found = loss.backward()
    for place in np.ndindex(outputs.shape):
        above, below = outputs.copy(), outputs.copy()
        above[place] += h
        below[place] -= h
        difference = (kind().forward(above, targets) - kind().forward(below, targets)) / (2 * h)
        assert found[place] == pytest.approx(difference, abs=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_pytorchs(case):
    torch = pytest.importorskip("torch")
    kind, outputs, targets = CASES[case]
    if not len(outputs):
        pytest.skip("PyTorch's mean over zero samples is NaN")
    theirs = torch.tensor(outputs, requires_grad=True)
    if kind is SoftmaxCrossEntropy:
        pairs = zip(theirs.unbind(), torch.tensor(targets).unbind(), strict=True)
        # PyTorch's mean is over all pixels of a batch; ours is over samples, and each sample's loss is a mean.
        means = [
            torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), label.reshape(-1), ignore_index=-1)
            for logits, label in pairs
            if (label >= 0).any()
        ]
        value = torch.stack(means).sum() / len(outputs)
    elif kind is SigmoidCrossEntropy:
        value = torch.nn.functional.binary_cross_entropy_with_logits(theirs[:, 0], torch.tensor(targets).double())
    else:
        value = torch.nn.functional.mse_loss(theirs, torch.tensor(targets.copy()))
    value.backward()
    loss = kind()
    assert loss.forward(outputs, targets) / len(outputs) == pytest.approx(value.item(), rel=1e-12)
    assert loss.backward() / len(outputs) == pytest.approx(theirs.grad.numpy(), abs=1e-12)


def cross_entropy_by_the_formula(outputs, targets, label_smoothing=0.0, class_weights=None):
    """Return the sum over samples of the mean over their labels of w[label] · -Σ q[k] log p[k], in plain Python."""
    total = 0.0
    for logits, of_sample in zip(outputs, targets, strict=True):
        pairs = zip(logits.reshape(-1, logits.shape[-1]).tolist(), of_sample.reshape(-1).tolist(), strict=True)
        losses = []
        for z, label in pairs:
            if label == NO_LABEL:
                continue
            logarithm = math.log(sum(map(math.exp, z)))
            spread = label_smoothing / len(z)
            loss = -sum(((k == label) * (1 - label_smoothing) + spread) * (z[k] - logarithm) for k in range(len(z)))
            losses.append(loss * (1 if class_weights is None else class_weights[label]))
        total += sum(losses) / max(len(losses), 1)
    return total


@pytest.mark.parametrize("case", WITH_SETTINGS)
def test_smoothing_and_weights_follow_their_formula(case):
    kind, outputs, targets = WITH_SETTINGS[case]
    if kind is WEIGHTED_SIGMOID:
        outputs = np.concatenate([np.zeros_like(outputs), outputs], axis=1)
    expected = cross_entropy_by_the_formula(outputs, targets, **kind.keywords)
    assert kind().forward(WITH_SETTINGS[case][1], targets) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", [SoftmaxCrossEntropy, SigmoidCrossEntropy])
def test_weights_of_1_give_the_bits_of_the_plain_loss(kind):
    _, outputs, targets = CASES["labels" if kind is SoftmaxCrossEntropy else "two classes"]
    plain, weighted = kind(), kind(class_weights=np.ones(4))
    assert plain.forward(outputs, targets) == weighted.forward(outputs, targets)
    assert plain.backward().tobytes() == weighted.backward().tobytes()


def test_smoothing_equals_pytorchs():
    torch = pytest.importorskip("torch")
    _, outputs, targets = CASES["labels"]
    theirs = torch.tensor(outputs, requires_grad=True)
    value = torch.nn.functional.cross_entropy(theirs, torch.tensor(targets), label_smoothing=0.1, reduction="sum")
    value.backward()
    ours = SMOOTHED()
    assert ours.forward(outputs, targets) == pytest.approx(value.item(), rel=1e-12)
    assert ours.backward() == pytest.approx(theirs.grad.numpy(), abs=1e-12)


def test_the_loss_of_a_sample_is_the_mean_over_its_pixels():
    """An image of many equal pixels has the loss of a sample with one label."""
    logits, label = normal(3, 4), labels(3, classes=4)
    expected = SoftmaxCrossEntropy().forward(logits, label)
    wide = np.repeat(logits[:, None, None], 6, axis=1)
    assert SoftmaxCrossEntropy().forward(wide, np.repeat(label[:, None, None], 6, axis=1)) == pytest.approx(expected)


def test_a_position_without_a_label_has_no_effect():
    logits, all_labels = normal(2, 3, 2, 4), labels(2, 3, 2, classes=4)
    some = all_labels.copy()
    some[:, 2] = NO_LABEL
    loss, rest = SoftmaxCrossEntropy(), SoftmaxCrossEntropy()
    assert loss.forward(logits, some) == pytest.approx(rest.forward(logits[:, :2], all_labels[:, :2]), rel=1e-14)
    np.testing.assert_allclose(loss.backward()[:, :2], rest.backward(), rtol=1e-14)
    assert not loss.backward()[:, 2].any()
    # Two thirds of the positions count, and their share of correct predictions stands for all.
    correct = [rest.count_correct(logits[n : n + 1, :2], all_labels[n : n + 1, :2]) for n in range(2)]
    assert 0 < sum(correct) < 8
    assert loss.count_correct(logits, some) == sum((2 * 6 * one + 4) // 8 for one in correct)


def test_labels_at_all_positions_give_the_bits_of_the_plain_mean():
    logits, of_pixels = normal(2, 3, 2, 4), labels(2, 3, 2, classes=4)
    loss, flat = SoftmaxCrossEntropy(), SoftmaxCrossEntropy()
    assert loss.forward(logits, of_pixels) == flat.forward(logits.reshape(-1, 4), of_pixels.reshape(-1)) / 6
    assert (loss.backward() == flat.backward().reshape(logits.shape) / 6).all()


def test_large_logits_do_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        loss = SigmoidCrossEntropy()
        assert loss.forward(np.array([[1e4], [-1e4], [1e4]]), np.array([1, 0, 0])) == 1e4
        assert loss.backward().tolist() == [[0.0], [0.0], [1.0]]
        assert SoftmaxCrossEntropy().forward(np.array([[1e4, -1e4]]), np.array([1])) == 2e4


def test_correct_predictions_are_counted():
    assert SigmoidCrossEntropy().count_correct(np.array([[1.0], [-1.0], [1.0], [0.0]]), np.array([1, 0, 0, 0])) == 3
    pixels = np.zeros((1, 2, 2, 3))
    pixels[0, 0, :, 2] = 1
    assert SoftmaxCrossEntropy().count_correct(pixels, np.array([[[2, 1], [0, 2]]])) == 2
    nothing = np.full((1, 2, 2), NO_LABEL)
    assert SoftmaxCrossEntropy().count_correct(pixels, nothing) == 0
    assert SoftmaxCrossEntropy().count_correct(pixels, np.array([[[2, 2], [-1, -1]]])) == 4
    assert MeanSquaredError().count_correct(np.zeros((2, 1)), np.zeros((2, 1))) == 0


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "said"),
    [
        ("binary_cross_entropy", np.zeros((2, 2)), np.array([0, 1]), r"expected a single output .*\(2, 1\)"),
        ("binary_cross_entropy", np.zeros((2, 1)), np.array([0, 2]), r"2 integers that are 0 or 1"),
        ("binary_cross_entropy", np.zeros((2, 1)), np.array([0.0, 1.0]), r"labels are float64"),
        ("mean_squared_error", np.zeros((2, 1)), np.zeros(2), r"outputs are \(2, 1\), targets \(2,\)"),
        ("cross_entropy", np.zeros((2, 4)), np.array([0, -1]), r"labels lie in -1 .. 0; expected 0 .. 3"),
        ("cross_entropy", np.zeros((1, 2, 1, 4)), np.array([[[-2], [1]]]), r"labels lie in -2 .. 1; expected 0 .. 3"),
        (
            "cross_entropy",
            np.zeros((2, 3, 3, 4)),
            np.array([0, 1]),
            r"expected 18 integers, one per position of a sample",
        ),
    ],
)
def test_targets_that_do_not_fit_are_named(name, outputs, targets, said):
    with pytest.raises(UserError, match=said):
        make_loss(name).forward(outputs, targets)


def test_an_unknown_loss_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=f"unknown loss 'mse': expected one of {', '.join(sorted(LOSSES))}"):
        make_loss("mse")
