"""What a run is: one frozen dataclass, filled from a TOML file and flags, checked once.

This module imports neither NumPy nor MPI, so that the number of BLAS threads can be set first, a wrong flag is
reported at once, and `--help` is quick. The names of models, optimizers and datasets are therefore listed here
too; a test holds them against the registries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distdl.errors import DamagedFileError, UserError, nearest, unknown_name
from distdl.model_settings import parse_model_settings
from distdl.transforms import Transforms

DATASETS = ("digits", "mnist", "fashion-mnist")
#: What the path of a user's own file or folder has in front of it, as a dataset.
FROM_PATH = ("npz:", "folder:")
MODELS = (
    *("logistic", "mlp", "simple_convnet", "deep_convnet", "lenet", "alexnet"),
    *("vgg11", "vgg16", "googlenet", "resnet18", "resnet20", "resnet50"),
)
OPTIMIZERS = ("adam", "adamw", "momentum", "nesterov", "adagrad", "rmsprop", "sgd")

#: Where the user gives none. The digits are few, so an epoch of them is only ten steps.
DEFAULT_EPOCHS = {"digits": 60}
OTHER_EPOCHS = 20
DEFAULT_LR = {"adam": 0.001, "adamw": 0.001, "rmsprop": 0.001}
OTHER_LR = 0.01

#: What others call our settings: to be suggested, never taken.
OTHER_NAMES = {
    "learning_rate": "lr",
    "l2": "weight_decay",
    "patience": "early_stopping",
    "network": "model",
    **dict.fromkeys(("out", "output", "output_dir", "save_dir", "log_dir"), "run_dir"),
}

#: A resumed run may differ in these: they change neither the weights at a step nor their meaning.
FREE_TO_CHANGE_ON_RESUME = frozenset(
    {
        "config",
        "run_dir",
        "resume",
        "data_dir",
        "epochs",
        "max_steps",
        "early_stopping",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "stall_warning",
        "detect_hangs",
        "record_hashes",
        "threads_per_rank",
        "balance",
        "on_nonfinite",
        "verify_every",
        "audit",
        "trace",
    }
)
#: Where a run lives and how it was started; not part of what it is.
NOT_IN_CONFIG_FILE = frozenset({"config", "run_dir", "resume", "trace"})
#: A config file longer than this is none, and is not read.
LARGEST_CONFIG_BYTES = 2**14
#: No BLAS starts more threads than this.
MOST_THREADS = 1024
#: No whole number but the seed is greater: beyond, not every one is a float, and quotients overflow.
MOST = 2**53
#: A day: so long no hang is waited for.
LONGEST_HANG = 86_400


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a NumPy CNN data-parallel: the same bits on any number of ranks."""

    config: Path | None = None
    """TOML file with any of the settings below, named as the flags with underscores; flags win over it."""
    dataset: str = "digits"
    """What to learn: digits (1,797 real 8x8 images inside the package), mnist, fashion-mnist, npz:FILE.npz (arrays
    images and labels), folder:PATH (a folder of images for each class), file.py:function or package.module:function."""
    data_dir: Path | None = None
    """Folder with the dataset's files; without it mnist and fashion-mnist are downloaded into the user's cache."""
    model: str = "simple_convnet"
    """Network to train: logistic, mlp, simple_convnet, deep_convnet, lenet, alexnet, vgg11, vgg16, googlenet, resnet18,
    resnet20, resnet50; or one of your own, file.py:function or package.module:function."""
    model_settings: str | None = None
    """What the network is built with besides, for mlp such as "hidden=100-50, batch_norm, dropout=0.2"; a function of
    your own is given them as keywords."""
    init_from: str | None = None
    """Run folder or checkpoint whose weights a new run begins with, wherever a tensor's name and shape agree."""
    freeze: str | None = None
    """Layers or parameters, with commas in between, that keep their values: for example conv2d_1,affine_1.bias."""
    epochs: int | None = None
    """Passes over the training part; without it 60 for digits and 20 for others."""
    batch_size: int = 128
    """Samples of one optimizer step, over all ranks together."""
    micro_batch_size: int = 16
    """Samples of one forward and backward pass, the unit dealt to ranks; never depends on their number."""
    loss: Literal["auto", "cross_entropy", "binary_cross_entropy", "mean_squared_error"] = "auto"
    """What is made small; auto: cross_entropy where there are labels, mean_squared_error where numbers."""
    optimizer: Literal["adam", "adamw", "momentum", "nesterov", "adagrad", "rmsprop", "sgd"] = "adam"
    """Rule of the update."""
    lr: float | None = None
    """Learning rate; without it 0.001 for adam, adamw and rmsprop, and 0.01 for the others."""
    lr_base_batch: int | None = None
    """Batch size that the learning rate is meant for: with another batch-size it is scaled in proportion."""
    weight_decay: float = 0.0
    """Lambda of the L2 penalty on weights (not on biases); with adamw, of its decoupled decay."""
    l1_decay: float = 0.0
    """Lambda of the L1 penalty on weights (not on biases)."""
    clip_norm: float | None = None
    """Longest gradient: one whose Euclidean norm is greater is scaled down to it."""
    schedule: Literal["constant", "step", "cosine"] = "constant"
    """How the rate goes on: constant, multiplied by lr-step-factor each lr-step-epochs, or along a cosine to 0."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises in proportion to what the schedule says."""
    lr_step_epochs: int = 5
    """Epochs between two steps of the step schedule."""
    lr_step_factor: float = 0.1
    """What the step schedule multiplies the learning rate by."""
    augment: str | None = None
    """Random changes of training images, such as rotate=10,shift=2; also scale=0.1, crop=2, flip, brightness=0.1.
    Labels of pixels move along; a pixel that comes from beyond the edge has none, and does not count."""
    seed: int = 0
    """Seed of the split, the order, the initial weights, augmentation and dropout."""
    run_dir: Path | None = None
    """Folder of the run; without it a new one is made under runs/."""
    max_steps: int | None = None
    """Stop after this step of the whole run with a checkpoint; a resume without it goes on."""
    early_stopping: int = 0
    """Epochs without a better validation accuracy after which training ends; 0 for never."""
    resume: str | None = None
    """Checkpoint or run folder to go on from, or auto: the newest intact checkpoint in run-dir, if any."""
    checkpoint_every: int = 0
    """Steps between checkpoints, besides the one at each epoch's end; 0 for none."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, besides the best."""
    log_every: int = 10
    """Steps between the records of metrics.jsonl, besides those of each epoch; 0 for none."""
    stall_warning: float = 300.0
    """Seconds without progress after which ranks say who is late and where it is; 0 for never."""
    detect_hangs: float = 0.0
    """Seconds without a sign of life (stopped, frozen) after which a rank is killed, as others wait; 0 for never."""
    record_hashes: bool = False
    """Write the hash of every tensor after every step into hashes.jsonl (see distdl.verify)."""
    reduction: Literal["tree", "allreduce"] = "tree"
    """How gradients are summed: the canonical tree, or MPI's Allreduce, whose bits depend on the ranks."""
    balance: bool = False
    """Deal micro-batches by each rank's measured speed, and anew as speeds change; the bits stay the same."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do where the loss or gradient of a step is infinite or no number: stop, or skip the step's update."""
    verify_every: int = 100
    """Steps between comparisons of all ranks' weights and optimizer state, also before each checkpoint; 0 for none."""
    audit: int = 0
    """Steps between audits, in which each rank computes the next rank's shard too and compares bits; 0 for none."""
    threads_per_rank: int = 1
    """BLAS threads of each rank; another number than 1 may change bits."""
    trace: Path | None = None
    """JSON file to write when and how long each rank computed, reduced and waited, for ui.perfetto.dev."""

    def checked(self) -> TrainConfig:
        """Return the config with every default filled in; raise `UserError` for a setting that cannot be."""
        for name, kind in typing.get_type_hints(TrainConfig).items():
            _of_its_kind(name, getattr(self, name), kind)
            if isinstance(getattr(self, name), int) and name != "seed" and getattr(self, name) > MOST:
                raise UserError(f"{_flag(name)} must be at most {MOST}, not a number as great as that given")
        config = dataclasses.replace(
            self,
            epochs=DEFAULT_EPOCHS.get(self.dataset, OTHER_EPOCHS) if self.epochs is None else self.epochs,
            lr=DEFAULT_LR.get(self.optimizer, OTHER_LR) if self.lr is None else self.lr,
        )
        _at_least(1, config, "epochs", "batch_size", "micro_batch_size", "lr_step_epochs", "keep_checkpoints")
        _at_least(1, config, "threads_per_rank")
        if config.threads_per_rank > MOST_THREADS:
            raise UserError(f"--threads-per-rank must be at most {MOST_THREADS}, not {config.threads_per_rank}")
        _at_least(0, config, "seed", "checkpoint_every", "log_every", "weight_decay")
        _at_least(0, config, "verify_every", "audit", "stall_warning", "l1_decay", "warmup_steps", "early_stopping")
        _at_least(1, config, *(name for name in ("max_steps", "lr_base_batch") if getattr(config, name) is not None))
        _above_zero(config, "lr", "lr_step_factor", *(["clip_norm"] if config.clip_norm is not None else []))
        for name in ("lr", "weight_decay", "l1_decay", "clip_norm", "lr_step_factor", "stall_warning"):
            if not math.isfinite(getattr(config, name) or 0):
                raise UserError(f"{_flag(name)} must be a finite number, not {getattr(config, name)}")
        if config.augment is not None:
            Transforms.parse(config.augment)
        parse_model_settings(config.model_settings)
        _possible_hang(config)
        _finite_to_the_end(config)
        for name in ("data_dir", "run_dir", "resume", "trace", "init_from"):
            _possible_path(config, name)
        if self.micro_batch_size > self.batch_size:
            raise UserError(
                f"--micro-batch-size {self.micro_batch_size} is larger than --batch-size {self.batch_size}: "
                "a batch consists of whole micro-batches, so give a smaller one or a larger batch"
            )
        if self.resume == "auto" and self.run_dir is None:
            raise UserError("--resume auto looks for checkpoints in --run-dir: give that folder too")
        return config

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
        """The learning rate, scaled to the batch where asked for: the linear rule of Goyal et al. 2017, section 2.1."""
        return self.learning_rate * (1 if self.lr_base_batch is None else self.batch_size / self.lr_base_batch)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a full batch: the most ranks that can share the work."""
        return -(-self.batch_size // self.micro_batch_size)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(self).items()
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> TrainConfig:
        """Return the config that `to_json` gave these values."""
        paths = {
            name: Path(values[name]) for name in ("config", "data_dir", "run_dir", "trace") if values[name] is not None
        }
        return TrainConfig(**{**values, **paths})

    def to_toml(self) -> str:
        """Return the text of a file for `--config` that runs the same again."""
        lines = ["# python -m distdl.train --config FILE runs this again.\n"]
        for name, value in self.to_json().items():
            if value is not None and name not in NOT_IN_CONFIG_FILE:
                # JSON spells a text as TOML does, but for surrogate pairs, which we avoid, and the DEL character.
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{name} = {text}\n")
        return "".join(lines)


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _of_its_kind(name: str, value: object, kind: Any) -> None:
    """Raise `UserError` for a value that is not of the kind that the setting is declared with."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in choices:
            raise unknown_name(f"value of {_flag(name)}" if "_" in name else name, str(value), choices)
        return
    kinds = set(choices or (kind,))
    allowed = kinds | ({int} if float in kinds else set()) | ({str} if Path in kinds else set())
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, tuple(allowed)):
        names = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "true or false"}
        expected = " or ".join(sorted(names[one] for one in kinds - {type(None)}))
        raise UserError(f"{_flag(name)} must be {expected}, not {value!r}")


def _at_least(least: int, config: TrainConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise UserError(f"{_flag(name)} must be at least {least}, not {getattr(config, name)}")


def _above_zero(config: TrainConfig, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise UserError(f"{_flag(name)} must be above 0, not {getattr(config, name)}")


def _possible_hang(config: TrainConfig) -> None:
    """Raise `UserError` for a time in which even a rank that does well may give no sign of life."""
    seconds = config.detect_hangs
    if seconds and not 1 <= seconds <= LONGEST_HANG:
        raise UserError(f"--detect-hangs must be 0, or from 1 to {LONGEST_HANG} seconds, not {seconds}")


def _finite_to_the_end(config: TrainConfig) -> None:
    """Raise `UserError` where the learning rate leaves the range of numbers before the last epoch."""
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


def _possible_path(config: TrainConfig, name: str) -> None:
    """Raise `UserError` for a path that no file can have, or that neither a config file nor a message can show."""
    path = str(getattr(config, name))
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{_flag(name)} {path!r} is not valid UTF-8: rename the folder") from None
    if "\0" in path:
        raise UserError(f"{_flag(name)} {path!r} holds a NUL character: no file can have this name")


def parse(arguments: Sequence[str], program: str) -> TrainConfig:
    """Return the checked config of a command line.

    Settings come from, each over the one before: the defaults, the ``config.toml`` of the run that is resumed,
    the file of `--config`, the flags. Raises `UserError` in one line, and `SystemExit(0)` after `--help`.
    """
    import tyro  # noqa: PLC0415  a tenth of a second that importing the library from a script need not take

    _check_flag_names(arguments)
    from_files: dict[str, Any] = {}
    resumed = _config_of_resumed_run(arguments)
    if resumed is not None:
        from_files |= _settings_of_file(resumed, without=frozenset({"max_steps"}))
    given = value_of("config", arguments)
    if given is not None:
        from_files |= _settings_of_file(Path(given))
    flags = [*_as_flags(from_files), *arguments]
    _check_choices(flags)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.ExitStack() as stack:
            if not {"-h", "--help"} & set(arguments):
                stack.enter_context(_wide_terminal())
            config = tyro.cli(
                TrainConfig,
                args=flags,
                prog=program,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(_one_line(said.getvalue(), flags)) from None
        raise
    check_dataset_name(config.dataset)
    check_model_name(config.model)
    for setting in ("dataset", "model"):
        _check_code(setting, getattr(config, setting), arguments)
    config = config.checked()
    _refuse_without_effect(config, arguments)
    return config


def is_own(name: str) -> bool:
    """Whether the name of a model or dataset is that of a user's own: file.py:function or package.module:function."""
    return ":" in name and not name.startswith(FROM_PATH)


def reads_data_dir(dataset: str) -> bool:
    """Whether a dataset takes files from `--data-dir`: not what the package has, nor what is a path itself."""
    return dataset != "digits" and not dataset.startswith(FROM_PATH)


def check_model_name(model: str) -> None:
    """Raise `UserError` for a text that is neither the name of a model of ours nor of a user's own."""
    if is_own(model):
        _check_function_name("--model", model)
    elif model not in MODELS:
        raise UserError(f"{unknown_name('model', model, MODELS)} (one of your own is given as file.py:function)")


def check_dataset_name(dataset: str) -> None:
    """Raise `UserError` for a text that is neither the name of a dataset of ours nor of a user's own."""
    if is_own(dataset):
        _check_function_name("--dataset", dataset)
    elif dataset.startswith(FROM_PATH):
        if dataset in FROM_PATH or "\0" in dataset or not _is_text(dataset):
            raise UserError(f"--dataset {dataset!r} names no file: give npz:FILE.npz or folder:PATH")
    elif dataset not in DATASETS:
        raise UserError(
            f"{unknown_name('dataset', dataset, DATASETS)} (one of your own is given as npz:FILE.npz, "
            "folder:PATH or file.py:function; one that a script gave is known to that script alone)"
        )


def _check_function_name(flag: str, name: str) -> None:
    place, _, function = name.rpartition(":")
    is_file = place.endswith(".py") and "\0" not in place and _is_text(place)
    if not (function.isidentifier() and (is_file or all(part.isidentifier() for part in place.split(".")))):
        raise UserError(f"{flag} {name!r} names no function: give file.py:function or package.module:function")


def _check_code(setting: str, name: str, arguments: Sequence[str]) -> None:
    """Raise `UserError` for code of a user that the command line does not name.

    A config file, also that of a resumed run, may have come from elsewhere, and what it names would be run.
    """
    if not is_own(name):
        return
    if name.startswith("__main__:"):
        raise UserError(f"the {setting} {name!r} is that of a script that trained it: resume the run by that script")
    if value_of(setting, arguments) != name:
        raise UserError(
            f"a config file names the {setting} {name!r}, which is code and no {setting} of ours: to run it, give "
            f"--{setting} {name} on the command line too"
        )


def _refuse_without_effect(config: TrainConfig, arguments: Sequence[str]) -> None:
    """Raise `UserError` for a flag that does nothing beside the other settings; a file may hold it all the same."""
    if not reads_data_dir(config.dataset) and value_of("data_dir", arguments) is not None:
        raise UserError(
            f"--data-dir does nothing for --dataset {config.dataset}: give --dataset mnist, or leave it out"
        )
    for name in ("lr_step_epochs", "lr_step_factor"):
        if config.schedule != "step" and value_of(name, arguments) is not None:
            raise UserError(
                f"{_flag(name)} does nothing for --schedule {config.schedule}: give --schedule step, or leave it out"
            )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_flag_names(arguments: Sequence[str]) -> None:
    """Raise `UserError` for a flag that is none of ours, with the nearest one."""
    known = [*FIELDS, "help"]
    for argument in arguments:
        given = argument.split("=")[0]
        name = given.replace("-", "_").removeprefix("__")
        if argument.startswith("--") and name not in known:
            near = nearest(name, known, OTHER_NAMES)
            hint = f"did you mean {_flag(near)}?" if near else "--help lists them all"
            raise UserError(f"unknown flag {given}: {'leave it out' if given == '--' else hint}")


def _check_choices(flags: Sequence[str]) -> None:
    """Raise `UserError` for a value that is none of a flag's choices, with the nearest one."""
    for name, kind in typing.get_type_hints(TrainConfig).items():
        value = value_of(name, flags)
        if typing.get_origin(kind) is Literal and value is not None and not value.startswith("--"):
            _of_its_kind(name, value, kind)


def value_of(name: str, arguments: Sequence[str]) -> str | None:
    """Return the value of the last ``--name value`` or ``--name=value``, before the flags are parsed."""
    value = None
    for position, argument in enumerate(arguments):
        flag, equals, after = argument.partition("=")
        if flag.replace("_", "-") != _flag(name):
            continue
        if equals:
            value = after
        elif position + 1 < len(arguments):
            value = arguments[position + 1]
    return value


def _config_of_resumed_run(arguments: Sequence[str]) -> Path | None:
    resume = value_of("resume", arguments)
    folder = value_of("run_dir", arguments) if resume == "auto" else resume
    if folder is None:
        return None
    try:
        found = run_folder_of(Path(folder))
        if found is None:
            return None
        own = found / "config.toml"
        is_lost = not os.path.lexists(own) or (own.is_file() and not own.stat().st_size)
        if is_lost and value_of("config", arguments) is None and _has_checkpoints(found):
            raise DamagedFileError(
                f"{own} is missing or empty, and the run would go on with other settings than it had: put back what "
                "it held, or give that by --config FILE"
            )
        # The folder may be a link, nothing in it may: the search for the checkpoint says so.
        return own if own.is_file() and not own.is_symlink() else None
    except OSError:
        return None  # the search for the checkpoint says what is wrong with the folder


def _has_checkpoints(folder: Path) -> bool:
    inside = folder / "checkpoints"
    return inside.is_dir() and any(path.is_file() for path in inside.glob("step-*.safetensors"))


def run_folder_of(path: Path) -> Path | None:
    """Return the run folder that a checkpoint lies in, None if it lies in none; a path that is no file itself."""
    if not path.is_file():
        return path
    for name in (path, path.absolute(), path.resolve()):
        if name.parent.name == "checkpoints" and (name.parent.parent / "config.toml").is_file():
            return name.parent.parent
    return None


def _text_of(path: Path) -> str:
    """Return the text of a config file; a device or pipe, which may never end, is not opened."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"the config file {path} is not a regular file: give a TOML file")
        with path.open("rb") as file:
            content = file.read(LARGEST_CONFIG_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"cannot read the config file {str(path)!r}: no file can have this name") from None
    if len(content) > LARGEST_CONFIG_BYTES:
        raise UserError(f"the config file {path} is larger than {LARGEST_CONFIG_BYTES} bytes: give a TOML file of ours")
    return content.decode()


def _settings_of_file(path: Path, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return the settings of a TOML file, but for those named in `without`."""
    try:
        values = tomllib.loads(_text_of(path))
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise UserError(f"the config file {path} is no valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"the config file {path} is no valid TOML of ours: it nests too deeply") from None
    settings = {}
    for name, value in values.items():
        if name in without:
            continue
        if name not in FIELDS or name in NOT_IN_CONFIG_FILE:
            raise UserError(
                f"in the config file {path}: "
                + str(unknown_name("setting", name, FIELDS.keys() - NOT_IN_CONFIG_FILE, OTHER_NAMES))
            )
        is_switch = isinstance(FIELDS[name].default, bool)
        if isinstance(value, bool) != is_switch or not isinstance(value, str | int | float):
            raise UserError(f"in the config file {path}: {name} = {value!r} is not a value for {_flag(name)}")
        settings[name] = value
    return settings


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as flags; a switch that is off is no flag."""
    return [
        _flag(name) if value is True else f"{_flag(name)}={value}"
        for name, value in settings.items()
        if value is not False
    ]


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Let tyro write a report as wide as it likes, since its line breaks would tear words apart."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """Return the message inside tyro's report: below the title, above the rule in front of its advice."""
    # On a terminal, which Open MPI's mpirun pretends to be, the report is in colors.
    lines = [line.strip(" │╭╮╰╯|") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    message: list[str] = []
    for line in lines[1:]:
        is_rule = bool(line) and set(line) <= set("-─")
        if is_rule and message:
            break
        if not is_rule:
            message.append(line)
    text = " ".join(line for line in message if line).rstrip(".")
    unparsed = re.match(r"Error parsing --([a-z-]+):", text)
    if unparsed:
        name = unparsed[1].replace("-", "_")
        kind = "a whole number" if "int" in str(FIELDS[name].type) else "a number"
        value = repr(value_of(name, arguments))
        text = f"{_flag(name)} must be {kind}, not {value if len(value) < 80 else value[:80] + '...'}"
    return f"{text}; --help lists all flags"


def differences(ours: TrainConfig, theirs: Mapping[str, Any]) -> list[str]:
    """Return one clause for each setting that differs from a checkpoint's and may not change on resume."""
    mine = ours.to_json()
    fixed = mine.keys() - FREE_TO_CHANGE_ON_RESUME
    if ours.schedule == "cosine":
        fixed |= {"epochs"}  # where the cosine ends
    return [
        f"{_flag(name)} is {mine[name]!r} here and {theirs.get(name)!r} in the checkpoint"
        for name in mine
        if name in fixed and mine[name] != theirs.get(name) and not (name == "dataset" and _moved(ours, theirs))
    ]


def _moved(ours: TrainConfig, theirs: Mapping[str, Any]) -> bool:
    """Whether both read a file, or a folder, of the user's: it may lie elsewhere now, and its hash is compared."""
    return any(ours.dataset.startswith(kind) and str(theirs.get("dataset")).startswith(kind) for kind in FROM_PATH)
