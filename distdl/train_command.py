"""The command ``python -m distdl.train``: from its command line to a checked config, and to a training."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distdl import cli
from distdl.cli import Command, Flag
from distdl.config import (
    DATASETS,
    GROUPS,
    MODELS,
    NOT_IN_CONFIG_FILE,
    OTHER_NAMES,
    RENAMED,
    TrainConfig,
    check_dataset_name,
    check_model_name,
    comes_from_script,
    flag_of,
    is_own,
    reads_data_dir,
    reads_image_files,
    run_folder_of,
    without_effect,
)
from distdl.errors import DamagedFileError, UserError

COMMAND = Command(
    program="python -m distdl.train",
    summary="Train a NumPy CNN, with the same bits on any number of ranks.",
    settings=TrainConfig,
    examples=(
        "python -m distdl.train",
        "mpirun -n 4 python -m distdl.train --dataset mnist --model lenet",
        "python -m distdl.train --dataset folder:photos --run-dir my-run --resume auto",
    ),
    groups=GROUPS,
    flags={
        "dataset": Flag(value="DATA", names=DATASETS, is_path=True),
        "model": Flag(value="MODEL", names=MODELS, is_path=True),
        "freeze": Flag(value="NAMES"),
        "init_from": Flag(value="PATH", is_path=True),
        "resume": Flag(value="PATH", is_path=True),
    },
    other_names=OTHER_NAMES,
    renamed=RENAMED,
    not_in_file=NOT_IN_CONFIG_FILE,
    trains=True,
)


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Return the checked config of a command line: see `config_of`."""
    return config_of(COMMAND.given(arguments))


def config_of(given: Mapping[str, Any]) -> TrainConfig:
    """Return the checked config with the flags of a command line, as `Command.given` returns them; raise `UserError`.

    The flags override the file of `--config`. That overrides the ``config.toml`` of a resumed run.
    """
    texts: dict[str, Any] = {}
    files: dict[str, Path] = {}
    resumed = _config_of_resumed_run(given)
    if resumed is not None:
        texts |= COMMAND.read_file(resumed, without=("max_steps",))
        files |= dict.fromkeys(texts, resumed)
    if "config" in given:
        in_file = COMMAND.read_file(Path(given["config"]))
        texts |= in_file
        files |= dict.fromkeys(in_file, Path(given["config"]))
    config = COMMAND.made_from({**texts, **given})
    try:
        if resumed is not None and "dataset" not in given:
            _refuse_dataset_of_a_script(config.dataset)
        check_dataset_name(config.dataset)
        check_model_name(config.model)
        for setting in ("dataset", "model"):
            _refuse_code_of_a_file(setting, getattr(config, setting), given)
        config = config.checked()
    except UserError as error:
        raise _naming_the_file(error, {name: path for name, path in files.items() if name not in given}) from None
    _refuse_without_effect(config, given)
    return config


def _naming_the_file(error: UserError, files: Mapping[str, Path]) -> UserError:
    """Return the error with the config file that holds the setting at its start, if there is one.

    `files` has the file of each setting that comes from one.
    """
    subject = str(error).split()[0].strip(":")
    file = next((path for name, path in files.items() if flag_of(name) == subject), None)
    return error if file is None else type(error)(f"in the config file {file}: {error}")


def _config_of_resumed_run(given: Mapping[str, Any]) -> Path | None:
    """Return the config file of the run to resume, if there is one."""
    resume = given.get("resume")
    folder = given.get("run_dir") if resume == "auto" else resume
    if folder is None:
        return None
    try:
        found = run_folder_of(Path(folder))
        if found is None:
            return None
        own = found / "config.toml"
        is_lost = not os.path.lexists(own) or (own.is_file() and not own.stat().st_size)
        if is_lost and "config" not in given and _has_checkpoints(found):
            raise DamagedFileError(
                f"{own} is missing or empty, so the run would continue with other settings: restore the file, or give "
                "its settings with --config FILE"
            )
        # The folder may be a link, but no file in it: the search for the checkpoint says so.
        return own if own.is_file() and not own.is_symlink() else None
    except OSError:
        return None  # the search for the checkpoint reports the error


def _has_checkpoints(folder: Path) -> bool:
    inside = folder / "checkpoints"
    return inside.is_dir() and any(path.is_file() for path in inside.glob("step-*.safetensors"))


def _refuse_dataset_of_a_script(name: str) -> None:
    if comes_from_script(name):
        raise UserError(
            f"the dataset {name!r} comes from a script: resume the run with that script, or give the same data by "
            "--dataset npz:FILE.npz, or by --dataset SCRIPT.py:FUNCTION, a function(data_dir) that returns it"
        )


def _refuse_code_of_a_file(setting: str, name: str, given: Mapping[str, Any]) -> None:
    """Raise `UserError` for the user's own code that the command line does not name.

    A config file, also that of a resumed run, may come from elsewhere, and this process would run the code.
    """
    if not is_own(name):
        return
    if name.startswith("__main__:"):
        function = name.removeprefix("__main__:")
        raise UserError(
            f"the {setting} {name!r} comes from a script: resume the run with that script, or give --{setting} "
            f"SCRIPT.py:{function}"
        )
    if given.get(setting) != name:
        raise UserError(
            f"a config file names the {setting} {name!r}, which is user code: to run it, give "
            f"--{setting} {name} on the command line too"
        )


def _refuse_without_effect(config: TrainConfig, given: Mapping[str, Any]) -> None:
    """Raise `UserError` for a flag that has no effect with the other settings. A file may hold such a setting."""
    if not reads_data_dir(config.dataset) and "data_dir" in given:
        raise UserError(
            f"--data-dir has no effect with --dataset {config.dataset}: give --dataset mnist, or leave it out"
        )
    for name in ("resize", "skip_damaged", "cache"):
        if not reads_image_files(config.dataset) and name in given:
            raise UserError(
                f"{flag_of(name)} has no effect with --dataset {config.dataset}: it is for image files (folder:PATH, "
                "csv:FILE); leave it out"
            )
    if not config.dataset.startswith("csv:") and "csv_columns" in given:
        raise UserError(f"--csv-columns has no effect with --dataset {config.dataset}: give csv:FILE, or leave it out")
    for name in given:
        if reason := without_effect(config, name):
            raise UserError(f"{flag_of(name)} {reason}, or leave it out")


def main(arguments: Sequence[str]) -> int:
    """Train with the settings of the command line; return the exit code."""
    config = parse(arguments)
    cli.set_blas_threads(config.threads_per_rank)
    from distdl.engine import dry_run, train  # noqa: PLC0415  NumPy reads the number of threads when it is loaded

    if config.dry_run:
        dry_run(config)
    else:
        train(config)
    return 0
