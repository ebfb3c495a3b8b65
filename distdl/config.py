"""The settings of a run: one frozen dataclass with defaults and checks.

This module also holds the only list of the names of models, optimizers, losses, datasets and schedules. A test compares
them with the registries. It imports neither NumPy nor MPI, so `--help` and a wrong flag take no time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distdl.errors import UserError, unknown_name
from distdl.image_options import ImageOptions, Resize
from distdl.model_settings import parse_model_settings
from distdl.transforms import Transforms

DATASETS = ("digits", "mnist", "fashion-mnist", "kmnist", "cifar10")
#: Prefixes of a dataset that is the user's own file or folder.
FROM_PATH = ("npz:", "folder:", "csv:")
MODELS = (
    *("logistic", "mlp", "simple_convnet", "deep_convnet", "lenet", "alexnet"),
    *("vgg11", "vgg16", "googlenet", "resnet18", "resnet20", "resnet50"),
)
OptimizerName = Literal["adam", "adamw", "momentum", "nesterov", "adagrad", "rmsprop", "sgd"]
OPTIMIZERS: tuple[str, ...] = typing.get_args(OptimizerName)
LossName = Literal["auto", "cross_entropy", "binary_cross_entropy", "mean_squared_error"]
ScheduleName = Literal["constant", "step", "cosine", "plateau"]
ReductionName = Literal["tree", "allreduce"]
REDUCTIONS: tuple[str, ...] = typing.get_args(ReductionName)
KernelsName = Literal["auto", "numpy", "compiled"]
KERNELS: tuple[str, ...] = typing.get_args(KernelsName)
LockName = Literal["flock", "link"]

#: Default epochs. An epoch of digits has only ten steps.
DEFAULT_EPOCHS = {"digits": 60}
OTHER_EPOCHS = 20
#: Default learning rates.
DEFAULT_LR = {"adam": 0.001, "adamw": 0.001, "rmsprop": 0.001}
OTHER_LR = 0.01

#: Other libraries' names of our settings. They are suggested, never accepted.
OTHER_NAMES = {
    "learning_rate": "lr",
    "l2": "weight_decay",
    "patience": "early_stopping",
    "network": "model",
    "audit": "cross_check",
    **dict.fromkeys(("out", "output", "output_dir", "save_dir", "log_dir"), "run_dir"),
}

SHARES = ("validation_share", "test_share")
LOSS_SETTINGS = ("label_smoothing", "class_weights", "standardize_targets")
#: Other libraries' names of our choices. They are suggested, never accepted.
OTHER_CHOICES = {
    **dict.fromkeys(("mse", "l2", "squared_error", "regression"), "mean_squared_error"),
    **dict.fromkeys(("ce", "crossentropy", "categorical_crossentropy", "softmax", "nll"), "cross_entropy"),
    **dict.fromkeys(("bce", "binary_crossentropy", "sigmoid", "logistic"), "binary_cross_entropy"),
    **dict.fromkeys(("reducelronplateau", "reduce_on_plateau"), "plateau"),
}
#: The groups of `--help`, with all settings.
GROUPS = {
    "data": (
        *("dataset", "data_dir", "resize", "skip_damaged", "csv_columns", "cache", "data_gigabytes", *SHARES),
        *("batch_size", "augment"),
    ),
    "model": ("model", "model_settings", "init_from", "freeze", "loss", *LOSS_SETTINGS),
    "optimizer": (
        *("optimizer", "lr", "lr_base_batch", "schedule", "warmup_steps", "lr_step_epochs", "lr_step_factor"),
        *("plateau_patience", "plateau_factor"),
        *("momentum", "beta1", "beta2", "epsilon", "weight_decay", "l1_decay", "clip_norm"),
    ),
    "run and checkpoints": (
        *("config", "run_dir", "resume", "dry_run", "epochs", "max_steps", "early_stopping", "test_with", "seed"),
        *("checkpoint_every", "keep_checkpoints", "log_every", "tensorboard", "mlflow", "trace", "lock"),
    ),
    "faults": (
        *("on_nonfinite", "verify_every", "cross_check", "require_same_bits", "prove", "record_hashes"),
        *("stall_warning", "detect_hangs"),
    ),
    "ranks": ("micro_batch_size", "kernels", "balance", "reduction", "threads_per_rank"),
}

#: Settings that a resumed run may change. They affect neither the weights at a step nor the meaning of the weights.
FREE_TO_CHANGE_ON_RESUME = frozenset(
    {
        *("config", "run_dir", "resume", "dry_run", "data_dir", "cache", "epochs", "max_steps", "early_stopping"),
        "test_with",
        *("checkpoint_every", "keep_checkpoints", "log_every", "stall_warning", "detect_hangs", "record_hashes"),
        *("threads_per_rank", "balance", "on_nonfinite", "verify_every", "cross_check", "trace"),
        *("require_same_bits", "prove", "lock", "data_gigabytes", "tensorboard", "mlflow"),
    }
)
#: Settings that have an effect only with some choices of another setting.
NEEDS = {
    "momentum": ("optimizer", ("momentum", "nesterov")),
    "beta1": ("optimizer", ("adam", "adamw")),
    "beta2": ("optimizer", ("adam", "adamw", "rmsprop")),
    "epsilon": ("optimizer", ("adam", "adamw", "rmsprop", "adagrad")),
    "lr_step_epochs": ("schedule", ("step",)),
    "lr_step_factor": ("schedule", ("step",)),
    "plateau_patience": ("schedule", ("plateau",)),
    "plateau_factor": ("schedule", ("plateau",)),
}
#: The choice of versions that did not have the setting.
BEFORE_THE_SETTING = {"kernels": "numpy"}
#: Earlier names of settings, in the files of older runs.
RENAMED = {"audit": "cross_check"}
#: Settings of the start of a run. A config file may not hold them.
NOT_IN_CONFIG_FILE = frozenset({"config", "run_dir", "resume", "trace", "dry_run", "prove"})
#: Settings that are a path, or end in one.
PATHS = ("config", "data_dir", "cache", "run_dir", "resume", "trace", "mlflow", "init_from", "dataset", "model")
#: Settings of a text that may name a path; a script may give a `Path` too.
TEXTS_OR_PATHS = ("resume", "init_from", "dataset", "model")
#: No BLAS starts more threads than this.
MOST_THREADS = 1024
#: The largest whole number of a setting, except of the seed. A float represents every whole number up to it.
MOST = 2**53
#: The longest --detect-hangs: one day.
LONGEST_HANG = 86_400


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a run. The text after each field is its line of `--help`."""

    config: Path | None = None
    """TOML file of settings, named as the flags but with underscores; flags override the file."""
    dataset: str = "digits"
    """Data to train on; digits: 1,797 real 8x8 images, included; npz:FILE.npz: arrays images and labels; folder:PATH:
    one subfolder of images per class; csv:FILE.csv: paths and labels; or your own file.py:function or
    package.module:function."""
    data_dir: Path | None = None
    """Folder of the dataset's files; by default published datasets are downloaded into the user's cache."""
    resize: str | None = None
    """Size for all image files, such as 32 or 32x48 (height x width). If an image has other proportions, its middle is
    cut out; 32x48:pad adds black borders instead, 32x48:stretch changes the proportions."""
    skip_damaged: bool = False
    """Leave out image files that cannot be used, and list them; otherwise they are refused."""
    csv_columns: str | None = None
    """Columns of a csv: dataset: that of the paths and that of the labels, such as file,species; several label columns
    are numbers to predict. By default the columns with usual names, such as path and label."""
    cache: Path | None = None
    """Folder for decoded image files: they are decoded once and then mapped, for images that do not fit into memory."""
    data_gigabytes: float | None = None
    """Most gigabytes that the dataset may take in memory, checked before it is loaded; by default a quarter of the
    memory that is available."""
    validation_share: float | None = None
    """Share of the samples to validate on, if the dataset has no validation part; by default 0.15, or 0.1 of the
    others if it has a test part."""
    test_share: float | None = None
    """Share of the samples to test on, if the dataset has no test part; by default 0.15."""
    model: str = "simple_convnet"
    """Network to train; or your own file.py:function or package.module:function."""
    model_settings: str | None = None
    """Settings of the network, for mlp such as "hidden=100-50, batch_norm, dropout=0.2"; your own function receives
    them as keywords."""
    init_from: str | None = None
    """Run folder, checkpoint or state dict of PyTorch (safetensors) with the initial weights of a new run, for all
    tensors of equal name and shape."""
    freeze: str | None = None
    """Layers or parameters that keep their values, separated by commas, such as conv2d_1,affine_1.bias."""
    epochs: int | None = None
    """Passes over the training part; by default 60 for digits and 20 for others."""
    batch_size: int = 128
    """Samples of one optimizer step, over all ranks together."""
    micro_batch_size: int = 16
    """Samples of one forward and backward pass, the unit that is dealt to ranks; it never depends on their number."""
    loss: LossName = "auto"
    """Loss function to minimize; auto: cross_entropy for labels, mean_squared_error for numbers."""
    label_smoothing: float = 0.0
    """Share of a label that is spread evenly over all classes, for cross_entropy; validation uses the plain loss."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the training loss; balanced: in inverse proportion to their number of labels."""
    standardize_targets: bool = False
    """Train on numbers with mean 0 and deviation 1 over the training part; predictions have the given units."""
    optimizer: OptimizerName = "adam"
    """Rule of the weight update."""
    lr: float | None = None
    """Learning rate; by default 0.001 for adam, adamw and rmsprop, and 0.01 for the others."""
    lr_base_batch: int | None = None
    """Batch size that the learning rate is meant for; with another --batch-size the rate scales in proportion."""
    momentum: float = 0.9
    """Share of the previous direction that momentum and nesterov keep."""
    beta1: float = 0.9
    """Decay of the mean of gradients, for adam and adamw."""
    beta2: float | None = None
    """Decay of the mean of squared gradients; by default 0.999 for adam and adamw, and 0.99 for rmsprop."""
    epsilon: float | None = None
    """Number added to the root that a step is divided by; by default 1e-10 for adagrad, and 1e-8 for the others."""
    weight_decay: float = 0.0
    """Factor of the L2 penalty on weights (not on biases); for adamw, of its decoupled decay."""
    l1_decay: float = 0.0
    """Factor of the L1 penalty on weights (not on biases)."""
    clip_norm: float | None = None
    """Largest Euclidean norm of the gradient; a longer gradient is scaled down to it."""
    schedule: ScheduleName = "constant"
    """Course of the learning rate; step: multiplied by lr-step-factor every lr-step-epochs; cosine: along a cosine
    to 0; plateau: multiplied by plateau-factor after plateau-patience epochs without a better validation."""
    warmup_steps: int = 0
    """First steps, in which the learning rate rises linearly to the value of the schedule."""
    lr_step_epochs: int = 5
    """Epochs between two changes of the step schedule."""
    lr_step_factor: float = 0.1
    """Factor of each change of the step schedule."""
    plateau_patience: int = 10
    """Epochs without a better validation after which the plateau schedule reduces the learning rate."""
    plateau_factor: float = 0.1
    """Factor of each reduction of the plateau schedule."""
    augment: str | None = None
    """Random changes of training images, such as rotate=10,shift=2; also scale=0.1, crop=2, flip, brightness=0.1.
    Labels of pixels move with the image; a pixel from beyond the edge has no label and does not count."""
    seed: int = 0
    """Seed of the split, the order of samples, the initial weights, augmentation and dropout."""
    run_dir: Path | None = None
    """Folder of the run; by default a new folder under runs/."""
    max_steps: int | None = None
    """Stop with a checkpoint after this step of the whole run; a resume without the flag continues."""
    early_stopping: int = 0
    """Stop after this many epochs without a better validation accuracy; 0: never."""
    test_with: Literal["last", "best"] = "last"
    """Weights that are scored on the test part at the end; best: those of the best validation."""
    resume: str | None = None
    """Checkpoint or run folder to continue from; auto: the newest intact checkpoint in --run-dir, if there is one."""
    dry_run: bool = False
    """Check everything and print the plan: classes, memory, steps, time, identical images; write nothing."""
    checkpoint_every: int = 0
    """Steps between checkpoints, in addition to the one at the end of each epoch; 0: none."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep, in addition to the best."""
    log_every: int = 10
    """Steps between records in metrics.jsonl, in addition to those of each epoch; 0: none."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the run folder: losses, filters, confusion matrix; needs tensorboardX."""
    mlflow: Path | None = None
    """Folder of MLflow's files to record the run in; needs mlflow-skinny."""
    stall_warning: float = 300.0
    """Seconds without progress after which a late rank prints where it is; another names it earlier; 0: never."""
    detect_hangs: float = 0.0
    """Seconds without a sign of life after which a frozen rank is killed, because others wait for it; 0: never."""
    record_hashes: bool = False
    """Write the hash of every tensor after every step to hashes.jsonl (see distdl.verify)."""
    reduction: ReductionName = "tree"
    """How gradients are summed; tree: same bits on any number of ranks; allreduce: MPI's Allreduce, whose bits depend
    on the ranks."""
    balance: bool = False
    """Deal micro-batches by each rank's measured speed, and again as speeds change; the bits stay the same."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to an infinite or NaN loss or gradient; stop: end the run; skip: skip the update of that step."""
    verify_every: int = 100
    """Steps between comparisons of all ranks' weights and optimizer state, also before each checkpoint; 0: none."""
    cross_check: int = 0
    """Steps between cross-checks: each rank also computes the next rank's shard and compares the bits; 0: none."""
    require_same_bits: bool = False
    """Refuse to start if ranks compute other bits than rank 0, or this run others than the checkpoint to resume from;
    otherwise that is a warning."""
    prove: bool = False
    """With --resume, first take recorded steps of the run again, and continue only if every bit comes out again."""
    kernels: KernelsName = "auto"
    """Implementation of the computations; numpy: the definition; compiled: faster, and with the same bits on every CPU,
    needs numba; auto: compiled if every rank can use them, or the kernels of the run to resume."""
    threads_per_rank: int = 1
    """BLAS threads of each rank; another number than 1 may change bits."""
    lock: LockName = "flock"
    """How a run owns its folder; flock: by a lock of the file system; link: by a file that names host and process, for
    network file systems that refuse flock."""
    trace: Path | None = None
    """JSON file for the times in which each rank computed, reduced and waited; view it in ui.perfetto.dev."""

    def checked(self) -> TrainConfig:
        """Return the config with every default filled in; raise `UserError` for an invalid setting."""
        for name, kind in typing.get_type_hints(TrainConfig).items():
            value = getattr(self, name)
            check_kind(name, value, kind)
            if isinstance(value, int) and name != "seed" and value > MOST:
                raise UserError(f"{flag_of(name)} must be at most {MOST}; the given number is larger")
        config = dataclasses.replace(
            self,
            **{name: _expanded(name, getattr(self, name)) for name in PATHS},
            epochs=DEFAULT_EPOCHS.get(self.dataset, OTHER_EPOCHS) if self.epochs is None else self.epochs,
            lr=DEFAULT_LR.get(self.optimizer, OTHER_LR) if self.lr is None else self.lr,
        )
        _check_ranges(config)
        if config.augment is not None:
            Transforms.parse(config.augment)
        if config.resize is not None:
            config = dataclasses.replace(config, resize=str(Resize.parse(config.resize)))
        parse_model_settings(config.model_settings)
        _check_final_learning_rate(config)
        for name in set(PATHS) - {"config", "dataset", "model"}:
            _check_path(config, name)
        _check_texts(config)
        if self.micro_batch_size > self.batch_size:
            raise UserError(
                f"--micro-batch-size {self.micro_batch_size} is larger than --batch-size {self.batch_size}: "
                "a batch consists of whole micro-batches, so give a smaller one or a larger batch"
            )
        if self.prove and self.resume is None:
            raise UserError("--prove takes steps of the run to resume again: give --resume too, or leave it out")
        if self.resume == "auto" and self.run_dir is None:
            raise UserError("--resume auto looks for checkpoints in --run-dir: give that folder too")
        return config

    @property
    def image_options(self) -> ImageOptions:
        """The settings for image files; without effect for another dataset."""
        resize = self.resize if reads_image_files(self.dataset) else None
        return ImageOptions(
            resize=resize,
            skip_damaged=self.skip_damaged,
            csv_columns=self.csv_columns,
            cache=self.cache,
            data_gigabytes=self.data_gigabytes,
        )

    @property
    def epoch_count(self) -> int:
        """The number of epochs of a checked config."""
        assert self.epochs is not None
        return self.epochs

    @property
    def learning_rate(self) -> float:
        """The learning rate of a checked config."""
        assert self.lr is not None
        return self.lr

    @property
    def scaled_learning_rate(self) -> float:
        """The learning rate, scaled to the batch if `lr_base_batch` is set: Goyal et al. 2017, section 2.1."""
        return self.learning_rate * (1 if self.lr_base_batch is None else self.batch_size / self.lr_base_batch)

    @property
    def optimizer_settings(self) -> dict[str, float]:
        """The settings of the chosen optimizer alone; those that have its own default are absent."""
        names = [name for name, (other, choices) in NEEDS.items() if other == "optimizer" and self.optimizer in choices]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches in a full batch: the largest number of ranks that can share the work."""
        return -(-self.batch_size // self.micro_batch_size)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(self).items()
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TrainConfig:
        """Return the config that `to_json` turned into these values.

        An absent setting has its default, or else the choice of versions that did not have it. Earlier names count.
        """
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        names = ("config", "data_dir", "cache", "run_dir", "trace", "mlflow")
        paths = {name: Path(values[name]) for name in names if values.get(name) is not None}
        return TrainConfig(**{**BEFORE_THE_SETTING, **values, **paths})

    def to_toml(self) -> str:
        """Return the text of a file for `--config` that runs the same again."""
        lines = ["# python -m distdl.train --config FILE runs this again.\n"]
        for name, value in self.to_json().items():
            if value is not None and name not in NOT_IN_CONFIG_FILE:
                # TOML strings equal JSON strings, except for surrogate pairs (not written here) and DEL.
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{name} = {text}\n")
        return "".join(lines)


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def flag_of(name: str) -> str:
    """Return the flag of a setting.

    >>> flag_of("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def expand_home(flag: str, text: str) -> str:
    """Return a path, or a name that ends in one such as ``folder:~/photos``, with the home folder for its ``~``.

    Raises `UserError` if the home folder is unknown.
    """
    prefix = next((one for one in FROM_PATH if text.startswith(f"{one}~")), "")
    path = text.removeprefix(prefix)
    if not path.startswith("~"):
        return text
    expanded = os.path.expanduser(path)  # noqa: PTH111  Path("~/net.py:build") is a name, not a path
    user = path.partition("/")[0]
    if expanded == path or (user == "~" and os.environ.get("HOME") == ""):
        remedy = "set HOME" if user == "~" else f"there is no user {user[1:]!r}; for a file of this name, give ./{path}"
        raise UserError(f"{flag} {text!r}: the home folder {user} is unknown: {remedy}, or give the whole path")
    return prefix + expanded


def _expanded(name: str, value: Any) -> Any:
    """Return a path with the home folder for its ``~``: a text if it is one of `TEXTS_OR_PATHS`, else of its type."""
    kind = str if name in TEXTS_OR_PATHS else type(value)
    return value if value is None else kind(expand_home(flag_of(name), str(value)))


def check_kind(name: str, value: object, kind: Any) -> None:
    """Raise `UserError` for a value that does not have the declared type of the setting."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in choices:
            kind_of_name = f"value of {flag_of(name)}" if "_" in name else name
            raise unknown_name(kind_of_name, str(value), choices, OTHER_CHOICES)
        return
    kinds = set(choices or (kind,))
    allowed = kinds | ({int} if float in kinds else set()) | ({str} if Path in kinds else set())
    allowed |= {Path} if name in TEXTS_OR_PATHS else set()
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, tuple(allowed)):
        names = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "true or false"}
        expected = " or ".join(sorted(names[one] for one in kinds - {type(None)}))
        raise UserError(f"{flag_of(name)} must be {expected}, not {value!r}")


def without_effect(config: TrainConfig, name: str, before: str = "") -> str | None:
    """Return why a setting has no effect with the other settings, and the remedy; None if it has one.

    `before` is the text before the suggested flag.
    """
    other, choices = NEEDS.get(name, ("", ()))
    if not choices or getattr(config, other) in choices:
        return None
    needed = " or ".join(choices)
    return f"has no effect with {flag_of(other)} {getattr(config, other)}: give {before}{flag_of(other)} {needed}"


def _check_ranges(config: TrainConfig) -> None:

    def must_be(expected: str, holds: Callable[[float], bool], *names: str) -> None:
        for name in names:
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise UserError(f"{flag_of(name)} must be {expected}, not {value}")

    def at_least(least: int, *names: str) -> None:
        must_be(f"at least {least}", lambda value: not value < least, *names)

    at_least(1, "epochs", "batch_size", "micro_batch_size", "lr_step_epochs", "keep_checkpoints", "threads_per_rank")
    must_be(f"at most {MOST_THREADS}", lambda value: value <= MOST_THREADS, "threads_per_rank")
    at_least(0, "seed", "checkpoint_every", "log_every", "weight_decay", "verify_every", "cross_check", "stall_warning")
    at_least(0, "l1_decay", "warmup_steps", "early_stopping")
    at_least(1, "max_steps", "lr_base_batch", "plateau_patience")
    must_be("above 0", lambda value: value > 0, "lr", "lr_step_factor", "clip_norm", "epsilon", *SHARES)
    must_be("at least 0 and below 1", lambda value: 0 <= value < 1, "momentum", "beta1", "beta2", "label_smoothing")
    finite = ("lr", "weight_decay", "l1_decay", "clip_norm", "lr_step_factor", "stall_warning", "epsilon")
    must_be("above 0 and below 1", lambda value: 0 < value < 1, "plateau_factor")
    must_be("above 0, a finite number", lambda value: 0 < value < math.inf, "data_gigabytes")
    must_be("a finite number", math.isfinite, *finite)
    must_be("below 1, a share of the samples", lambda value: value < 1, *SHARES)
    seconds = config.detect_hangs  # a healthy rank may show no sign of life for a fraction of a second
    if seconds and not 1 <= seconds <= LONGEST_HANG:
        raise UserError(f"--detect-hangs must be 0, or from 1 to {LONGEST_HANG} seconds, not {seconds}")


def _check_final_learning_rate(config: TrainConfig) -> None:
    """Raise `UserError` if the learning rate becomes infinite before the last epoch."""
    if not math.isfinite(config.scaled_learning_rate):
        raise UserError(f"--lr-base-batch {config.lr_base_batch} makes --lr {config.lr} infinite: give a smaller rate")
    if config.schedule != "step":
        return
    changes = (config.epoch_count - 1) // config.lr_step_epochs
    try:
        last = config.scaled_learning_rate * float(config.lr_step_factor) ** changes
    except OverflowError:
        last = math.inf
    if not math.isfinite(last):
        raise UserError(
            f"--lr-step-factor {config.lr_step_factor} makes the learning rate infinite before epoch "
            f"{config.epochs}: give a factor below 1"
        )


def _check_path(config: TrainConfig, name: str) -> None:
    """Raise `UserError` for a path that no file can have, or that a config file or message cannot show."""
    path = str(getattr(config, name))
    if not _is_utf8(path):
        raise UserError(f"{flag_of(name)} {path!r} is not valid UTF-8: rename the folder")
    if "\0" in path:
        raise UserError(f"{flag_of(name)} {path!r} contains a NUL character: no file can have this name")


def _check_texts(config: TrainConfig) -> None:
    """Raise `UserError` for a text that the files of a run cannot hold, such as the name of a script's dataset."""
    for name, value in config.to_json().items():
        if isinstance(value, str) and not _is_utf8(value):
            raise UserError(f"{flag_of(name)} {value!r} is not valid UTF-8: give another name")


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)  # such a letter is an undecoded byte


def is_own(name: str) -> bool:
    """Return whether a model or dataset is the user's own code: file.py:function or package.module:function."""
    return ":" in name and not name.startswith(FROM_PATH)


def names_match(one: str, other: str) -> bool:
    """Return True if two names may mean one function: the file may have moved, or the module may run as a script.

    >>> names_match("/home/ada/net.py:build", "net.py:build"), names_match("net.py:build", "net.py:make")
    (True, False)
    """
    (first, _, name), (second, _, other_name) = one.rpartition(":"), other.rpartition(":")
    modules = {Path(place).stem if place.endswith(".py") else place.rpartition(".")[2] for place in (first, second)}
    return name == other_name and len(modules - {"__main__"}) <= 1


def comes_from_script(dataset: str) -> bool:
    """Return whether a dataset's name can only be that of a `Dataset` that a script has passed.

    >>> comes_from_script("shells"), comes_from_script("npz:shells.npz"), comes_from_script("mnist")
    (True, False, False)
    """
    return dataset not in DATASETS and not dataset.startswith(FROM_PATH) and not is_own(dataset)


def reads_data_dir(dataset: str) -> bool:
    """Return whether a dataset reads files from `--data-dir`. Digits and paths do not."""
    return dataset != "digits" and not dataset.startswith(FROM_PATH)


def reads_image_files(dataset: str) -> bool:
    """Return whether a dataset consists of image files, which `--resize` and `--skip-damaged` are for."""
    return dataset.startswith(("folder:", "csv:"))


def check_model_name(model: str) -> None:
    """Raise `UserError` unless the text names one of our models or can name the user's own."""
    if is_own(model):
        _check_function_name("--model", model)
    elif model not in MODELS:
        raise UserError(f"{unknown_name('model', model, MODELS)} (for your own, give file.py:function)")


def check_dataset_name(dataset: str) -> None:
    """Raise `UserError` unless the text names one of our datasets or can name the user's own."""
    if is_own(dataset):
        _check_function_name("--dataset", dataset)
    elif dataset.startswith(FROM_PATH):
        if dataset in FROM_PATH or "\0" in dataset or not _is_utf8(dataset):
            raise UserError(
                f"--dataset {dataset!r} does not name a file: give npz:FILE.npz, folder:PATH or csv:FILE.csv"
            )
    elif dataset not in DATASETS:
        if prefix := _prefix_of_path(dataset):
            raise UserError(f"--dataset {dataset!r} is the path of your own data: give --dataset {prefix}{dataset}")
        raise UserError(
            f"{unknown_name('dataset', dataset, DATASETS)} (for your own, give npz:FILE.npz, folder:PATH, "
            "csv:FILE.csv or file.py:function; a dataset that a script passed is known only to that script)"
        )


def _prefix_of_path(dataset: str) -> str | None:
    """Return the prefix that this path needs as a dataset; None if the text is not such a path."""
    suffix = Path(dataset).suffix.lower()
    if suffix in {".npz", ".csv"} and "\0" not in dataset:
        return f"{suffix[1:]}:"
    return "folder:" if os.path.isdir(dataset) else None  # noqa: PTH112  raises nothing


def _check_function_name(flag: str, name: str) -> None:
    place, _, function = name.rpartition(":")
    is_file = place.endswith(".py") and "\0" not in place and _is_utf8(place)
    if not (function.isidentifier() and (is_file or all(part.isidentifier() for part in place.split(".")))):
        raise UserError(f"{flag} {name!r} does not name a function: give file.py:function or package.module:function")


def run_folder_of(path: Path) -> Path | None:
    """Return the run folder of a checkpoint, or None if it is in none. Return any path that is not a file itself."""
    if not path.is_file():
        return path
    for name in (path, path.absolute(), path.resolve()):
        if name.parent.name == "checkpoints" and (name.parent.parent / "config.toml").is_file():
            return name.parent.parent
    return None


def differences(ours: TrainConfig, theirs: Mapping[str, Any]) -> list[str]:
    """Return one clause for each setting that differs from a checkpoint's but may not change on resume."""
    mine = ours.to_json()
    fixed = mine.keys() - FREE_TO_CHANGE_ON_RESUME
    if ours.schedule == "cosine":
        fixed |= {"epochs"}  # the cosine ends with them
    if ours.kernels == "auto":  # the choice of the checkpoint
        fixed -= {"kernels"}
    defaults = {name: field.default for name, field in FIELDS.items()}
    theirs = defaults | BEFORE_THE_SETTING | dict(theirs)  # an older version had fewer
    return [
        f"{flag_of(name)} is {mine[name]!r} here and {theirs[name]!r} in the checkpoint"
        for name in mine
        if name in fixed and mine[name] != theirs[name] and not _moved(name, ours, theirs)
    ]


def _moved(name: str, ours: TrainConfig, theirs: Mapping[str, Any]) -> bool:
    """Return whether two names may mean the same data, or the same function of the user.

    - Both datasets are the user's file or folder, which may have moved, or one is from a script. The resume compares
      the hash of the data.
    - One model is from a script, which a command now imports. The resume compares the shapes of its parameters.
    """
    mine, other = str(getattr(ours, name)), str(theirs.get(name))
    if name == "dataset":
        same_kind = any(mine.startswith(kind) and other.startswith(kind) for kind in FROM_PATH)
        return same_kind or comes_from_script(mine) or comes_from_script(other)
    is_from_script = mine.startswith("__main__:") or other.startswith("__main__:")
    return name == "model" and is_from_script and names_match(mine, other)
