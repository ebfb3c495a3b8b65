"""The run folder: which one a run gets, from which checkpoint it goes on, and whose it is.

Deciding (`find_start`) writes nothing; `claim` makes the folder and locks it as long as the process lives. In between
data are loaded, which takes its time: what another run has done to the folder meanwhile `claim` sees, and refuses.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO

from distdl.config import TrainConfig, differences, run_folder_of
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import Checkpoint
from distdl.engine.storage.files import FOLDER_MODE, OWN_FILES, TEMPORARY_SUFFIX, opened_log
from distdl.engine.storage.header import CheckpointHeader
from distdl.errors import UserError

#: What is told of a run in the name of its folder; the path of a user's own model may be longer than a name may be.
LONGEST_NAME = 120
#: How long the kernel may take to release what a process held that has just died.
SECONDS_TO_RELEASE = 10.0
PAUSE_SECONDS = 0.01


@dataclass(frozen=True)
class Start:
    """Where a run begins: its folder, and the checkpoint it goes on from, if any.

    `origin` is the run folder that the checkpoint lies in, if it lies in one. A `numbered` folder gets a number
    behind its name where another run has the name already. `held` is the step of the newest checkpoint that was in the
    folder when this was decided, 0 without any, None if no run was there. `again`: this job has lost its coordinator,
    which may have had the folder.
    """

    folder: Path
    path: Path | None = None
    checkpoint: Checkpoint | None = None
    header: CheckpointHeader | None = None
    complaints: tuple[str, ...] = ()
    origin: Path | None = None
    numbered: bool = False
    held: int | None = None
    again: bool = False


def find_start(config: TrainConfig, ours: Path | None = None, *, again: bool = False) -> Start:
    """Decide where the run begins; nothing is written. Raises `UserError` for a folder or resume that cannot be.

    `again`: this very job has lost its coordinator, and begins again: in `ours`, if it has made a folder before.
    """
    try:
        if config.resume is not None:
            return replace(_resumed(config, config.resume, ours), again=again)
        if ours is not None:
            start = Start(ours, held=_held(ours), again=again)
            if start.held:  # we have not come so far as to write a checkpoint
                raise _used_meanwhile(ours)
            return start
        if config.run_dir is None:
            return Start(timestamped(f"{config.dataset}-{config.model}"), numbered=True)
        _refuse_used(config.run_dir)
        return Start(config.run_dir, again=again)
    except OSError as error:
        raise UserError(
            f"cannot look into {error.filename}: {error.strerror}; give another --run-dir or --resume"
        ) from None


def _resumed(config: TrainConfig, resume: str, ours: Path | None) -> Start:
    start = _newest_in_own_folder(config, ours) if resume == "auto" else _given_checkpoint(config, Path(resume))
    if start.path is None or start.checkpoint is None:
        return start
    header = CheckpointHeader.parse(start.checkpoint.header, start.path, start.checkpoint.tensors)
    _refuse_another_run(config, start.path, header)
    start = replace(start, folder=config.run_dir or start.folder, header=header)
    if ours is None and (start.origin is None or start.folder.resolve() != start.origin.resolve()):
        _refuse_used(start.folder)
    return start


def _newest_in_own_folder(config: TrainConfig, ours: Path | None) -> Start:
    """Return the newest intact checkpoint in the run folder; a fresh start there if it has none yet."""
    folder = config.run_dir
    assert folder is not None, "config.checked() has seen to it"
    _refuse_no_folder(folder)
    refuse_links(folder)
    held = _held(folder)  # before it is read, which takes its time
    found = checkpoints.newest_intact(folder / "checkpoints")
    if found is not None:
        return Start(folder, found[0], found[1], complaints=tuple(found[2]), origin=folder, held=held)
    if ours is None and not (folder / "config.toml").is_file():
        _refuse_used(folder)  # no run was ever here
    return Start(folder, held=held)


def _given_checkpoint(config: TrainConfig, source: Path) -> Start:
    origin = run_folder_of(source)
    if origin is not None and source.is_file():
        refuse_links(origin)
    folder = config.run_dir or origin
    held = None if folder is None else _held(folder)
    path, checkpoint, complaints = checkpoint_in(source, f"--resume {source}")
    if folder is None:
        raise UserError(f"--resume {source} lies in no run folder: give a new --run-dir for what comes after it")
    return Start(folder, path, checkpoint, complaints=complaints, origin=origin, held=held)


def checkpoint_in(source: Path, named: str) -> tuple[Path, Checkpoint, tuple[str, ...]]:
    """Return a checkpoint, or the newest intact one of a run folder, and what was wrong with those after it.

    `named` stands for `source` in messages. Raises `UserError` where there is none, `DamagedFileError` for a damaged
    one, and `OSError` where the disk refuses.
    """
    if source.is_file():
        return source, checkpoints.read(source), ()
    if not source.exists():
        raise UserError(f"{named}: there is no such checkpoint or run folder")
    refuse_links(source)
    found = checkpoints.newest_intact(source / "checkpoints")
    if found is None:
        raise UserError(f"{named}: there is no checkpoint in {source / 'checkpoints'}; expected a run folder")
    return found[0], found[1], tuple(found[2])


def refuse_links(folder: Path) -> None:
    """Raise `UserError` where something that a run writes, cuts or removes in its folder lies elsewhere.

    The folder itself may be a symbolic link: that is what the user has named. What is inside of it comes with the
    folder, from whoever made that; so nothing there may lead out of it, nor be anything but a file.
    """
    inside = folder / "checkpoints"
    for path in (inside, *(folder / name for name in OWN_FILES)):
        _refuse_link(path, stat.S_ISDIR if path is inside else stat.S_ISREG)
    for step in checkpoints.steps_in(inside) if inside.is_dir() else ():
        _refuse_link(checkpoints.path_of_step(inside, step), stat.S_ISREG)


def _refuse_link(path: Path, is_right: Callable[[int], bool]) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise UserError(
                f"{path} is a symbolic link: inside a run folder none is followed, so that no file elsewhere is "
                "written or removed; put what it leads to in its place, or make the run folder as a whole a link"
            )
        if not is_right(mode):
            what = "a folder" if is_right is stat.S_ISDIR else "a regular file"
            raise UserError(f"{path} is not {what}: expected a run folder; give another --run-dir or --resume")


def _refuse_another_run(config: TrainConfig, path: Path, header: CheckpointHeader) -> None:
    """Raise `UserError` if a setting that must not change differs from the checkpoint's."""
    different = differences(config, header.config)
    if different:
        raise UserError(f"cannot resume from {path}: {'; '.join(different)}; give the same, or start a new run")


def timestamped(what: str) -> Path:
    """Return the name of a folder under ``runs``, after the local time and (the end of) `what` it is for."""
    name = re.sub(r"[^a-zA-Z0-9_.-]+", "-", what)
    return Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{name[-LONGEST_NAME:]}"


def _refuse_no_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"the run folder {path} is not a folder: give another --run-dir")


def _refuse_used(folder: Path) -> None:
    _refuse_no_folder(folder)
    if folder.is_dir() and not _holds_anything(folder):
        return
    if folder.exists():
        raise UserError(
            f"the run folder {folder} exists and is not empty: give another --run-dir, or --resume {folder} to go on"
        )


def _holds_anything(folder: Path) -> bool:
    """Whether there is more in a folder than a run leaves that was killed before it wrote anything."""
    inside = folder / "checkpoints"
    found = [path for path in folder.iterdir() if path.name != "lock"]
    if inside.is_dir() and not inside.is_symlink():
        found = [*(path for path in found if path != inside), *inside.iterdir()]
    return not all(path.name.endswith(TEMPORARY_SUFFIX) for path in found)


def _held(folder: Path) -> int | None:
    """Return the step of the newest checkpoint in a run folder, 0 without any; None where no run has been."""
    if not folder.is_dir() or not _holds_anything(folder):
        return None
    inside = folder / "checkpoints"
    return max(checkpoints.steps_in(inside), default=0) if inside.is_dir() else 0


def _used_meanwhile(folder: Path) -> UserError:
    return UserError(f"the run folder {folder} was used by another run meanwhile: start again")


@contextmanager
def claim(start: Start) -> Iterator[tuple[Path, IO[bytes]]]:
    """Make the run folder and lock it; if that or the code inside fails, take away again what was made.

    Raises `UserError` where the folder is in use, or was used since the start was decided, or the disk refuses. What
    another run may have written in the meantime stays: ``checkpoints/`` is made, and files are removed, under the lock
    alone; the folders around them only while they are empty.
    """
    folder, made, present = start.folder, list[Path](), set[Path]()
    lock = None
    try:
        _make_folders(folder.parent, made)
        folder = _make_numbered(folder, made) if start.numbered else _make_folders(folder, made)
        lock_is_old = (folder / "lock").exists()
        lock = lock_released(folder) if start.again else lock_folder(folder)
        present = set(folder.rglob("*")) - (set() if lock_is_old else {folder / "lock"})
        refuse_links(folder)
        if _held(folder) != start.held:
            raise _used_meanwhile(folder)
        _make_folders(folder / "checkpoints", made)
        yield folder, lock
    except (OSError, UserError) as error:
        if lock is not None:
            for path in set(folder.rglob("*")) - present:
                if path.is_file():
                    path.unlink(missing_ok=True)
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()
        if lock is not None:
            lock.close()
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot use the run folder {folder}: {error.strerror or error}") from None


def _make_folders(folder: Path, made: list[Path]) -> Path:
    """Make the folder and those above it where they are missing, and note which ones were."""
    for path in reversed((folder, *folder.parents)):
        if not path.is_dir():
            with suppress(FileExistsError):  # what is no folder after all fails below
                path.mkdir(FOLDER_MODE)
                made.append(path)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name", str(folder))
    return folder


def numbered(folder: Path) -> Iterator[Path]:
    """Yield a folder's name, and then the same with 2, 3, … behind it."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def _make_numbered(folder: Path, made: list[Path]) -> Path:
    """Make a folder of that name which no other process has made, with a number behind the name if need be."""
    for path in numbered(folder):
        with suppress(FileExistsError):
            path.mkdir(FOLDER_MODE)
            made.append(path)
            break
    return path


def lock_released(folder: Path) -> IO[bytes]:
    """Lock the run folder of a process that has just died; raise `UserError` where another one holds it."""
    ends = time.monotonic() + SECONDS_TO_RELEASE
    while True:
        try:
            return lock_folder(folder)
        except UserError:
            if time.monotonic() > ends:
                raise
        time.sleep(PAUSE_SECONDS)


def lock_folder(folder: Path) -> IO[bytes]:
    """Return a file that locks the run folder as long as it is open, that is as long as this process lives."""
    while True:
        lock = os.fdopen(opened_log(folder / "lock"), "ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
                return lock
        except BlockingIOError:
            lock.close()
            raise UserError(
                f"the run folder {folder} is in use by another run: wait for it, or give another --run-dir"
            ) from None
        except FileNotFoundError:
            pass
        except OSError:
            lock.close()
            raise
        lock.close()  # a run that failed has taken the file away before we had it: lock the next one
