"""Flags and files give the settings of a run, and its config.toml gives the same settings again."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import string
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from distdl import config as config_module
from distdl.__main__ import COMMANDS
from distdl.config import (
    FIELDS,
    FREE_TO_CHANGE_ON_RESUME,
    GROUPS,
    NOT_IN_CONFIG_FILE,
    TrainConfig,
    differences,
    expand_home,
)
from distdl.data.sources import FROM_PATH, SOURCES
from distdl.errors import UserError
from distdl.job.restarts import run_folder
from distdl.nn import LOSSES, MODELS
from distdl.optim import OPTIMIZERS
from distdl.parallel import REDUCTIONS
from distdl.schedules import SCHEDULES
from distdl.train_command import parse


def flag(name):
    return "--" + name.replace("_", "-")


def parsed(*arguments):
    return parse([str(argument) for argument in arguments])


def written(folder, text, name="given.toml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(*arguments):
    """Return the message, in one line, of the error that the arguments cause."""
    with pytest.raises(UserError) as caught:
        parsed(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# registries


def test_the_config_lists_the_names_of_the_registries():
    choices = {name: set(typing.get_args(kind)) for name, kind in typing.get_type_hints(TrainConfig).items()}
    assert set(config_module.MODELS) == set(MODELS)
    assert set(config_module.DATASETS) == set(SOURCES)
    assert set(config_module.FROM_PATH) == set(FROM_PATH)
    assert set(config_module.OPTIMIZERS) == set(OPTIMIZERS) == choices["optimizer"]
    assert {"auto", *LOSSES} == choices["loss"]
    assert set(SCHEDULES) == choices["schedule"]
    assert set(config_module.KERNELS) == choices["kernels"]
    assert set(config_module.REDUCTIONS) == set(REDUCTIONS) == choices["reduction"]


def test_other_names_suggest_existing_settings():
    assert set(config_module.OTHER_NAMES.values()) <= set(FIELDS)
    assert not set(config_module.OTHER_NAMES) & set(FIELDS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_starts_at_its_own_default_rate(optimizer):
    expected = 0.001 if optimizer in {"adam", "adamw", "rmsprop"} else 0.01
    assert parsed("--optimizer", optimizer).learning_rate == expected
    assert parsed("--optimizer", optimizer, "--lr", "0.5").learning_rate == 0.5


@pytest.mark.parametrize(("dataset", "epochs"), [("digits", 60), ("mnist", 20)])
def test_each_dataset_has_its_own_number_of_epochs(dataset, epochs):
    assert parsed("--dataset", dataset).epoch_count == epochs
    assert parsed("--dataset", dataset, "--epochs", "3").epoch_count == 3


def test_without_a_flag_the_defaults_are_those_of_the_design():
    config = parsed()
    assert (config.dataset, config.model, config.optimizer) == ("digits", "simple_convnet", "adam")
    assert (config.batch_size, config.micro_batch_size, config.micro_batches) == (128, 16, 8)
    assert (config.weight_decay, config.seed, config.threads_per_rank) == (0, 0, 1)
    assert (config.schedule, config.reduction) == ("constant", "tree")
    assert (config.run_dir, config.resume, config.max_steps) == (None, None, None)


def test_a_ragged_batch_counts_its_last_micro_batch():
    assert parsed("--batch-size", 100).micro_batches == 7
    assert parsed("--batch-size", 16).micro_batches == 1


# imports and help


def run_python(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=True
    ).stdout


HEAVY = "print(sorted({'numpy', 'mpi4py', 'safetensors'} & set(sys.modules)))"


def test_flags_are_read_before_numpy_and_mpi_are_imported(pytestconfig):
    code = f"""
import sys
import distdl, distdl.config, distdl.errors, distdl.job.launched_by, distdl.cli, distdl.train_command, distdl.mpirun
import distdl.__main__, distdl.verify, distdl.evaluate, distdl.report, distdl.bench.__main__, distdl.search.__main__
{HEAVY}
distdl.train_command.parse(["--lr", "0.1", "--dataset", "mnist", "--data-dir", "here"])
try:
    distdl.train_command.parse(["--lr", "much"])
except distdl.errors.UserError:
    pass
{HEAVY}
"""
    assert run_python(code, pytestconfig.rootpath) == "[]\n[]\n"


@pytest.fixture(scope="module")
def help_text(pytestconfig):
    code = f"""
import os, sys
for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
    os.environ.pop(name, None)
from distdl import cli, train_command
try:
    cli.run(train_command.main, ["--help"])
except SystemExit as stop:
    print("exit code", stop.code)
{HEAVY}
"""
    return run_python(code, pytestconfig.rootpath)


def test_help_needs_neither_numpy_nor_mpi(help_text):
    assert help_text.endswith("exit code 0\n[]\n")


def test_help_has_a_line_for_every_flag(help_text):
    plain = " ".join(help_text.split())
    assert list(docstrings()) == list(FIELDS)
    for name, said in docstrings().items():
        assert flag(name) in plain, name
        assert len(said) > 10, name
        assert " ".join(said.split()) in plain, name


def docstrings():
    """Return the text after each setting in the source."""
    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body
    return {
        setting.target.id: text.value.value
        for setting, text in itertools.pairwise(body)
        if isinstance(setting, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


# flags, file, defaults


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path):
    file = written(tmp_path, 'lr = 0.5\nepochs = 7\noptimizer = "sgd"\nrecord_hashes = true\ndata_dir = "there"\n')
    from_file = parsed("--config", file)
    assert (from_file.lr, from_file.epochs, from_file.optimizer) == (0.5, 7, "sgd")
    assert (from_file.record_hashes, from_file.data_dir) == (True, Path("there"))
    assert from_file.batch_size == 128
    for arguments in (["--lr", "2", "--config", file], [f"--config={file}", "--lr=2"], ["--lr=2", "--config", file]):
        over = parsed(*arguments)
        assert (over.lr, over.epochs, over.optimizer) == (2.0, 7, "sgd")


def test_a_file_may_hold_settings_that_have_no_effect_because_of_flags(tmp_path):
    file = written(tmp_path, 'dataset = "mnist"\ndata_dir = "there"\nschedule = "step"\nlr_step_factor = 0.5\n')
    config = parsed("--config", file, "--dataset", "digits", "--schedule", "constant")
    assert (config.dataset, config.schedule, config.lr_step_factor) == ("digits", "constant", 0.5)


def test_a_file_overrides_the_settings_of_the_resumed_run(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = run / "checkpoints" / "step-00000010.safetensors"
    checkpoint.write_bytes(b"")
    first = parsed("--model", "mlp", "--lr", "0.5", "--seed", "3", "--epochs", "9", "--max-steps", "10")
    written(run, first.to_toml(), "config.toml")

    for arguments in (
        ["--resume", run],
        ["--resume", checkpoint],
        ["--resume", "auto", "--run-dir", run],
        [f"--run-dir={run}", "--resume=auto"],
        ["--run_dir", run, "--resume", "auto"],
    ):
        config = parsed(*arguments)
        assert (config.model, config.lr, config.seed, config.epochs) == ("mlp", 0.5, 3, 9), arguments
        assert config.max_steps is None, "a resume without --max-steps continues"
    assert parsed("--resume", run, "--max-steps", "20").max_steps == 20

    file = written(tmp_path, "seed = 4\nlr = 0.6\n")
    config = parsed("--resume", run, "--config", file, "--lr", "0.7")
    assert (config.model, config.seed, config.lr) == ("mlp", 4, 0.7)


def test_switches_of_a_file_override_those_of_the_resumed_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    written(run, parsed("--record-hashes").to_toml(), "config.toml")
    assert parsed("--resume", run).record_hashes is True
    assert parsed("--resume", run, "--config", written(tmp_path, "record_hashes = false\n")).record_hashes is False


def test_only_a_file_in_the_checkpoints_of_a_run_folder_belongs_to_a_run(tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    for path in (run / "checkpoints" / "x", run / "copies" / "x", other / "checkpoints" / "x", run / "config.toml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert config_module.run_folder_of(run / "checkpoints" / "x") == run
    assert config_module.run_folder_of(run / "copies" / "x") is None
    assert config_module.run_folder_of(other / "checkpoints" / "x") is None
    assert config_module.run_folder_of(run) == run
    monkeypatch.chdir(run / "checkpoints")
    assert config_module.run_folder_of(Path("x")) == run


def test_auto_without_a_run_starts_from_the_defaults(tmp_path):
    config = parsed("--resume", "auto", "--run-dir", tmp_path / "new")
    assert config == dataclasses.replace(parsed(), resume="auto", run_dir=tmp_path / "new")


# round trips

positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30),
    st.text(string.printable, max_size=12),
    st.sampled_from(
        ["", "-x", "--help", "--lr=3", "a b", 'quo"te', "C:\\u0041", "new\nline", "\r\n", "\x1f", "'''", "~"]
    ),
)
paths = texts.filter(lambda text: text == "~" or not text.startswith("~")).map(Path)  # ~name needs a user
configs = st.builds(
    TrainConfig,
    dataset=st.sampled_from(config_module.DATASETS),
    data_dir=st.none() | paths,
    model=st.sampled_from(config_module.MODELS),
    epochs=st.none() | st.integers(1, 10**12),
    batch_size=st.integers(64, 10**9),
    micro_batch_size=st.integers(1, 64),
    loss=st.sampled_from(["auto", *LOSSES]),
    label_smoothing=st.floats(0, 1, exclude_max=True),
    class_weights=st.sampled_from(["none", "balanced"]),
    standardize_targets=st.booleans(),
    optimizer=st.sampled_from(config_module.OPTIMIZERS),
    lr=st.none() | positive,
    lr_base_batch=st.none() | st.integers(10**9, 10**12),
    momentum=st.floats(0, 1, exclude_max=True),
    beta1=st.floats(0, 1, exclude_max=True),
    beta2=st.none() | st.floats(0, 1, exclude_max=True),
    epsilon=st.none() | positive,
    weight_decay=st.just(0.0) | positive,
    l1_decay=st.just(0.0) | positive,
    clip_norm=st.none() | positive,
    warmup_steps=st.integers(0, 10**6),
    schedule=st.sampled_from(SCHEDULES),
    lr_step_epochs=st.integers(1, 10**6),
    lr_step_factor=st.floats(0, 1, exclude_min=True),
    plateau_patience=st.integers(1, 10**6),
    plateau_factor=st.floats(0, 1, exclude_min=True, exclude_max=True),
    augment=st.none() | st.sampled_from(["flip", "rotate=10,shift=2,scale=0.1,crop=2,flip,brightness=0.1"]),
    init_from=st.none() | paths.map(str),
    freeze=st.none() | st.sampled_from(["conv2d_1", "residual_1.body.conv2d_1.weight, affine_1.bias"]),
    seed=st.integers(0, 2**80),
    run_dir=st.none() | paths,
    max_steps=st.none() | st.integers(1, 10**15),
    early_stopping=st.integers(0, 10**6),
    test_with=st.sampled_from(["last", "best"]),
    resume=st.none() | paths.map(str),
    checkpoint_every=st.integers(0, 10**6),
    keep_checkpoints=st.integers(1, 10**6),
    log_every=st.integers(0, 10**6),
    stall_warning=st.just(0.0) | positive,
    detect_hangs=st.just(0.0) | st.floats(1, 86_400),
    record_hashes=st.booleans(),
    balance=st.booleans(),
    reduction=st.sampled_from(sorted(REDUCTIONS)),
    kernels=st.sampled_from(config_module.KERNELS),
    on_nonfinite=st.sampled_from(["stop", "skip"]),
    verify_every=st.integers(0, 10**6),
    cross_check=st.integers(0, 10**6),
    require_same_bits=st.booleans(),
    prove=st.just(False),
    threads_per_rank=st.integers(1, 1024),
    trace=st.none() | paths,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs)
@example(TrainConfig(data_dir=Path("emoji 😀, DEL \x7f, naïve, \u2028"), lr=5e-324, lr_step_factor=1e22))
def test_the_config_file_of_a_run_runs_the_same_again(tmp_path, config):
    # This word unsets a setting.
    assume(config.data_dir != Path("None") and config.init_from != "None")
    assume(config.resume != "auto")
    config = config.checked()
    text = config.to_toml()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), "TOML allows no control character except the line feed"
    values = tomllib.loads(text)
    for name, value in config.to_json().items():
        assert values.get(name) == (None if name in NOT_IN_CONFIG_FILE else value), name
    file = tmp_path / "config.toml"
    file.write_bytes(text.encode())
    again = parsed("--config", file)
    assert again == dataclasses.replace(config, config=file, run_dir=None, resume=None, trace=None)
    assert again.to_toml() == text


@settings(max_examples=100, deadline=None)
@given(configs)
def test_a_config_travels_as_json(config):
    assume(config.resume != "auto")
    config = config.checked()
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_checking_a_checked_config_changes_nothing():
    config = parsed("--lr", "0.3", "--dataset", "mnist")
    assert config.checked() == config


# differences

OTHER = {
    "config": Path("other.toml"),
    "dataset": "mnist",
    "data_dir": Path("there"),
    "cache": Path("there"),
    "data_gigabytes": 5.0,
    "lock": "link",
    "validation_share": 0.2,
    "test_share": 0.2,
    "resize": "32x48:pad",
    "skip_damaged": True,
    "csv_columns": "file,species",
    "model": "mlp",
    "model_settings": "hidden=50",
    "epochs": 61,
    "batch_size": 64,
    "micro_batch_size": 8,
    "loss": "mean_squared_error",
    "label_smoothing": 0.1,
    "class_weights": "balanced",
    "standardize_targets": True,
    "optimizer": "sgd",
    "lr": 0.5,
    "lr_base_batch": 32,
    "momentum": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "epsilon": 0.1,
    "weight_decay": 0.1,
    "l1_decay": 0.1,
    "clip_norm": 1.0,
    "schedule": "step",
    "warmup_steps": 3,
    "lr_step_epochs": 7,
    "lr_step_factor": 0.3,
    "plateau_patience": 3,
    "plateau_factor": 0.5,
    "augment": "flip",
    "init_from": "source",
    "freeze": "conv2d_1",
    "seed": 1,
    "run_dir": Path("run"),
    "max_steps": 5,
    "dry_run": True,
    "early_stopping": 3,
    "test_with": "best",
    "resume": "run",
    "checkpoint_every": 7,
    "keep_checkpoints": 9,
    "log_every": 3,
    "stall_warning": 5.0,
    "detect_hangs": 2.5,
    "record_hashes": True,
    "balance": True,
    "reduction": "allreduce",
    "kernels": "compiled",
    "on_nonfinite": "skip",
    "verify_every": 5,
    "cross_check": 5,
    "require_same_bits": True,
    "prove": True,
    "threads_per_rank": 2,
    "trace": Path("trace.json"),
    "tensorboard": True,
    "mlflow": Path("mlruns"),
}
FREE = {
    *("config", "run_dir", "resume", "dry_run", "data_dir", "cache", "epochs", "max_steps", "checkpoint_every"),
    *("keep_checkpoints", "early_stopping", "test_with", "log_every", "stall_warning", "detect_hangs"),
    *("record_hashes", "balance", "on_nonfinite"),
    *(
        "verify_every",
        "cross_check",
        "require_same_bits",
        "prove",
        "threads_per_rank",
        "trace",
        "lock",
        "data_gigabytes",
    ),
    *("tensorboard", "mlflow"),
}


def test_files_of_older_runs_may_have_earlier_names_of_settings(tmp_path):
    """The setting ``cross_check`` was called ``audit``. On the command line its new name is suggested."""
    assert parsed("--config", written(tmp_path, "audit = 5\n")).cross_check == 5
    assert TrainConfig.from_json({"audit": 3}).cross_check == 3
    with pytest.raises(UserError, match="unknown flag --audit: did you mean --cross-check"):
        parsed("--audit", "5")


def test_every_setting_is_in_one_group_of_the_help():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(FIELDS)


def test_every_setting_is_either_free_to_change_on_resume_or_kept():
    assert set(OTHER) == set(FIELDS)
    assert FREE == FREE_TO_CHANGE_ON_RESUME


@pytest.mark.parametrize("name", FIELDS)
def test_a_difference_is_named_unless_it_is_free_to_change(name):
    ours = parsed("--kernels", "numpy")
    theirs = json.loads(json.dumps(dataclasses.replace(ours, **{name: OTHER[name]}).to_json()))
    expected = (
        [] if name in FREE else [f"{flag(name)} is {getattr(ours, name)!r} here and {theirs[name]!r} in the checkpoint"]
    )
    assert differences(ours, theirs) == expected
    assert differences(ours, json.loads(json.dumps(ours.to_json()))) == []


def test_the_length_of_a_cosine_is_not_free_to_change():
    ours = parsed("--schedule", "cosine", "--epochs", "5")
    assert differences(ours, ours.to_json() | {"epochs": 4}) == ["--epochs is 5 here and 4 in the checkpoint"]


def test_a_learning_rate_is_scaled_to_the_batch_only_on_request():
    assert parsed("--lr", "0.1", "--batch-size", "512").scaled_learning_rate == 0.1
    assert parsed("--lr", "0.1", "--batch-size", "512", "--lr-base-batch", "128").scaled_learning_rate == 0.4


def test_auto_takes_the_kernels_of_the_checkpoint_and_a_version_without_the_setting_had_numpy():
    theirs = parsed().to_json()
    for chosen in ("numpy", "compiled"):
        assert differences(parsed(), theirs | {"kernels": chosen}) == []
    del theirs["kernels"]
    assert differences(parsed(), theirs) == differences(parsed("--kernels", "numpy"), theirs) == []
    said = "--kernels is 'compiled' here and 'numpy' in the checkpoint"
    assert differences(parsed("--kernels", "compiled"), theirs) == [said]
    assert TrainConfig.from_json(theirs).kernels == "numpy"


def test_all_differences_are_named_and_a_setting_that_an_older_version_lacked_had_its_default():
    ours = parsed("--model", "mlp")
    theirs = ours.to_json() | {"seed": 1, "lr": 0.5}
    del theirs["model"], theirs["freeze"]
    assert [said.split()[0] for said in differences(ours, theirs)] == ["--model", "--lr", "--seed"]


# refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epohcs", "3"], "unknown flag --epohcs: did you mean --epochs?"),
        (["--batch_sise=3"], "unknown flag --batch_sise: did you mean --batch-size?"),
        (["--zzzzzz"], "unknown flag --zzzzzz: --help lists all flags"),
        (["--learning-rate", "0.1"], "unknown flag --learning-rate: did you mean --lr?"),
        (["--output_dir=x"], "unknown flag --output_dir: did you mean --run-dir?"),
        (["--LR", "0.1"], "unknown flag --LR: did you mean --lr?"),
        (["--", "--epochs", "3"], "unknown flag --: leave it out"),
        (["--optimizer", "SGD"], "did you mean 'sgd'?"),
        (["--model", "MLP"], "did you mean 'mlp'?"),
        (["--model", "simple_convent"], "did you mean 'simple_convnet'?"),
        (
            ["--dataset", "mnits"],
            "expected one of cifar10, digits, fashion-mnist, kmnist, mnist; did you mean 'mnist'?",
        ),
        (["--optimizer", "rmsporp"], "unknown optimizer 'rmsporp': expected one of"),
        (["--schedule", "cosin"], "did you mean 'cosine'?"),
        (["--schedule", "ReduceLROnPlateau"], "did you mean 'plateau'?"),
        (["--loss", "mse"], "unknown loss 'mse': expected one of auto, binary_cross_entropy, cross_entropy, mean_squ"),
        (["--loss", "MSE"], "did you mean 'mean_squared_error'?"),
        (["--loss", "crossentropy"], "did you mean 'cross_entropy'?"),
        (["--loss", "bce"], "did you mean 'binary_cross_entropy'?"),
        (["--lr", "1e308", "--lr-base-batch", "1"], "--lr-base-batch 1 makes --lr 1e+308 infinite"),
        (["--epochs", "many"], "many"),
        (["--epochs"], "--epochs"),
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--epochs", "1" * 400, "--schedule", "cosine"], "--epochs must be at most 9007199254740992; the given"),
        (["--batch-size", str(2**53 + 1)], "--batch-size must be at most 9007199254740992; the given"),
        (["--batch-size=-1"], "--batch-size must be at least 1, not -1"),
        (["--seed=-1"], "--seed must be at least 0, not -1"),
        (["--max-steps", "0"], "--max-steps must be at least 1, not 0"),
        (["--threads-per-rank", "0"], "--threads-per-rank must be at least 1, not 0"),
        (["--verify-every=-1"], "--verify-every must be at least 0, not -1"),
        (["--cross_check=-1"], "--cross-check must be at least 0, not -1"),
        (["--on-nonfinite", "ignore"], "unknown value of --on-nonfinite 'ignore': expected one of skip, stop"),
        (["--weight-decay=-0.1"], "--weight-decay must be at least 0, not -0.1"),
        (["--augment", "rotates=10"], "--augment 'rotates=10': unknown transform 'rotates'"),
        (["--lr", "0"], "--lr must be above 0, not 0.0"),
        (["--lr", "nan"], "--lr must be above 0, not nan"),
        (["--lr", "inf"], "--lr must be a finite number, not inf"),
        (["--weight-decay", "nan"], "--weight-decay must be a finite number, not nan"),
        (["--lr-step-factor", "inf"], "--lr-step-factor must be a finite number, not inf"),
        (["--batch-size", "8"], "--micro-batch-size 16 is larger than --batch-size 8"),
        (["--data-dir", "/nonexistent"], "--data-dir has no effect with --dataset digits: give --dataset mnist, or"),
        (["--dataset=npz:a.npz", "--data-dir=b"], "--data-dir has no effect with --dataset npz:a.npz"),
        (["--dataset=folder:a", "--data-dir=b"], "--data-dir has no effect with --dataset folder:a"),
        (["--csv-columns=a,b"], "--csv-columns has no effect with --dataset digits: give csv:FILE, or leave it out"),
        (["--dataset=csv:"], "--dataset 'csv:' does not name a file: give npz:FILE.npz, folder:PATH or csv:FILE.csv"),
        (["--dataset=a/b.npz"], "--dataset 'a/b.npz' is the path of your own data: give --dataset npz:a/b.npz"),
        (["--dataset=list.CSV"], "give --dataset csv:list.CSV"),
        (["--dataset=/"], "give --dataset folder:/"),
        (["--resize", "32"], "--resize has no effect with --dataset digits: it is for image files"),
        (["--dataset=npz:a.npz", "--skip-damaged"], "--skip-damaged has no effect with --dataset npz:a.npz"),
        (["--dataset=folder:a", "--resize=0"], "--resize '0': expected a height and a width from 1 to 4096 pixels"),
        (
            ["--lr-step-epochs", "5"],
            "--lr-step-epochs has no effect with --schedule constant: give --schedule step, or",
        ),
        (
            ["--momentum", "0.5"],
            "--momentum has no effect with --optimizer adam: give --optimizer momentum or nesterov,",
        ),
        (["--beta1=0.5", "--optimizer=rmsprop"], "--beta1 has no effect with --optimizer rmsprop: give --optimizer"),
        (["--epsilon=1", "--optimizer=sgd"], "--epsilon has no effect with --optimizer sgd"),
        (
            ["--plateau-patience", "3"],
            "--plateau-patience has no effect with --schedule constant: give --schedule plateau",
        ),
        (["--schedule=plateau", "--plateau-factor=1"], "--plateau-factor must be above 0 and below 1, not 1.0"),
        (["--beta2", "1"], "--beta2 must be at least 0 and below 1, not 1.0"),
        (["--lr-step-factor=.1", "--schedule=cosine"], "--lr-step-factor has no effect with --schedule cosine"),
        (["--resume", "auto"], "--resume auto looks for checkpoints in --run-dir"),
        (["--config", "/nowhere/c.toml"], "cannot read the config file /nowhere/c.toml: No such file or directory"),
        (["--data-dir", "a\udcff"], "is not valid UTF-8"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "backslashreplace").decode() if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_reported_in_one_line(arguments, said):
    assert said in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr = ", "is not valid TOML"),
        ("learnrate = 0.1", "unknown setting 'learnrate': expected one of "),
        ("learning_rate = 0.1", "did you mean 'lr'?"),
        ("epoch = 3", "did you mean 'epochs'?"),
        ('run_dir = "x"', "unknown setting 'run_dir'"),
        ('config = "x"', "unknown setting 'config'"),
        ("lr = [0.1]", "lr = [0.1] is not a value for --lr"),
        ("lr = true", "lr = True is not a value for --lr"),
        ("[optimizer]\nname = 'adam'", "is not a value for --optimizer"),
        ("batch_size = 1.5", "1.5"),
        ("epochs = 0", "--epochs must be at least 1, not 0"),
    ],
    ids=lambda text: text.replace("\n", " "),
)
def test_a_wrong_file_is_reported_in_one_line_that_names_it(text, said, tmp_path):
    path = written(tmp_path, text)
    message = refused("--config", path)
    assert said in message
    assert f"the config file {path}" in message


def test_a_wrong_flag_is_not_blamed_on_the_file(tmp_path):
    path = written(tmp_path, "epochs = 3\nbatch_size = 64")
    assert str(path) not in refused("--config", path, "--epochs", "0")
    assert str(path) not in refused("--config", path, "--lr", "0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, r"unknown schedule 'linear': expected one of constant, cosine, plateau, step"),
        ({"kernels": "complied"}, r"unknown kernels 'complied': .*did you mean 'compiled'\?"),
        ({"reduction": "tee"}, r"unknown reduction 'tee': .*did you mean 'tree'\?"),
        ({"optimizer": 3}, r"unknown optimizer '3'"),
        ({"epochs": "3"}, r"--epochs must be a whole number, not '3'"),
        ({"batch_size": 64.0}, r"--batch-size must be a whole number, not 64\.0"),
        ({"seed": True}, r"--seed must be a whole number, not True"),
        ({"lr": "0.1"}, r"--lr must be a number, not '0\.1'"),
        ({"run_dir": 3}, r"--run-dir must be a path, not 3"),
        ({"record_hashes": 1}, r"--record-hashes must be true or false, not 1"),
    ],
)
def test_a_setting_of_another_type_in_a_script_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings).checked()


def test_a_script_may_give_whole_learning_rates_and_paths_as_strings():
    config = TrainConfig(lr=1, run_dir="somewhere", max_steps=None).checked()
    assert (config.lr, config.run_dir) == (1, "somewhere")


# the home folder

#: The flags of a text that is a path or ends in one; each is tried with `~/x`, or with this value.
PATH_TEXTS = {
    "train": {"dataset": ["npz:~/x", "folder:~/x", "~/x.py:f"], "model": ["~/x.py:f"], "resume": [], "init_from": []},
    "evaluate": {"dataset": ["npz:~/x", "~/x.py:f"], "model": ["~/x.py:f"]},
    "report": {"dataset": ["npz:~/x", "~/x.py:f"], "model": ["~/x.py:f"]},
    "export": {"dataset": ["npz:~/x", "~/x.py:f"], "model": ["~/x.py:f"]},
    "bench": {"model": ["~/x.py:f"]},
}


def path_settings():
    """Yield each command with each of its flags that can hold a path, and a value with `~`."""
    for name, module in COMMANDS.items():
        command = importlib.import_module(module).COMMAND
        for setting, kind in typing.get_type_hints(command.settings).items():
            in_groups = setting in itertools.chain(*command.groups.values())
            is_path = kind is Path or Path in typing.get_args(kind)
            if in_groups and (is_path or setting in PATH_TEXTS.get(name, {})):
                for text in PATH_TEXTS.get(name, {}).get(setting) or ["~/x"]:
                    yield pytest.param(command, setting, text, id=f"{name} {setting} {text}")


@pytest.mark.parametrize(("command", "setting", "text"), [*path_settings()])
def test_a_tilde_is_the_home_folder_in_each_path_of_each_command(command, setting, text, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    name = command.flags[setting].name if setting in command.flags else ""
    words = [text] if name and not name.startswith("-") else [f"{name or flag(setting)}={text}"]
    given = command.given(words)[setting]
    assert given == ([text.replace("~", "/home/ada")] if isinstance(given, list) else text.replace("~", "/home/ada"))


def test_a_tilde_in_a_file_or_a_script_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    path = written(tmp_path, 'dataset = "folder:~/photos"\ninit_from = "~/run"')
    for config in (parsed("--config", path), TrainConfig(dataset="folder:~/photos", init_from="~/run").checked()):
        assert (config.dataset, config.init_from) == ("folder:/home/ada/photos", "/home/ada/run")
    assert TrainConfig(run_dir=Path("~/x")).checked().run_dir == Path("/home/ada/x")
    assert run_folder(["--run-dir", "~/x"]) == (Path("/home/ada/x"), False)


def test_other_texts_with_a_tilde_are_kept():
    for text in ("npz:a~/b", "./~/x", "a~", "npz:./~/x"):
        assert expand_home("--dataset", text) == text


@pytest.mark.parametrize("home", [None, ""])
def test_an_unknown_home_folder_is_reported_in_one_line(home, monkeypatch):
    def no_user(_):
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", no_user)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    message = "--run-dir '~/x': the home folder ~ is unknown: set HOME, or give the whole path"
    assert refused("--run-dir=~/x") == message
    said = refused("--dataset", "folder:~no-such-user/x")
    assert "there is no user 'no-such-user'; for a file of this name, give ./~no-such-user/x" in said


@pytest.mark.parametrize("name", config_module.TEXTS_OR_PATHS)
def test_a_script_may_give_a_path_for_a_text_that_names_one(name):
    value = Path("folder") / "script.py"
    assert getattr(TrainConfig(**{name: value}).checked(), name) == "folder/script.py"
    with pytest.raises(UserError, match="must be a text, not 5"):
        TrainConfig(**{name: 5}).checked()
