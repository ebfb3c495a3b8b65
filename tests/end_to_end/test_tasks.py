"""Classification, segmentation and regression train, validate, test and resume with the same bits."""

import dataclasses
import json

import numpy as np
import pytest
from small_runs import piece_of_digits, proof, remove, small_config, sub_world

from distdl.engine import train
from distdl.errors import UserError
from distdl.nn import Affine, Conv2d, Flatten, MaxPool2d, ReLU, Sequential, Upsample2d
from distdl.parallel import OneProcess

ROWS = 600


def pieces(labels_of, classes):
    digits = piece_of_digits(ROWS)
    labels = labels_of(digits.images[..., 0].astype(np.float32), digits.labels)
    return dataclasses.replace(digits, name="task", labels=labels, classes=classes)


def center_of_the_ink(images, _labels):
    """Return row and column of the center of the ink, in pixels."""
    ink = images.sum(axis=(1, 2))
    rows, columns = (np.tensordot(images.sum(axis=axis), np.arange(8.0), 1) / ink for axis in (2, 1))
    return np.stack([rows, columns], axis=1).astype(np.float32)


def flat(*layers):
    return lambda shape, outputs: Sequential([Flatten(), *(layer() for layer in layers), Affine(outputs)], shape)


def pixelwise(shape, outputs):
    layers = [Conv2d(8, 3, padding=1), ReLU(), MaxPool2d(2), Conv2d(16, 3, padding=1), ReLU(), Upsample2d(2)]
    return Sequential([*layers, Conv2d(8, 3, padding=1), ReLU(), Conv2d(outputs, 1)], shape)


TASKS = {
    "regression": (pieces(center_of_the_ink, 2), flat(lambda: Affine(32), ReLU), {}),
    "standardized regression": (
        pieces(lambda *given: 1e6 - 1e3 * center_of_the_ink(*given), 2),
        flat(lambda: Affine(32), ReLU),
        {"standardize_targets": True},
    ),
    "segmentation": (pieces(lambda images, _: (images > 8).astype(np.int64), 2), pixelwise, {}),
    "logistic regression": (pieces(lambda _, labels: labels % 2, 2), flat(), {"loss": "binary_cross_entropy"}),
    "classification": (pieces(lambda _, labels: labels, 10), flat(), {"loss": "cross_entropy"}),
}


def run(communicator, folder, task, **more):
    dataset, build_network, settings = TASKS[task]
    config = small_config(folder, **{"lr": 0.01, **settings, **more})
    summary = train(config, communicator, dataset=dataset, build_network=build_network)
    communicator.barrier()
    return summary


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_the_same_bits_on_any_ranks_and_after_a_resume(communicator, shared_tmp_path, task):
    expected = None
    if communicator.rank == 0:
        expected = proof(shared_tmp_path / "one", run(OneProcess(), shared_tmp_path / "one", task))
    for size in {2, 3, communicator.size}:
        part = sub_world(communicator, size) if size <= communicator.size else None
        if part is not None:
            folder = shared_tmp_path / str(size)
            run(part, folder, task, max_steps=size + 1)
            found = proof(folder, run(part, folder, task, resume="auto"))
            if part.rank == 0:
                assert found == expected, f"{size} ranks"
        communicator.barrier()
    remove(communicator, shared_tmp_path)


@pytest.mark.parametrize(("task", "least"), [("segmentation", 0.88), ("logistic regression", 0.85)])
def test_a_model_learns_labels_of_other_kinds(tmp_path, capsys, task, least):
    summary = run(OneProcess(), tmp_path / "run", task, epochs=8)
    assert least <= summary.test_accuracy <= 1
    assert f"test accuracy: {summary.test_accuracy:.2%}" in capsys.readouterr().out


def test_a_model_learns_numbers_which_have_no_accuracy(tmp_path, capsys):
    summary = run(OneProcess(), tmp_path / "run", "regression", epochs=12, keep_checkpoints=1)
    out = capsys.readouterr().out
    assert summary.test_loss < 0.05  # square pixels; the mean of all targets would give 0.2
    assert summary.test_accuracy is summary.validation_accuracy is None
    assert f"test loss: {summary.test_loss:.6f}" in out
    assert "accuracy" not in out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("accuracy" in name for record in records for name in record)
    validated = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    best = min(validated, key=lambda step: (validated[step], step))
    kept = {int(path.stem.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert best in kept


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("regression", {"loss": "cross_entropy"}, "--loss cross_entropy does not fit task, which has numbers"),
        ("segmentation", {"loss": "mean_squared_error"}, "does not fit task, which has labels; leave the flag"),
        ("classification", {"loss": "binary_cross_entropy"}, "is for one label of two classes a sample: task has"),
        ("segmentation", {"loss": "binary_cross_entropy"}, "is for one label of two classes a sample: task has"),
    ],
)
def test_a_loss_that_does_not_match_the_labels_is_one_line(tmp_path, task, settings, said):
    with pytest.raises(UserError, match=said):
        run(OneProcess(), tmp_path / "run", task, **settings)
    assert not list(tmp_path.iterdir())


def test_outputs_that_do_not_match_the_labels_are_one_line(tmp_path):
    dataset, *_ = TASKS["segmentation"]
    said = r"returns outputs \(2,\) for a sample, expected \(8, 8, 2\): task has 2 classes for each pixel"
    with pytest.raises(UserError, match=said):
        train(small_config(tmp_path / "run"), OneProcess(), dataset=dataset, build_network=flat())
    assert not list(tmp_path.iterdir())
