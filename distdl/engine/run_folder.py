"""The run folder: which one a run gets, from which checkpoint it goes on, and whose it is.

Deciding (`find_start`) writes nothing; `claim` makes the folder and locks it as long as the process lives.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from distdl.config import TrainConfig, differences, run_folder_of
from distdl.engine import checkpoint as checkpoints
from distdl.engine.checkpoint import Checkpoint
from distdl.errors import DamagedFileError, UserError

#: What the header of a checkpoint must hold for a run to go on from it.
HEADER_FIELDS = {"step": int, "config": dict, "progress": dict, "log_bytes": dict, "kernel_family": str}


@dataclass(frozen=True)
class Start:
    """Where a run begins: its folder, and the checkpoint it goes on from, if any."""

    folder: Path
    path: Path | None = None
    checkpoint: Checkpoint | None = None
    complaints: tuple[str, ...] = ()


def find_start(config: TrainConfig) -> Start:
    """Decide where the run begins; nothing is written. Raises `UserError` for a folder or resume that cannot be."""
    try:
        if config.resume is None:
            folder = config.run_dir or new_folder(f"{config.dataset}-{config.model}")
            _refuse_used(folder)
            return Start(folder)
        return _resumed(config, config.resume)
    except OSError as error:
        raise UserError(
            f"cannot look into {error.filename}: {error.strerror}; give another --run-dir or --resume"
        ) from None


def _resumed(config: TrainConfig, resume: str) -> Start:
    start = _newest_in_own_folder(config) if resume == "auto" else _given_checkpoint(Path(resume))
    if start.path is None or start.checkpoint is None:
        return start
    _refuse_another_run(config, start.path, start.checkpoint.header)
    folder = config.run_dir or start.folder
    if folder.resolve() != start.folder.resolve():
        _refuse_used(folder)
    return Start(folder, start.path, start.checkpoint, start.complaints)


def _newest_in_own_folder(config: TrainConfig) -> Start:
    """Return the newest intact checkpoint in the run folder; a fresh start there if it has none yet."""
    folder = config.run_dir
    assert folder is not None, "config.checked() has seen to it"
    _refuse_no_folder(folder)
    found = checkpoints.newest_intact(folder / "checkpoints")
    if found is not None:
        return Start(folder, found[0], found[1], tuple(found[2]))
    if not (folder / "config.toml").is_file():
        _refuse_used(folder)  # no run was ever here
    return Start(folder)


def _given_checkpoint(source: Path) -> Start:
    if source.is_file():
        return Start(run_folder_of(source), source, checkpoints.read(source))
    if not source.exists():
        raise UserError(f"--resume {source}: there is no such checkpoint or run folder")
    found = checkpoints.newest_intact(source / "checkpoints")
    if found is None:
        raise UserError(f"--resume {source}: there is no checkpoint in {source / 'checkpoints'}")
    return Start(source, found[0], found[1], tuple(found[2]))


def _refuse_another_run(config: TrainConfig, path: Path, header: Any) -> None:
    for name, kind in HEADER_FIELDS.items():
        if not (isinstance(header, dict) and isinstance(header.get(name), kind)):
            raise DamagedFileError(f"{path} is damaged: its header has no {name!r} that a run could go on from")
    different = differences(config, header["config"])
    if different:
        raise UserError(f"cannot resume from {path}: {'; '.join(different)}; give the same, or start a new run")


def new_folder(what: str) -> Path:
    """Return the name of a folder under ``runs`` that does not exist yet, after the time and `what` it is for."""
    what = re.sub(r"[^\w.-]+", "-", what)
    name = f"{datetime.now():%Y-%m-%d-%H%M%S}-{what}"  # local time, for a person
    folder, number = Path("runs") / name, 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return folder


def _refuse_no_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"the run folder {path} is not a folder: give another --run-dir")


def _refuse_used(folder: Path) -> None:
    _refuse_no_folder(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise UserError(
            f"the run folder {folder} exists and is not empty: give another --run-dir, or --resume {folder} to go on"
        )


@contextmanager
def claim(folder: Path, subfolder: Path) -> Iterator[IO[bytes]]:
    """Make the folders and lock the run; if that or the code inside fails, take away again what was made.

    Raises `UserError` where the folder is in use, or the disk refuses. What another run may have written in the
    meantime stays: files are removed under the lock alone, and folders only when they are empty.
    """
    made: list[Path] = []
    present: set[Path] = set()
    lock = None
    try:
        made = [path for path in (subfolder, *subfolder.parents) if not path.exists()]
        present = set(folder.iterdir()) if folder not in made else set()
        subfolder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
        yield lock
    except (OSError, UserError) as error:
        if lock is not None:
            for path in set(folder.iterdir()) - present:
                if path.is_file():
                    path.unlink(missing_ok=True)
            lock.close()
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot use the run folder {folder}: {error.strerror or error}") from None


def _locked(folder: Path) -> IO[bytes]:
    """Return a file that locks the run folder as long as it is open, that is as long as this process lives."""
    lock = (folder / "lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"the run folder {folder} is in use by another run: wait for it, or give another --run-dir"
        ) from None
    return lock
