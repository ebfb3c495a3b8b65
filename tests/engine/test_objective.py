"""Training minimizes the smoothed and weighted loss; validation and test report the plain one."""

import dataclasses

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.data import Dataset
from distdl.engine import objective, train
from distdl.engine.objective import balanced_weights, training_loss
from distdl.engine.user_code import read_data
from distdl.errors import UserError
from distdl.nn import Affine, Flatten, Sequential, SoftmaxCrossEntropy
from distdl.parallel import OneProcess
from distdl.rng import Key

CONFIG = TrainConfig(batch_size=8, micro_batch_size=3, epochs=2, lr=0.01, optimizer="sgd")


def dataset(counts=(60, 25, 15), **changed):
    """Return random images, with so many of each class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = Key(1).normal(len(labels) * 12).reshape(-1, 3, 4, 1).astype(np.float32)
    return dataclasses.replace(Dataset("rare", images, labels, len(counts), None), **changed)


def build(shape, outputs):
    return Sequential([Flatten(), Affine(outputs)], shape)


def weights_by_hand(labels, classes):
    """Return scikit-learn's formula in plain Python."""
    found = [int((labels == k).sum()) for k in range(classes)]
    occurring = sum(n > 0 for n in found)
    return [sum(found) / (occurring * n) if n else 0.0 for n in found]


@pytest.mark.parametrize("counts", [(60, 25, 15), (50, 50), (70, 0, 30)])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_balanced_weights_are_those_of_the_training_part(counts, block, monkeypatch):
    monkeypatch.setattr(objective, "BLOCK", block)
    data = read_data(CONFIG, dataset(counts))
    training = data.labels[data.parts.training]
    found = balanced_weights(data)
    assert found.tolist() == weights_by_hand(training, len(counts))
    assert found[training].mean() == pytest.approx(1)


def test_pixels_without_a_label_do_not_count():
    labels = (Key(2).words(100 * 12) % np.uint64(3)).astype(np.int64).reshape(100, 3, 4)
    data = read_data(CONFIG, dataset(labels=labels, classes=3))
    data.labels[:, 1] = -1
    training = data.labels[data.parts.training]
    assert balanced_weights(data).tolist() == weights_by_hand(training[training >= 0], 3)


def test_scikit_learn_gives_the_same_weights():
    weights = pytest.importorskip("sklearn.utils.class_weight")
    data = read_data(CONFIG, dataset())
    expected = weights.compute_class_weight("balanced", classes=np.arange(3), y=data.labels[data.parts.training])
    assert balanced_weights(data) == pytest.approx(expected)


def test_without_settings_training_minimizes_the_plain_loss():
    loss = training_loss(CONFIG, read_data(CONFIG, dataset()))
    assert isinstance(loss, SoftmaxCrossEntropy)
    assert (loss.label_smoothing, loss.class_weights) == (0, None)


@pytest.mark.parametrize("settings", [{"label_smoothing": 0.2}, {"class_weights": "balanced"}])
def test_only_the_training_loss_has_the_settings(tmp_path, settings):
    """With a rate near 0 the weights stay, so the losses are those of the first weights."""
    config = dataclasses.replace(CONFIG, lr=1e-30, run_dir=tmp_path / "run", **settings)
    data = read_data(config, dataset())
    summary = train(config, OneProcess(), dataset=dataset(), build_network=build)
    network = build((3, 4, 1), 3)
    network.initialize(Key(config.seed).of("initialization"))

    def mean_loss(part, loss):
        outputs = network.forward(data.normalization.apply(data.images[part]))
        return loss.forward(outputs, data.labels[part]) / len(part)

    parts, plain = data.parts, SoftmaxCrossEntropy()
    assert summary.validation_loss == pytest.approx(mean_loss(parts.validation, plain), rel=1e-5)
    assert summary.test_loss == pytest.approx(mean_loss(parts.test, plain), rel=1e-5)
    assert summary.train_loss == pytest.approx(mean_loss(parts.training, training_loss(config, data)), rel=1e-5)
    assert abs(summary.train_loss - mean_loss(parts.training, plain)) > 0.001


def test_balanced_weights_find_a_rare_class(tmp_path):
    """Of two overlapping classes, the plain loss neglects the rare one."""
    counts = (570, 30)
    blurred = dataset(counts)
    blurred.images[-30:] += 0.4

    def found(**settings):
        config = dataclasses.replace(CONFIG, batch_size=64, epochs=20, lr=0.1, **settings)
        folder = tmp_path / config.class_weights
        network = {}

        def kept(shape, outputs):
            network["it"] = build(shape, outputs)
            return network["it"]

        train(dataclasses.replace(config, run_dir=folder), OneProcess(), dataset=blurred, build_network=kept)
        data = read_data(config, blurred)
        rare = data.labels == 1
        predicted = network["it"].forward(data.normalization.apply(data.images)).argmax(axis=1)
        return (predicted[rare] == 1).mean()

    assert found(class_weights="balanced") > 0.6 > 0.4 > found()


NUMBERS = {"labels": np.full((100, 2), 0.5, np.float32), "classes": 2}


@pytest.mark.parametrize(
    ("changed", "settings", "said"),
    [
        (NUMBERS, {"label_smoothing": 0.1}, "--label-smoothing is for --loss cross_entropy, and rare is trained with"),
        (
            NUMBERS,
            {"class_weights": "balanced"},
            "--class-weights is for --loss binary_cross_entropy and cross_entropy",
        ),
        (
            {"labels": np.arange(100) % 2, "classes": 2},
            {"loss": "binary_cross_entropy", "label_smoothing": 0.1},
            "rare is trained with binary_cross_entropy: leave the flag out",
        ),
    ],
)
def test_a_setting_that_does_not_fit_the_loss_is_refused(tmp_path, changed, settings, said):
    config = dataclasses.replace(CONFIG, run_dir=tmp_path / "run", **settings)
    with pytest.raises(UserError, match=said):
        train(config, OneProcess(), dataset=dataset(**changed), build_network=build)
    assert not list(tmp_path.iterdir())
