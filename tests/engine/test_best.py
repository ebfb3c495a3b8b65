"""The best validation decides about early stopping, the plateau schedule and the weights that the test part scores."""

import dataclasses
import json

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.data import Dataset
from distdl.engine import best, train
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.errors import UserError
from distdl.inference.load import load
from distdl.inference.score import evaluate
from distdl.nn import Affine, Flatten, Sequential
from distdl.optim import SGD
from distdl.parallel import OneProcess
from distdl.rng import Key

STEPS_PER_EPOCH = 3
#: Accuracies of the validations, in percent: rising, standing, falling, rising again.
COURSE = [50, 60, 60, 55, 59, 61, 61, 61, 61, 61, 61, 61, 70, 69, 69]


class TextbookPlateau:
    """PyTorch's `ReduceLROnPlateau` in plain form, with its threshold 0; its patience is one epoch shorter."""

    def __init__(self, patience, factor):
        self.patience, self.factor, self.rate = patience, factor, 1.0
        self.best, self.bad_epochs = -1.0, 0

    def step(self, score):
        self.bad_epochs += 1
        if score > self.best:
            self.best, self.bad_epochs = score, 0
        if self.bad_epochs > self.patience - 1:
            self.rate *= self.factor
            self.bad_epochs = 0


def validated(config):
    """Yield a state after each validation of `COURSE`."""
    network = Sequential([Affine(2)], (3,))
    state = TrainingState(network, SGD(network.parameters.size))
    state.epoch_sums.set(1.0, 1, 1)
    for percent in COURSE:
        state.step_array += STEPS_PER_EPOCH
        validation = Sums()
        validation.set(1.0, percent, 100)
        best.note_validation(config, state, validation, STEPS_PER_EPOCH)
        yield state


@pytest.mark.parametrize("patience", [1, 2, 3, 5, 20])
def test_the_rate_is_reduced_after_the_epochs_of_the_textbook(patience):
    config = TrainConfig(schedule="plateau", plateau_patience=patience, plateau_factor=0.5)
    textbook = TextbookPlateau(patience, 0.5)
    for state, percent in zip(validated(config), COURSE, strict=True):
        textbook.step(percent / 100)
        assert 0.5**state.progress.plateau_cuts == textbook.rate


def test_another_schedule_is_never_reduced():
    assert [state.progress.plateau_cuts for state in validated(TrainConfig(plateau_patience=1))][-1] == 0


@pytest.mark.parametrize(("patience", "epoch"), [(1, 3), (3, 5), (4, 10), (6, 12), (7, None), (0, None)])
def test_early_stopping_counts_the_epochs_since_the_best(patience, epoch):
    config = TrainConfig(early_stopping=patience)
    stops = [best.stops_early(config, state, STEPS_PER_EPOCH) for state in validated(config)]
    assert next((index + 1 for index, stop in enumerate(stops) if stop), None) == epoch


def dataset():
    """Return images of random pixels: a network learns the training part by heart, and the others get worse."""
    images = Key(1).normal(300 * 12).reshape(-1, 3, 4, 1).astype(np.float32)
    labels = (Key(2).words(300) % np.uint64(3)).astype(np.int64)
    return Dataset("noise", images, labels, 3, None)


def build(shape, outputs):
    return Sequential([Flatten(), Affine(20), Affine(outputs)], shape)


def run(folder, **settings):
    config = TrainConfig(
        **{"batch_size": 32, "micro_batch_size": 8, "epochs": 8, "log_every": 1, "lr": 0.01, **settings}
    )
    config = dataclasses.replace(config, run_dir=folder)
    return train(config, OneProcess(), dataset=dataset(), build_network=build)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def score_of(folder, *, best):
    trained = load([folder], OneProcess(), best=best, dataset=dataset(), build_network=build)
    return evaluate(trained, "test", OneProcess()).ensemble


def test_the_best_weights_are_scored_and_the_last_ones_keep_the_receipt(tmp_path, capsys):
    last = run(tmp_path / "last")
    assert "(" not in capsys.readouterr().out.split("test accuracy")[1].splitlines()[0]
    found = run(tmp_path / "best", test_with="best")
    said = capsys.readouterr().out
    assert last.best_epoch == found.best_epoch < 8
    assert (last.test_epoch, found.test_epoch) == (8, found.best_epoch)
    assert (found.weights_sha256, found.state_sha256) == (last.weights_sha256, last.state_sha256)
    assert (last.test_loss, last.test_accuracy) == (score_of(tmp_path / "last", best=False).loss, last.test_accuracy)
    assert found.test_loss == score_of(tmp_path / "best", best=True).loss != last.test_loss
    assert f"test accuracy: {found.test_accuracy:.2%} (best weights, epoch {found.best_epoch})" in said
    assert records(tmp_path / "best")[-1]["step"] == found.best_epoch * 7


def test_the_best_weights_are_scored_again_if_a_finished_run_is_resumed(tmp_path):
    first = run(tmp_path / "run", test_with="best")
    again = run(tmp_path / "run", test_with="best", resume="auto")
    assert (again.test_loss, again.test_epoch) == (first.test_loss, first.best_epoch)
    last = run(tmp_path / "run", resume="auto")
    assert last.test_epoch == 8
    assert last.test_loss != first.test_loss


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 100)])
def test_without_the_best_checkpoint_the_last_weights_are_scored_with_a_warning(tmp_path, capsys, damage):
    last = run(tmp_path / "run")
    [path] = (tmp_path / "run" / "checkpoints").glob(f"step-{last.best_epoch * 7:09d}.*")
    damage(path)
    capsys.readouterr()
    found = run(tmp_path / "run", test_with="best", resume="auto")
    assert (found.test_loss, found.test_epoch) == (last.test_loss, 8)
    captured = capsys.readouterr()
    assert "--test-with best scores the last weights instead" in captured.err
    assert "(last weights, epoch 8)" in captured.out


def test_early_stopping_says_why_and_which_weights_are_scored(tmp_path, capsys):
    summary = run(tmp_path / "run", early_stopping=2, epochs=50)
    best_epoch = summary.epochs - 2
    assert (summary.stopped_early, summary.best_epoch, summary.test_epoch) == (True, best_epoch, summary.epochs)
    said = capsys.readouterr().out
    assert f"stopped early after epoch {summary.epochs}: no better validation for 2 epochs\n" in said
    assert f"\nbest: epoch {best_epoch} (--early-stopping 2)\n" in said
    assert f"(last weights, epoch {summary.epochs}; --test-with best scores epoch {best_epoch})" in said
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (written["stopped_early"], written["best_epoch"]) == (True, best_epoch)
    again = run(tmp_path / "run", early_stopping=2, epochs=50, test_with="best", resume="auto")
    assert f"(best weights, epoch {best_epoch})" in capsys.readouterr().out
    assert (again.stopped_early, again.weights_sha256) == (True, summary.weights_sha256)


def test_a_run_that_reaches_its_last_epoch_has_not_stopped_early(tmp_path, capsys):
    assert not run(tmp_path / "run", early_stopping=7, epochs=8, lr=1e-30).stopped_early
    assert "stopped early" not in capsys.readouterr().out


def test_the_plateau_schedule_changes_the_rate_of_the_next_epochs_also_after_a_resume(tmp_path, capsys):
    """With a rate near 0 nothing becomes better, so the first epoch stays the best."""
    settings = {"schedule": "plateau", "plateau_patience": 2, "plateau_factor": 0.25, "lr": 1e-30, "warmup_steps": 3}
    whole = run(tmp_path / "whole", **settings)
    said = capsys.readouterr().out
    rates = [record["lr"] for record in records(tmp_path / "whole") if "lr" in record]
    expected = [1e-30 * 0.25**cuts for cuts in (0, 0, 0, 1, 1, 2, 2, 3) for _ in range(7)]
    assert rates == [rate * min(step + 1, 3) / 3 if step < 3 else rate for step, rate in enumerate(expected)]
    assert "learning rate 1e-30 → 2.5e-31: no better validation for 2 epochs\n" in said
    for step in (20, 21, 22, 36):
        run(tmp_path / "pieces", **settings, max_steps=step, resume="auto")
    pieces = run(tmp_path / "pieces", **settings, resume="auto")
    assert pieces.state_sha256 == whole.state_sha256
    assert (tmp_path / "pieces/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_another_patience_is_refused_on_resume(tmp_path):
    run(tmp_path / "run", schedule="plateau", max_steps=2)
    with pytest.raises(UserError, match="--plateau-patience is 3 here and 10 in the checkpoint"):
        run(tmp_path / "run", schedule="plateau", plateau_patience=3, resume="auto")
