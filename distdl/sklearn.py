"""Estimators in scikit-learn's form: `Classifier` and `Regressor`, for pipelines, `cross_val_score`, `GridSearchCV`.

They need scikit-learn (``pip install 'distdl-mpi[sklearn]'``). docs/library.md describes their use, also under mpirun.

Dimensions: N samples, F features, H height, W width, C channels, K classes or numbers.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from distdl.config import FIELDS, KernelsName, OptimizerName, ScheduleName, TrainConfig
from distdl.data import Dataset
from distdl.data.signature import Signature
from distdl.engine.console import Console
from distdl.engine.kernels import usable_kernels
from distdl.engine.requirements import outputs_of
from distdl.engine.stop import StopRequest
from distdl.engine.user_code import BuildNetwork, network_builder
from distdl.errors import MissingPackageError, Stopped, UserError
from distdl.inference.inputs import ImageArray
from distdl.inference.load import Trained, load
from distdl.inference.prediction import predict
from distdl.job.launched_by import read_launch
from distdl.job.streams import say_line
from distdl.library import run_training
from distdl.parallel import Communicator, OneProcess, Survivors, from_rank_0, guard, world

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as error:
    raise MissingPackageError(
        f"distdl.sklearn needs scikit-learn 1.6 or later ({error}): pip install 'distdl-mpi[sklearn]'"
    ) from None

__all__ = ["Classifier", "EstimatorError", "Regressor"]

Self = TypeVar("Self", bound="_Estimator")

#: Samples keep these types; all others become the first one.
TYPES = [np.float32, np.uint8]
#: The name of the dataset in messages and in the run folder.
DATASET = "samples"
#: BLAS has one number of threads for the whole process. So fits and predictions of several threads take turns.
_one_at_a_time = threading.RLock()


class EstimatorError(UserError, ValueError):
    """The parameters or the samples cannot be used, or the training diverged; a `ValueError`, as in scikit-learn."""


@dataclass(kw_only=True, eq=False, repr=False)
class _Estimator(BaseEstimator):
    """The parameters of both estimators, and the training.

    A parameter with the name of a setting of `TrainConfig` means the same.
    """

    model: str = "mlp"
    build_network: BuildNetwork | None = None
    """Function of (H, W, C) and the number of outputs that returns an `nn.Sequential`; it replaces `model`."""
    model_settings: str | None = None
    image_shape: tuple[int, int, int] | None = None
    """(H, W, C) of the image that a row of X holds. None: a row is one pixel with F channels, so each feature is
    normalized by itself."""
    init_from: str | None = None
    freeze: str | None = None
    epochs: int = 100
    batch_size: int = 32
    micro_batch_size: int = 8
    optimizer: OptimizerName = "adam"
    lr: float | None = None
    lr_base_batch: int | None = None
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float | None = None
    epsilon: float | None = None
    weight_decay: float = 0.0
    l1_decay: float = 0.0
    clip_norm: float | None = None
    schedule: ScheduleName = "constant"
    warmup_steps: int = 0
    lr_step_epochs: int = 5
    lr_step_factor: float = 0.1
    plateau_patience: int = 10
    plateau_factor: float = 0.1
    augment: str | None = None
    validation_share: float | None = None
    """Share of the samples that are held out to validate each epoch. None: 0.1 if `early_stopping`, `best` or the
    schedule plateau needs it; otherwise all samples are trained on."""
    early_stopping: int = 0
    best: bool = False
    """Predict with the weights of the best validation, not with the last ones."""
    kernels: KernelsName = "auto"
    threads_per_rank: int = 1
    run_dir: Path | str | None = None
    """New folder to keep the run in, for the commands. None: a temporary folder, removed at the end of `fit`."""
    random_state: Any = 0
    """The seed; or a `numpy.random.RandomState`, or None, to draw one from."""
    verbose: bool = False
    """Print the lines of the training."""

    @property
    def loss_curve_(self) -> list[float]:
        """The mean training loss of each epoch."""
        check_is_fitted(self)
        return [record["train_loss"] for record in self.history_]

    def __sklearn_is_fitted__(self) -> bool:
        return "_fitted" in vars(self)

    def _fit(self: Self, X: Any, y: Any) -> Self:
        """Train, and keep the network; see `Classifier`. Collective."""
        self.__dict__.pop("_fitted", None)  # if this fit fails, the estimator is not fitted
        console, stop = _Messages(verbose=bool(self.verbose)), StopRequest()
        with _one_at_a_time, _in_terms_of(self):
            survivors = Survivors(_ranks())
            config, dataset = self._agreed(survivors, lambda: self._prepared(X, y))
            with guard(survivors.communicator), _run_folder(survivors, self.run_dir) as folder:
                try:
                    result, ranks = run_training(
                        replace(config, run_dir=folder),
                        dataset=dataset,
                        build_network=self.build_network,
                        communicator=survivors.communicator,
                        console=console,
                        stop=stop,
                    )
                except Stopped as stopped:
                    raise self._ending(stopped, stop, survivors.communicator) from None
                survivors.communicator = ranks
                [trained] = load([folder], ranks, best=self.best, build_network=self.build_network, with_data=False)
        self._fitted = _FittedNetwork.of(trained, self.build_network)
        self.receipt_ = trained.weights_sha256
        self.history_ = [self._without_repeated(record) for record in result.history]
        _warn(ranks, [*console.warnings, *trained.warnings])
        return self

    def _agreed(
        self, survivors: Survivors, work: Callable[[], tuple[TrainConfig, Dataset]]
    ) -> tuple[TrainConfig, Dataset]:
        """Call `work` on every rank and return its result. Collective.

        If it raises on any rank, all ranks raise: a search takes the error for a failed fit, and goes on to the next.
        All ranks also raise if they have different samples or parameters.
        """
        raised, given = None, ""
        try:
            config, dataset = work()
            if survivors.communicator.size > 1:
                drawn = {"seed": 0} if self.random_state is None else {}  # then that of rank 0 counts
                given = json.dumps(config.to_json() | drawn) + dataset.sha256()
        except Exception as error:  # noqa: BLE001  scikit-learn raises several
            raised = error
        mine = [None if raised is None else f"{type(raised).__name__}: {raised}", given]
        everyone = survivors.run(lambda ranks: ranks.allgather_json(mine))
        if raised is not None:
            raised.agreed = True  # type: ignore[attr-defined]
            raise raised
        for rank, (text, _) in enumerate(everyone):
            if text is not None:
                raise UserError(f"rank {rank} raised {text}", agreed=True)
        if any(other != mine for other in everyone):
            raise UserError(
                "the ranks have different samples or parameters: every rank must call fit with the same; give a "
                "random_state wherever they are drawn, such as train_test_split(X, y, random_state=0)",
                agreed=True,
            )
        return config, dataset

    def _ending(self, stopped: Stopped, stop: StopRequest, ranks: Communicator) -> BaseException:
        """Return the exception that ends the script after a signal: a search catches each `Exception` and goes on."""
        text = f"stopped by {stop.asked}; nothing of this fit was saved" if self.run_dir is None else str(stopped)
        if stop.asked == "SIGINT":
            ending: BaseException = KeyboardInterrupt(text)
        else:
            ending = SystemExit(stopped.exit_code)
            if ranks.rank == 0:
                say_line(text)
        ending.agreed = stopped.agreed  # type: ignore[attr-defined]
        return ending

    def _prepared(self, X: Any, y: Any) -> tuple[TrainConfig, Dataset]:
        """Check the samples and return them, with the config. Set the attributes that describe them."""
        if _are_images(X):
            X, y = validate_data(self, X, y, dtype=TYPES, allow_nd=True, ensure_min_samples=2, **self._of_targets)
            self.image_shape_ = X.shape[1:]
        else:
            X, y = validate_data(self, X, y, dtype=TYPES, ensure_min_samples=2, **self._of_targets)
            self.image_shape_ = self._shape_of_rows(X.shape[1])
        self.n_features_in_ = math.prod(self.image_shape_)
        if (X[0] == X).all():
            raise ValueError("all samples of X are equal: expected samples that differ; correct X")
        labels, outputs, names, settings = self._targets(y)
        images, count = X.reshape(len(X), *self.image_shape_), len(X)
        repeated = [0] if labels.ndim == 2 else np.unique(labels, return_index=True)[1].tolist()
        rows = [*range(count), *repeated, *([] if self._is_validated else repeated)]
        dataset = Dataset(
            DATASET,
            images[rows],
            labels[rows],
            outputs,
            len(rows) - len(repeated),
            class_names=names,
            validation_start=None if self._is_validated else count,
        )
        return self._config(settings), dataset.checked()

    @property
    def _is_validated(self) -> bool:
        """Whether some samples are held out of the training, to validate each epoch.

        If none are, repeated samples are the validation part, as they are the test part: a run must have both.
        """
        needed = self.early_stopping or self.best or self.schedule == "plateau"
        return self.validation_share is not None or bool(needed)

    def _without_repeated(self, record: Mapping[str, float]) -> dict[str, float]:
        """Return the record of an epoch without the scores of repeated samples."""
        return {name: value for name, value in record.items() if self._is_validated or "validation" not in name}

    def _shape_of_rows(self, features: int) -> tuple[int, int, int]:
        """Return the image (H, W, C) that a row of features becomes; without `image_shape` a pixel of F channels."""
        if self.image_shape is None:
            return 1, 1, features
        shape = tuple(self.image_shape)
        if len(shape) != 3 or math.prod(shape) != features:
            raise ValueError(f"image_shape is {shape} and X has {features} features: expected (H, W, C) of {features}")
        height, width, channels = map(int, shape)
        return height, width, channels

    def _config(self, settings: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of the training; those of NumPy's types, as a search draws them, become Python's."""
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name in FIELDS} | {**settings}
        given = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        if isinstance(self.random_state, int | np.integer):
            seed = int(self.random_state)
        else:
            seed = int(check_random_state(self.random_state).randint(2**31))
        return TrainConfig(**given | {"seed": seed, "run_dir": None}).checked()

    def _outputs(self, X: Any) -> NDArray[np.float64]:
        """Return probabilities or numbers (N, K), computed by this process alone."""
        check_is_fitted(self)
        if _are_images(X):
            X = check_array(X, dtype=np.float32, allow_nd=True)
            if X.shape[1:] != self.image_shape_:
                name, expected = type(self).__name__, self.image_shape_
                raise ValueError(f"X has images {X.shape[1:]}, but {name} is expecting images {expected}")
        else:
            X = validate_data(self, X, reset=False, dtype=np.float32)
        with _one_at_a_time, _in_terms_of(self):
            return self._fitted.outputs(X.reshape(len(X), *self.image_shape_))


@dataclass(kw_only=True, eq=False, repr=False)
class Classifier(ClassifierMixin, _Estimator):
    """A network that predicts the label of a sample.

    `fit` sets these attributes:

    - ``classes_``: (K,), the labels; ``n_features_in_``: F; ``image_shape_``: (H, W, C)
    - ``history_``: a record of each epoch; ``loss_curve_``: the mean training loss of each epoch
    - ``receipt_``: the sha256 of the weights

    `fit` is collective: under mpirun every rank calls it with the same samples and parameters, and gets the same
    estimator. The other methods use this process alone, so one rank may call them.

    `fit` raises `EstimatorError` for parameters that cannot be used, or if the training diverges. All methods raise
    `ValueError` or `TypeError` for samples that cannot be used. Source: docs/library.md, and
    https://scikit-learn.org/stable/developers/develop.html.

    >>> X, y = np.array([[0.0, 5], [0, 7], [1, 5], [1, 7]] * 8), np.array(["no", "no", "yes", "yes"] * 8)
    >>> Classifier(epochs=20, lr=0.01, kernels="numpy").fit(X, y).predict([[0, 6], [1, 6]]).tolist()
    ['no', 'yes']
    """

    loss: Literal["auto", "cross_entropy", "binary_cross_entropy"] = "auto"
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"

    _of_targets: ClassVar[dict[str, bool]] = {}

    def fit(self, X: Any, y: Any) -> Classifier:
        """Train on samples (N, F) or images (N, H, W, C) with labels (N,) of any kind. Collective."""
        return self._fit(X, y)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable label of each sample, (N,)."""
        probabilities = self._outputs(X)
        labels: NDArray[Any] = self.classes_[probabilities.argmax(axis=1)]
        return labels

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probability of each class, (N, K), in the order of ``classes_``."""
        return self._outputs(X)

    def _targets(self, y: NDArray[Any]) -> tuple[NDArray[Any], int, tuple[str, ...] | None, dict[str, Any]]:
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has 1 class, {self.classes_.tolist()[0]!r}: expected samples of 2 classes or more")
        names = tuple(map(str, self.classes_))
        return labels.astype(np.int64), len(names), names if len({*names}) == len(names) else None, {}


@dataclass(kw_only=True, eq=False, repr=False)
class Regressor(RegressorMixin, _Estimator):
    """A network that predicts a number of a sample, or several. Attributes and errors: see `Classifier`.

    It trains on the mean squared error.
    """

    standardize_targets: bool = True
    """Train on numbers with mean 0 and deviation 1. Predictions have the units of y."""

    _of_targets: ClassVar[dict[str, bool]] = {"multi_output": True, "y_numeric": True}

    def fit(self, X: Any, y: Any) -> Regressor:
        """Train on samples (N, F) or images (N, H, W, C) with numbers (N,) or (N, K). Collective."""
        return self._fit(X, y)

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Return the numbers of each sample, in the units and the form of `y`: (N,) or (N, K)."""
        numbers = self._outputs(X)
        return numbers[:, 0] if self._is_flat else numbers

    def _targets(self, y: NDArray[Any]) -> tuple[NDArray[Any], int, tuple[str, ...] | None, dict[str, Any]]:
        self._is_flat = y.ndim == 1
        with np.errstate(over="ignore"):  # the dataset refuses infinite numbers
            numbers = y.reshape(len(y), -1).astype(np.float32)
        return numbers, numbers.shape[1], None, {"loss": "mean_squared_error"}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


@dataclass(frozen=True, eq=False)
class _FittedNetwork:
    """A trained network as plain arrays: it can be pickled, and it needs no run folder."""

    config: TrainConfig
    signature: Signature
    build_network: BuildNetwork | None
    parameters: NDArray[np.float32]
    buffers: NDArray[np.float32]

    @classmethod
    def of(cls, trained: Trained, build_network: BuildNetwork | None) -> _FittedNetwork:
        network, signature = trained.network, replace(trained.signature, pixels="float32")
        return cls(trained.config, signature, build_network, network.parameters.copy(), network.buffers.copy())

    def outputs(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return probabilities or numbers (N, K) of images (N, H, W, C), not normalized."""
        build = network_builder(self.config.model, self.config.model_settings, self.build_network)
        network = build(self.signature.image_shape, outputs_of(self.config, self.signature)[-1])
        kernels, note = usable_kernels(self.config.kernels, OneProcess())
        if note is not None:
            warnings.warn(note, stacklevel=2)
        network.use(kernels)
        network.parameters[...], network.buffers[...] = self.parameters, self.buffers
        nowhere = Path()
        trained = Trained(nowhere, nowhere, self.config, 0, "", network, self.signature, (), "")
        return np.concatenate([block.values for block in predict([trained], ImageArray(images), OneProcess())])


class _Messages(Console):
    """Keeps the warnings of a fit, and prints its lines only if asked."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(live=verbose)
        self._verbose = verbose
        self.warnings: list[str] = []

    def line(self, text: str = "") -> None:
        if self._verbose:
            super().line(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, config: TrainConfig, step: int, steps_per_epoch: int, loss: float) -> None:
        if self._verbose:
            super().progress(config, step, steps_per_epoch, loss)


def _ranks() -> Communicator:
    """Return all ranks of this job; in a worker process of joblib, this process alone. Collective.

    A worker inherits the launcher's variables from its rank. It must not start MPI: it is no rank.
    """
    processes = sys.modules.get("multiprocessing.process")  # joblib has imported it in a worker
    if processes is None or processes.parent_process() is None:
        return world()
    if (ranks := read_launch().size) > 1:
        raise UserError(
            f"n_jobs has started worker processes on each of {ranks} ranks, which would all do the same work: leave "
            "n_jobs at 1, then each fit uses all ranks; or start the script without mpirun"
        )
    return OneProcess()


@contextmanager
def _in_terms_of(estimator: _Estimator) -> Iterator[None]:
    """Turn a `UserError` into an `EstimatorError`, with the names of parameters instead of flags."""
    try:
        yield
    except UserError as error:
        names = {name.replace("_", "-"): name for name in estimator.get_params(deep=False)} | {"seed": "random_state"}
        text = re.sub(r"--([a-z0-9-]+)", lambda found: names.get(found[1], found[0]), str(error))
        raised = EstimatorError(text, agreed=error.agreed)
        raised.exit_code = error.exit_code
        raise raised from None


@contextmanager
def _run_folder(survivors: Survivors, given: Path | str | None) -> Iterator[Path]:
    """Give the body a run folder: the given one, or a temporary one, which is removed at the end. Collective."""

    def make() -> str:
        try:
            return tempfile.mkdtemp(prefix="distdl-fit-")
        except OSError as error:
            raise UserError(f"fit needs a temporary folder ({error.strerror}): set TMPDIR, or give run_dir") from None

    if given is not None:
        yield Path(given)
        return
    temporary = survivors.run(lambda ranks: from_rank_0(ranks, make))
    try:
        yield Path(temporary, "run")
    finally:
        if survivors.communicator.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _warn(ranks: Communicator, texts: list[str]) -> None:
    """Pass on the warnings of rank 0 to `warnings`; if a filter makes them errors, all ranks raise. Collective."""
    for text in ranks.bcast_json(texts):
        if ranks.rank == 0:
            warnings.warn(text, stacklevel=4)
        else:
            with warnings.catch_warnings(record=True):
                warnings.warn(text, stacklevel=4)


def _are_images(X: Any) -> bool:
    """Return whether X is an array of images (N, H, W, C); raise `ValueError` for images without channels."""
    dimensions = getattr(X, "ndim", 2)
    if dimensions == 3:
        raise ValueError(
            f"Found array with dim 3, shape {X.shape}: expected rows (N, F) or images (N, H, W, C); "
            "X[..., numpy.newaxis] adds an axis for channels"
        )
    return bool(dimensions == 4)
