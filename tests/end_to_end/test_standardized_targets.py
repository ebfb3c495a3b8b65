"""With `--standardize-targets` a network learns numbers of any unit; its predictions have the unit of the labels."""

import dataclasses

import numpy as np
import pytest
from small_runs import piece_of_digits, small_config

from distdl.config import TrainConfig
from distdl.data.split import split
from distdl.engine import train
from distdl.engine.user_code import read_data
from distdl.errors import UserError
from distdl.inference.load import load
from distdl.inference.score import evaluate
from distdl.nn import Affine, Flatten, ReLU, Sequential
from distdl.parallel import OneProcess
from distdl.rng import Key

ROWS = 600


def build(shape, outputs):
    return Sequential([Flatten(), Affine(32), ReLU(), Affine(outputs)], shape)


def measured():
    """Return digits with three numbers each: row and column of the ink's center in nanometres, and a constant."""
    digits = piece_of_digits(ROWS)
    images = digits.images[..., 0].astype(np.float64)
    ink = images.sum(axis=(1, 2))
    centers = [np.tensordot(images.sum(axis=axis), np.arange(8.0), 1) / ink for axis in (2, 1)]
    labels = np.stack([250_000 * centers[0] + 7e6, -250_000 * centers[1], np.full(len(ink), 3.0)], axis=1)
    return dataclasses.replace(digits, name="centers", labels=labels.astype(np.float32), classes=3)


def run(folder, dataset, **settings):
    config = small_config(folder, **{"lr": 0.01, "epochs": 4, **settings})
    return train(config, OneProcess(), dataset=dataset, build_network=build)


def by_hand(dataset):
    """Return mean and deviation of each number over the training part, in the plain form."""
    training = dataset.labels[split(dataset.labels, dataset.test_start, Key(0)).training].astype(np.float64)
    deviation = np.sqrt(((training - training.mean(axis=0)) ** 2).mean(axis=0))
    return training.mean(axis=0).astype(np.float32), np.where(deviation, deviation, 1).astype(np.float32)


def test_the_training_has_the_bits_of_one_on_labels_standardized_by_hand(tmp_path):
    dataset = measured()
    mean, deviation = by_hand(dataset)
    plain = dataclasses.replace(dataset, labels=(dataset.labels - mean) / deviation)
    expected = run(tmp_path / "by hand", plain)
    found = run(tmp_path / "run", dataset, standardize_targets=True)
    same = ("weights_sha256", "train_loss", "validation_loss", "test_loss")
    assert [getattr(found, name) for name in same] == [getattr(expected, name) for name in same]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "by hand/metrics.jsonl").read_bytes()
    assert found.test_loss < 0.2, "as a share of the variance; without the flag it is 1e10"


def test_predictions_have_the_unit_of_the_labels_and_the_score_is_that_of_the_run(tmp_path):
    dataset, folder = measured(), tmp_path / "run"
    summary = run(folder, dataset, standardize_targets=True)
    mean, deviation = by_hand(dataset)
    [trained] = load([folder], OneProcess(), dataset=dataset, build_network=build)
    found = evaluate([trained], "test", OneProcess())
    assert found.ensemble.loss == summary.test_loss
    assert np.array_equal(found.labels, dataset.labels[found.rows])
    error = (found.predictions - found.labels) / deviation
    assert (error * error).mean() == pytest.approx(summary.test_loss, rel=1e-3)
    images = trained.data.normalization.apply(dataset.images[found.rows])
    outputs = trained.network.forward(images).astype(np.float64)
    assert found.probabilities == pytest.approx(outputs * deviation + mean, rel=1e-5)
    twice = evaluate([trained, trained], "test", OneProcess())
    assert twice.ensemble.loss == pytest.approx(summary.test_loss, rel=1e-6)


def test_runs_of_one_seed_may_differ_in_the_setting_and_are_evaluated_together(tmp_path):
    dataset, settings = measured(), [{"standardize_targets": True}, {"lr": 1e-9}]
    summaries = [run(tmp_path / str(i), dataset, **one) for i, one in enumerate(settings)]
    trained = load([tmp_path / "0", tmp_path / "1"], OneProcess(), dataset=dataset, build_network=build)
    found = evaluate(trained, "test", OneProcess())
    assert [score.loss for score in found.scores] == [one.test_loss for one in summaries]


def test_the_checkpoint_holds_mean_and_deviation(tmp_path):
    dataset = measured()
    data = read_data(TrainConfig(standardize_targets=True), dataset)
    mean, deviation = by_hand(dataset)
    signature = data.signature()
    assert signature.target_mean == tuple(mean.tolist())
    assert signature.target_deviation == tuple(deviation.tolist())
    assert read_data(TrainConfig(), dataset).signature().target_mean is None


def test_labels_of_classes_are_not_standardized(tmp_path):
    said = "--standardize-targets is for numbers, and digits has labels of classes: leave the flag out"
    with pytest.raises(UserError, match=said):
        train(small_config(tmp_path / "run", standardize_targets=True), OneProcess())
    assert not list(tmp_path.iterdir())
