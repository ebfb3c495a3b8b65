"""Estimators in scikit-learn's form keep its rules, and the bits of `distdl.train` on any number of ranks."""

import inspect
import os
import pickle
import signal
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

import distdl
import distdl.sklearn
from distdl import nn
from distdl.config import FIELDS
from distdl.data import sources
from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.job.mpirun_command import mpirun_command
from distdl.sklearn import Classifier, EstimatorError, Regressor

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="starts jobs of its own")

#: Few epochs, with kernels that need no compiler.
QUICK = {"kernels": "numpy", "epochs": 2, "lr": 0.01}
#: The parameters whose defaults differ from those of the settings, as the page says.
OTHER_DEFAULTS = {"model", "epochs", "batch_size", "micro_batch_size", "standardize_targets"}
#: The parameters that are no settings.
NO_SETTINGS = {"build_network", "image_shape", "best", "random_state", "verbose"}
X, Y = load_iris(return_X_y=True)
NAMES = load_iris().target_names[Y]


def digits(count=60):
    whole = sources.load("digits", None)
    return whole.images[:count], whole.labels[:count] % 3


# ---------------------------------------------------------------------------------------------- scikit-learn's rules


@pytest.mark.filterwarnings("ignore:--batch-size 32 is larger than the training part")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([Classifier(**QUICK | {"epochs": 10}), Regressor(**QUICK | {"epochs": 10})])
def test_the_estimators_pass_every_check_of_scikit_learn(estimator, check):
    check(estimator)


def test_parameters_have_the_names_and_defaults_of_the_settings():
    for kind in (Classifier, Regressor):
        parameters = inspect.signature(kind).parameters
        assert parameters.keys() - FIELDS.keys() == NO_SETTINGS
        differ = {name for name in parameters.keys() & FIELDS if parameters[name].default != FIELDS[name].default}
        assert differ == OTHER_DEFAULTS & parameters.keys()


def test_the_public_names_are_these():
    assert distdl.sklearn.__all__ == ["Classifier", "EstimatorError", "Regressor"]


def test_a_missing_scikit_learn_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "distdl.sklearn")
    with pytest.raises(
        ImportError, match=r"needs scikit-learn 1.6 or later .*: pip install 'distdl-mpi\[sklearn\]'$"
    ) as at:
        import distdl.sklearn  # noqa: F401
    assert isinstance(at.value, UserError)


# ------------------------------------------------------------------------------------------------- bits and forms


@pytest.mark.parametrize("pixels", [np.uint8, np.float64])
def test_the_receipt_is_that_of_train_on_the_same_training_part(tmp_path, pixels):
    images, labels = digits()
    settings = {**QUICK, "model": "simple_convnet", "batch_size": 32, "micro_batch_size": 8, "seed": 3}
    both = np.concatenate([images, images[::-1]]).astype(pixels), np.concatenate([labels, labels[::-1]])
    dataset = distdl.Dataset("other validation", *both, 3, 100, validation_start=60)
    config = distdl.TrainConfig(**settings, run_dir=tmp_path / "run")
    expected = distdl.train(config, dataset=dataset)
    del settings["seed"]
    fitted = Classifier(**settings, random_state=3).fit(images.astype(pixels), labels)
    assert fitted.receipt_ == expected.receipt
    probabilities = distdl.load(tmp_path / "run").predict(images.astype(pixels))
    assert np.array_equal(fitted.predict_proba(images), probabilities)
    assert fitted.loss_curve_ == [one["train_loss"] for one in expected.history]
    assert set(fitted.history_[0]) == {"step", "epoch", "train_loss", "train_accuracy"}
    flat = Classifier(**settings, random_state=3, image_shape=(8, 8, 1))
    assert flat.fit(images.reshape(60, 64).astype(pixels), labels).receipt_ == expected.receipt
    assert np.array_equal(flat.predict(images.reshape(60, 64)), fitted.predict(images))


def test_the_features_of_a_row_are_normalized_one_by_one():
    scaled = X * [1, 1e3, 1e-3, 1] + [0, 1e4, 0, 5]
    assert Classifier(**QUICK | {"epochs": 30}).fit(scaled, Y).score(scaled, Y) > 0.9


def test_the_seed_decides_the_bits():
    def receipt(state):
        return Classifier(**QUICK, random_state=state).fit(X, Y).receipt_

    assert receipt(1) == receipt(np.int64(1)) != receipt(0)
    assert receipt(np.random.RandomState(5)) == receipt(np.random.RandomState(5))
    assert receipt(None) != receipt(None)


def test_a_regressor_predicts_the_form_and_the_units_of_y():
    rows, numbers = load_diabetes(return_X_y=True)
    regressor = Regressor(**QUICK | {"epochs": 10}).fit(rows, numbers)
    assert regressor.score(rows, numbers) > 0.4
    both = np.stack([numbers, -3 * numbers], axis=1)
    several = Regressor(**QUICK).fit(rows, both)
    assert several.predict(rows).shape == both.shape
    assert regressor.predict(rows).shape == numbers.shape


def test_numbers_of_numpy_are_parameters():
    fitted = Classifier(**QUICK | {"epochs": np.int64(2), "lr": np.float32(0.01)}).fit(X, Y)
    assert len(fitted.history_) == 2


def network(input_shape, classes, width=10):
    return nn.Sequential([nn.Flatten(), nn.Affine(width), nn.ReLU(), nn.Affine(classes)], input_shape)


def test_a_fitted_estimator_is_pickled_and_cloned_with_a_network_of_the_user():
    fitted = Classifier(**QUICK, build_network=network).fit(X, NAMES)
    copy = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(copy.predict_proba(X), fitted.predict_proba(X))
    assert set(copy.predict(X)) <= {"setosa", "versicolor", "virginica"}
    assert clone(fitted).fit(X, NAMES).receipt_ == fitted.receipt_
    with pytest.raises(NotFittedError):
        clone(fitted).predict(X)


# ----------------------------------------------------------------------------------------------------- validation


def test_early_stopping_holds_a_tenth_out_and_best_predicts_with_the_best_weights(tmp_path):
    noise = np.random.default_rng(0).permutation(Y)
    settings = {**QUICK, "epochs": 30, "early_stopping": 3}
    last = Classifier(**settings, run_dir=tmp_path / "run").fit(X, noise)
    best = Classifier(**settings, best=True).fit(X, noise)
    accuracies = [one["validation_accuracy"] for one in best.history_]
    assert len(accuracies) == np.argmax(accuracies) + 1 + 3 < 30
    assert last.receipt_ != best.receipt_
    assert best.receipt_ == distdl.load(tmp_path / "run", best=True).receipt
    assert last.receipt_ == distdl.load(tmp_path / "run").receipt
    assert distdl.load(tmp_path / "run").class_names == ("0", "1", "2")


# ---------------------------------------------------------------------------------------------------- files, output


@pytest.fixture
def empty_folders(tmp_path, monkeypatch):
    """Make an empty working folder and an empty temporary folder."""
    for name in ("work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def test_a_fit_prints_nothing_and_leaves_no_file(empty_folders, capfd):
    fitted = Classifier(**QUICK).fit(X, Y)
    fitted.predict(X)
    with pytest.raises(EstimatorError, match="finite"):
        Classifier(**QUICK | {"lr": 1e30}).fit(X, Y)
    assert capfd.readouterr() == ("", "")
    assert [path for path in empty_folders.rglob("*") if path.is_file()] == []
    assert sorted(path.name for path in empty_folders.rglob("*")) == ["temporary", "work"]


def test_verbose_prints_the_epochs(capfd):
    fitted = Classifier(**QUICK, verbose=True).fit(X, Y)
    printed = capfd.readouterr().out
    assert "epoch 2/2" in printed
    assert fitted.receipt_ in printed


def test_the_warnings_of_a_run_are_warnings_of_python(capfd):
    constant = np.hstack([X, np.ones((len(X), 1))])
    with pytest.warns(UserWarning, match=r"channel 4 .* holds one value") as told:
        Classifier(**QUICK).fit(constant, Y)
    assert told[0].filename == __file__
    assert capfd.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("parameters", "samples", "said"),
    [
        ({"lr": -1.0}, X, "^lr must be above 0, not -1.0$"),
        ({"lr": "fast"}, X, "^lr must be a number, not 'fast'$"),
        ({"random_state": -1}, X, "^random_state must be at least 0"),
        ({"optimizer": "adma"}, X, "did you mean 'adam'"),
        ({"micro_batch_size": 64}, X, "^micro_batch_size 64 is larger than batch_size 32: "),
        ({"image_shape": (2, 3, 1)}, X, r"image_shape is \(2, 3, 1\) and X has 4 features"),
        ({"model": "simple_convnet"}, X, "small"),
        ({}, np.ones_like(X), "all samples of X are equal"),
        ({}, np.ones((150, 8, 8)), r"X\[..., numpy.newaxis\] adds an axis for channels"),
    ],
)
def test_a_fit_that_cannot_work_is_refused_in_one_line(parameters, samples, said):
    estimator = Classifier(**QUICK | parameters)
    with pytest.raises(ValueError, match=said) as caught:
        estimator.fit(samples, Y)
    assert "\n" not in str(caught.value)
    with pytest.raises(NotFittedError):
        estimator.predict(samples)


def test_images_of_another_shape_are_refused():
    images, labels = digits()
    fitted = Classifier(**QUICK).fit(images, labels)
    assert fitted.n_features_in_ == 64
    with pytest.raises(ValueError, match=r"images \(8, 7, 1\), but Classifier is expecting images \(8, 8, 1\)"):
        fitted.predict(images[:, :, 1:])


def test_a_fit_that_fails_leaves_the_estimator_unfitted():
    fitted = Classifier(**QUICK).fit(X, Y)
    with pytest.raises(ValueError, match="y has 1 class, 7: expected samples of 2 classes or more"):
        fitted.fit(X, np.full(len(X), 7))
    with pytest.raises(NotFittedError):
        fitted.predict(X)


def test_a_run_folder_is_used_once(tmp_path):
    estimator = Classifier(**QUICK, run_dir=tmp_path / "run").fit(X, Y)
    with pytest.raises(EstimatorError, match="run_dir"):
        estimator.fit(X, Y)


# ------------------------------------------------------------------------------------------------ searches, signals


class Stopping(nn.ReLU):
    """Sends a signal to this process, once, in the third forward pass of a training."""

    signal_number, passes = signal.SIGINT, 0

    def forward(self, x, *, training=False, key=None):
        Stopping.passes += training
        if training and Stopping.passes == 3:
            os.kill(os.getpid(), self.signal_number)
        return super().forward(x, training=training, key=key)


def stopping(input_shape, classes):
    return nn.Sequential([nn.Flatten(), nn.Affine(10), Stopping(), nn.Affine(classes)], input_shape)


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_whole_search(number, ending, monkeypatch, signals_at_their_defaults, capfd):
    monkeypatch.setattr(Stopping, "signal_number", number)
    monkeypatch.setattr(Stopping, "passes", 0)
    with pytest.raises(ending) as caught:
        cross_val_score(Classifier(**QUICK, build_network=stopping), X, Y, cv=2)
    said = f"{caught.value}{capfd.readouterr().err}"
    assert f"stopped by {number.name}; nothing of this fit was saved" in said
    assert ending is KeyboardInterrupt or caught.value.code == 75


def test_processes_and_threads_give_the_scores_of_one_process():
    import joblib

    grid = {"lr": [0.003, 0.01]}
    expected = GridSearchCV(Classifier(**QUICK), grid, cv=2).fit(X, Y)
    for backend in ("loky", "threading"):
        with joblib.parallel_config(backend=backend, n_jobs=2):
            found = GridSearchCV(Classifier(**QUICK), grid, cv=2).fit(X, Y)
        assert np.array_equal(found.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"])
        assert found.best_estimator_.receipt_ == expected.best_estimator_.receipt_


def test_the_example_of_the_page_searches(run_program, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text(encoding="utf-8")
    section = page.partition("## Estimators in scikit-learn's form\n")[2]
    code = textwrap.dedent(section.partition("`GridSearchCV`:\n\n")[2].partition("\n\n- ")[0])
    code = code.replace("epochs=10", "epochs=1, kernels='numpy'").replace("cv=3", "cv=2")
    done = run_program([sys.executable, "-c", code], cwd=tmp_path, timeout=240)
    assert done.stdout.startswith("{'classifier__lr': 0.0"), done.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ ranks

#: Each rank writes its results to a file of its own.
ON_RANKS = """
import json, os, sys, warnings
import numpy as np
from pathlib import Path
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from distdl.job.launched_by import read_launch
from distdl.sklearn import Classifier
rank, size = read_launch().rank, read_launch().size
X, y = load_iris(return_X_y=True)
base = Classifier(kernels="numpy", epochs=2, lr=0.01)
search = GridSearchCV(make_pipeline(StandardScaler(), base), {"classifier__lr": [0.01, 0.03]}, cv=2).fit(X, y)
found = {"receipt": search.best_estimator_[-1].receipt_, "scores": list(search.cv_results_["mean_test_score"])}
if rank == 0:  # predictions are not collective
    found["probabilities"] = search.predict_proba(X).tobytes().hex()
found["drawn"] = Classifier(kernels="numpy", epochs=1, random_state=None).fit(X, y).receipt_

def refused(work):
    try:
        work()
    except ValueError as error:
        return str(error).strip().splitlines()[-1]

if size > 1:
    found["other samples"] = refused(lambda: base.fit(X + rank, y))
    found["one rank"] = refused(lambda: base.fit(X, None if rank == 1 else y))
    found["one class"] = refused(lambda: base.fit(X, y if rank else np.zeros_like(y)))
    if size == 2:  # each rank starts two workers
        warnings.simplefilter("ignore")
        found["n_jobs"] = refused(lambda: cross_val_score(base, X, y, cv=2, n_jobs=2, error_score="raise"))
    found["after"] = base.fit(X, y).receipt_
Path(sys.argv[1], f"{size}-{rank}.json").write_text(json.dumps(found))
"""


def test_two_and_three_ranks_give_the_bits_of_one_process_and_refuse_together(run_program, run_job, tmp_path):
    import json

    argv = [sys.executable, "-c", ON_RANKS, str(tmp_path)]
    done = run_program(argv, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    for ranks in (2, 3):
        done = run_job(mpirun_command(ranks, argv), cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(results) == ["1-0", "2-0", "2-1", "3-0", "3-1", "3-2"]
    one = results["1-0"]
    for name, found in results.items():
        assert (found["receipt"], found["scores"]) == (one["receipt"], one["scores"])
        assert found.get("probabilities", one["probabilities"]) == one["probabilities"]
        if name == "1-0":
            continue
        assert found["drawn"] == results[f"{name[0]}-0"]["drawn"]
        assert "the ranks have different samples or parameters" in found["other samples"]
        assert "y" in found["one rank"]
        assert "y has 1 class" in found["one class"]
        assert "leave n_jobs at 1, then each fit uses all ranks" in found.get("n_jobs", "") or name[0] == "3"
        assert found["after"] == Classifier(**QUICK).fit(X, Y).receipt_
