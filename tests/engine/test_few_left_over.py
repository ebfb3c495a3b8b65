"""The last batch of an epoch may have one or two samples: they do not spoil the running moments before validation."""

import dataclasses

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.data import Dataset
from distdl.data.batch_order import BatchOrder
from distdl.engine import train
from distdl.engine.requirements import ragged_batch_note
from distdl.engine.user_code import read_data
from distdl.inference.load import load
from distdl.inference.score import evaluate
from distdl.nn import Affine, BatchNorm, Flatten, ReLU, Sequential
from distdl.parallel import OneProcess
from distdl.rng import Key


def images_of_different_brightness(count, deviation):
    """Return images of three classes; the brightness of an image says nothing about its class."""
    labels = (Key(1).words(count) % np.uint64(3)).astype(np.int64)
    images = Key(2).normal(count * 64).reshape(count, 8, 8, 1)
    for k in range(3):
        images[labels == k, 2 * k : 2 * k + 2] += 1
    return (images + deviation * Key(3).normal(count).reshape(count, 1, 1, 1)).astype(np.float32), labels


def dataset(training, test=600, deviation=10):
    """Return data with so many samples in the training part."""
    images, labels = images_of_different_brightness(training + 30 + test, deviation)
    return Dataset("bright", images, labels, 3, test_start=training + 30, validation_start=training)


def first_normalized(shape, outputs):
    return Sequential([Flatten(), BatchNorm(), Affine(outputs)], shape)


def network(shape, outputs):
    return Sequential([Flatten(), Affine(50), BatchNorm(), ReLU(), Affine(outputs)], shape)


@pytest.mark.parametrize("left", [0, 1, 2, 5, 8, 20])
def test_a_step_with_less_than_a_micro_batch_moves_the_moments_in_proportion(tmp_path, left):
    """The oracle follows the moments of one feature per pixel through three batches, in float64."""
    config = TrainConfig(batch_size=24, micro_batch_size=8, epochs=1, lr=1e-30, run_dir=tmp_path / "run")
    given, found = dataset(48 + left), {}

    def build(shape, outputs):
        found["network"] = first_normalized(shape, outputs)
        return found["network"]

    train(config, OneProcess(), dataset=given, build_network=build)
    data = read_data(config, given)
    order = BatchOrder(data.parts.training, 24, Key(config.seed))
    mean, variance = np.zeros(64), np.ones(64)
    for step in range(order.steps_per_epoch):
        rows = order.rows(step)
        x = data.normalization.apply(data.images[rows]).reshape(len(rows), 64).astype(np.float64)
        if len(rows) > 1:
            weight = 0.1 * min(1, len(rows) / 8)
            mean += weight * (x.mean(axis=0) - mean)
            variance += weight * (x.var(axis=0, ddof=1) - variance)
    buffers = dict(found["network"].named_buffers())
    assert buffers["batchnorm_1.mean"] == pytest.approx(mean, abs=1e-5)
    assert buffers["batchnorm_1.variance"] == pytest.approx(variance, abs=1e-5)


@pytest.mark.parametrize("left", [1, 2])
@pytest.mark.parametrize("seed", [2, 3])
def test_the_moments_of_the_last_step_hardly_change_the_accuracy(tmp_path, left, seed):
    """The same weights are scored with the running moments before and after the last step of the last epoch."""
    config = TrainConfig(batch_size=134, epochs=40, lr=0.003, seed=seed)
    given = dataset(268 + left)

    def trained(folder, **settings):
        train(
            dataclasses.replace(config, run_dir=folder, **settings), OneProcess(), dataset=given, build_network=network
        )
        return load([folder], OneProcess(), dataset=given, build_network=network)

    def accuracy(one):
        return evaluate(one, "test", OneProcess()).ensemble.accuracy

    before, after = trained(tmp_path / "before", max_steps=40 * 3 - 1), trained(tmp_path / "after")
    found = accuracy(after)
    after[0].network.buffers[...] = before[0].network.buffers
    assert found == pytest.approx(accuracy(after), abs=0.01)


def test_a_run_suggests_a_batch_size_only_if_it_normalizes_and_few_samples_are_left(tmp_path, capsys):
    def warned(training, build):
        config = TrainConfig(batch_size=32, epochs=1, run_dir=tmp_path / f"{training} {build.__name__}")
        train(config, OneProcess(), dataset=dataset(training), build_network=build)
        return capsys.readouterr().err

    assert ragged_batch_note(66, 32, 16) in warned(66, network)
    assert warned(66, lambda shape, outputs: Sequential([Flatten(), Affine(outputs)], shape)) == ""
    assert warned(64, network) == warned(80, network) == ""


@pytest.mark.parametrize("samples", [*range(1, 90), 257, 270, 1025])
@pytest.mark.parametrize("micro", [1, 2, 4, 16])
def test_a_suggested_batch_size_leaves_more(samples, micro):
    for batch in range(micro, samples + 5):
        note = ragged_batch_note(samples, batch, micro)
        left = samples % batch
        if note is None:
            assert not 0 < left <= 2 or left >= micro or batch > samples
        elif "with --batch-size" in note:
            size = int(note.split("--batch-size ")[1].split()[0])
            assert size == samples or samples % size == 0 or samples % size >= size / 2
            assert ragged_batch_note(samples, size, micro) is None or samples % size >= size / 2
