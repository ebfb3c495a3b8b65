"""The run folder: decide where a run starts, make the folder and lock it.

`find_start` decides and writes nothing. `locked_run_folder` makes the folder, and locks it for the life of the process.
The data is loaded in between. So a folder that another run used meanwhile is refused.
"""

import errno
import itertools
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from distdl.config import TrainConfig, differences, run_folder_of
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import FoundCheckpoint
from distdl.engine.storage.files import FOLDER_MODE, RUN_FILES, TEMPORARY_SUFFIX, write_durably
from distdl.engine.storage.header import CheckpointHeader
from distdl.errors import DamagedFileError, UserError
from distdl.job.folder_lock import LOCK, OWNER, FolderLock, lock_folder
from distdl.regular_files import read_regular

#: The most characters of a purpose in a folder's name: the path of a user's own model may be too long for a name.
LONGEST_NAME = 120


@dataclass(frozen=True)
class StartingPoint:
    """Where a run starts: its folder, and its checkpoint, if any."""

    folder: Path
    found: FoundCheckpoint | None = None
    """The checkpoint that the run resumes; its header is intact."""
    origin: Path | None = None
    """The run folder that contains the checkpoint; None if it lies elsewhere."""
    add_number: bool = False
    """If another run has a folder of this name, append a number to the name."""
    newest_step: int | None = None
    """The newest checkpoint in the folder at the time of the decision, 0 without any; None if no run was there."""
    after_failure: bool = False
    """This job lost its coordinator, whose lock may still exist for a moment."""
    lock: str = "flock"
    """How the folder is locked: `--lock`."""


def find_start(config: TrainConfig, own_folder: Path | None = None, *, after_failure: bool = False) -> StartingPoint:
    """Decide where the run starts; write nothing. Raise `UserError` for an impossible folder or resume.

    `after_failure`: this job lost its coordinator and prepares the run again, in `own_folder` if it made one before.
    """
    try:
        if config.resume is not None:
            start = _resumed(config, config.resume, own_folder)
        elif own_folder is not None:
            start = StartingPoint(own_folder, newest_step=_newest_step(own_folder))
            if start.newest_step:  # this job has not written a checkpoint yet
                raise _used_meanwhile(own_folder)
        elif config.run_dir is not None:
            _refuse_used(config.run_dir)
            start = StartingPoint(config.run_dir)
        else:
            start = StartingPoint(_timestamped(f"{config.dataset}-{config.model}"), add_number=True)
        return replace(start, after_failure=after_failure, lock=config.lock)
    except OSError as error:
        raise UserError(
            f"cannot access {error.filename}: {error.strerror}; give another --run-dir or --resume"
        ) from None


def _resumed(config: TrainConfig, resume: str, own_folder: Path | None) -> StartingPoint:
    start = _newest_in_run_dir(config, own_folder) if resume == "auto" else _given_checkpoint(config, Path(resume))
    if start.found is None:
        return start
    if different := differences(config, start.found.header().config):
        raise UserError(
            f"cannot resume from {start.found.path}: {'; '.join(different)}; give the same, or start a new run"
        )
    start = replace(start, folder=config.run_dir or start.folder)
    if own_folder is None and (start.origin is None or start.folder.resolve() != start.origin.resolve()):
        _refuse_used(start.folder)
    return start


def _newest_in_run_dir(config: TrainConfig, own_folder: Path | None) -> StartingPoint:
    """Return the newest intact checkpoint in `--run-dir`, or a fresh start there if it has none yet."""
    folder = config.run_dir
    assert folder is not None, "config.checked() requires it"
    _refuse_no_folder(folder)
    refuse_links(folder)
    newest_step = _newest_step(folder)  # before the checkpoint is read, which takes time
    found = checkpoints.newest_intact(folder / "checkpoints")
    if found is not None:
        return StartingPoint(folder, found, folder, newest_step=newest_step)
    if own_folder is None and not (folder / "config.toml").is_file():
        _refuse_used(folder)  # by anything but a run
    return StartingPoint(folder, newest_step=newest_step)


def _given_checkpoint(config: TrainConfig, source: Path) -> StartingPoint:
    origin = run_folder_of(source)
    if origin is not None and source.is_file():
        refuse_links(origin)
    folder = config.run_dir or origin
    newest_step = None if folder is None else _newest_step(folder)
    found = find_checkpoint(source, f"--resume {source}")
    if folder is None:
        raise UserError(f"--resume {source} is not in a run folder: give a new --run-dir")
    return StartingPoint(folder, found, origin, newest_step=newest_step)


def find_checkpoint(source: Path, name: str) -> FoundCheckpoint:
    """Return the checkpoint at `source`, or the newest intact one of the run folder `source`.

    Raises `UserError`, with `name` for the source, if no checkpoint exists, `DamagedFileError` if none is intact, and
    `OSError`.
    """
    if source.is_file():
        return FoundCheckpoint(source, checkpoints.read(source), [])
    if not source.exists():
        raise UserError(f"{name}: there is no such checkpoint or run folder")
    refuse_links(source)
    found = checkpoints.newest_intact(source / "checkpoints")
    if found is None:
        raise UserError(f"{name}: there is no checkpoint in {source / 'checkpoints'}; expected a run folder")
    return found


def refuse_links(folder: Path) -> None:
    """Raise `UserError` if anything that a run writes, cuts or removes in its folder is a link or not a regular file.

    The folder itself may be a symbolic link: the user named it. Its content may come from anyone.
    """
    inside = folder / "checkpoints"
    _refuse_link(inside, stat.S_ISDIR)
    for path in (folder / name for name in RUN_FILES):
        _refuse_link(path, stat.S_ISREG)
    for step in checkpoints.steps_in(inside) if inside.is_dir() else ():
        _refuse_link(checkpoints.path_of_step(inside, step), stat.S_ISREG)


def _refuse_link(path: Path, has_right_type: Callable[[int], bool]) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise UserError(
                f"{path} is a symbolic link: distdl follows no link inside a run folder, so that it writes and removes "
                "no file elsewhere; put the target in its place, or make the run folder as a whole a link"
            )
        if not has_right_type(mode):
            expected = "a folder" if has_right_type is stat.S_ISDIR else "a regular file"
            raise UserError(f"{path} is not {expected}: expected a run folder; give another --run-dir or --resume")


def _refuse_no_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"the run folder {path} is not a folder: give another --run-dir")


def _refuse_used(folder: Path) -> None:
    _refuse_no_folder(folder)
    if folder.is_dir() and _is_used(folder):
        raise UserError(
            f"the run folder {folder} exists and is not empty: give another --run-dir, or --resume {folder} to "
            "continue its run"
        )


def _is_used(folder: Path) -> bool:
    """Whether a folder contains more than a run leaves that was killed before it wrote anything."""
    inside = folder / "checkpoints"
    found = [path for path in folder.iterdir() if path.name not in {LOCK, OWNER}]
    if inside.is_dir() and not inside.is_symlink():
        found = [*(path for path in found if path != inside), *inside.iterdir()]
    return not all(path.name.endswith(TEMPORARY_SUFFIX) for path in found)


def _newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint in a run folder, 0 without any; None if no run was there."""
    if not folder.is_dir() or not _is_used(folder):
        return None
    inside = folder / "checkpoints"
    return max(checkpoints.steps_in(inside), default=0) if inside.is_dir() else 0


def _used_meanwhile(folder: Path) -> UserError:
    return UserError(f"another run has used the run folder {folder} in the meantime: start again")


@contextmanager
def locked_run_folder(start: StartingPoint) -> Iterator[tuple[Path, FolderLock]]:
    """Make the run folder and lock it. If this or the code inside fails, remove everything that was made.

    Raises `UserError` if the folder is in use, was used since the decision, or if the disk refuses. Files of another
    run stay: files are removed under the lock alone, and folders only while they are empty.
    """
    folder, made, present = start.folder, list[Path](), set[Path]()
    lock = None
    try:
        _make_folders(folder.parent, made)
        folder = _make_numbered(folder, made) if start.add_number else _make_folders(folder, made)
        refuse_links(folder)
        lock_is_old = (folder / LOCK).exists()
        lock = lock_folder(folder, start.lock, owner_died=start.after_failure)
        present = set(folder.rglob("*")) - (set() if lock_is_old else {folder / LOCK})
        refuse_links(folder)
        if _newest_step(folder) != start.newest_step:
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
    """Make the folder and its missing parents, and append those that were made to `made`."""
    for path in reversed((folder, *folder.parents)):
        if not path.is_dir():
            with suppress(FileExistsError):  # a file of that name fails below
                path.mkdir(FOLDER_MODE)
                made.append(path)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name", str(folder))
    return folder


def _make_numbered(folder: Path, made: list[Path]) -> Path:
    """Make a new folder of that name, with a number after the name if another process made one first."""
    for path in _numbered(folder):
        with suppress(FileExistsError):
            path.mkdir(FOLDER_MODE)
            made.append(path)
            break
    return path


def _numbered(folder: Path) -> Iterator[Path]:
    """Yield a folder's name, and then the name with -2, -3, … at its end."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def _timestamped(purpose: str) -> Path:
    """Return the name of a folder under ``runs``: the local time and (the end of) its purpose."""
    name = re.sub(r"[^a-zA-Z0-9_.-]+", "-", purpose)
    return Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{name[-LONGEST_NAME:]}"


def unused_folder(purpose: str) -> Path:
    """Return the name of a folder under ``runs`` that does not exist yet: the local time and its purpose."""
    return next(path for path in _numbered(_timestamped(purpose)) if not path.exists())


def copy_history(
    folder: Path,
    found: FoundCheckpoint,
    header: CheckpointHeader,
    origin: Path | None,
    warn: Callable[[str], None],
) -> None:
    """Copy the logs, the best checkpoint and the checkpoint itself into the folder, unless they are there.

    Without them the run could not be resumed from this folder. `origin` is the run folder of the checkpoint.
    """
    for name, length in header.log_bytes.items():
        target = folder / f"{name}.jsonl"
        source = target if origin is None else origin / target.name
        if source.resolve() != target.resolve() and source.is_file():
            write_durably(target, read_regular(source)[:length])
        if not target.is_file() or target.stat().st_size < length:
            warn(f"{target} lacks records from before step {header.step}")
    inside, best_step = folder / "checkpoints", header.progress.best_step
    if best_step not in {None, header.step}:
        target = checkpoints.path_of_step(inside, best_step)
        best = found.path.with_name(target.name)
        if best.is_file() and not target.exists():
            try:
                checkpoints.write(target, checkpoints.read(best))
            except DamagedFileError as error:
                warn(f"{error}; this best checkpoint is not copied")
    target = checkpoints.path_of_step(inside, header.step)
    if not target.exists():
        checkpoints.write(target, found.checkpoint)
