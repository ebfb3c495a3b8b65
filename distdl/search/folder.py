"""The folder of a search: ``search.json`` holds the settings, ``results.jsonl`` has one line per completed trial.

Both have the same bytes for every course of the search (docs/search.md). The whole of ``results.jsonl`` is replaced
after each trial, so no line is ever torn. ``trials/`` holds the run folder of each training, so an interrupted training
can continue.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from distdl.config import BEFORE_THE_SETTING
from distdl.engine.storage import files
from distdl.engine.storage.json_lines import line_of
from distdl.engine.storage.run_folder import unused_folder
from distdl.errors import DamagedFileError, UserError
from distdl.job.folder_lock import LOCK, OWNER, InUseError, lock_folder
from distdl.json_files import read_json, read_json_lines
from distdl.search.procedure import Trial, TrialResult, trials_of_round
from distdl.search.settings import SearchSettings, flag_name

SEARCH, RESULTS, SUMMARY, TRIALS = "search.json", "results.jsonl", "summary.json", "trials"
CHART = "search.svg"
#: What a search that continues reads of ``search.json`` in addition to what it compares.
CONTENT = {"config?": {"kernels?": str}}


def choose_folder(settings: SearchSettings) -> Path:
    """Return the folder of the search, without creating it; raise `UserError` if it is not usable."""
    name = f"{settings.config.dataset}-{settings.config.model}-search"
    folder = settings.out or unused_folder(name)
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is not a folder: give another name")
        for name in (SEARCH, RESULTS, SUMMARY, LOCK, OWNER, TRIALS, CHART):
            if (folder / name).is_symlink():
                raise UserError(
                    f"{folder / name} is a symbolic link, which a search never follows, so that it writes no file "
                    "elsewhere: replace the link by its target"
                )
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if found and not settings.resume:
            raise UserError(f"--out {folder} is not empty: give another folder, or --resume to continue its search")
        others = {name for name in found - {LOCK, OWNER} if not name.endswith(files.TEMPORARY_SUFFIX)}
        if SEARCH not in found and others:
            raise UserError(f"--resume: --out {folder} holds no search, but other files; give another folder")
        files.try_folder(folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be used: {error.strerror or error}; give another folder") from None
    return folder


def read_results(folder: Path, settings: SearchSettings, ours: Mapping[str, Any]) -> list[TrialResult]:
    """Return the results of a search to continue; none if there is no search yet.

    `ours` is this search's content of ``search.json``. Raises `UserError` if the file there differs, and
    `DamagedFileError` if a file is damaged.
    """
    if not (folder / SEARCH).exists():
        return []
    theirs = read_json(folder / SEARCH, CONTENT)
    if different := _differences(json.loads(json.dumps(ours)), theirs):
        raise UserError(
            f"cannot continue the search in {folder}: {'; '.join(different)}; give the same, or another --out"
        )
    path, results = folder / RESULTS, list[TrialResult]()
    lines = read_json_lines(path, {}) if path.exists() else []
    for number in range(1, settings.rounds + 1):
        for trial, line in zip(trials_of_round(settings, number, results), lines[len(results) :], strict=False):
            results.append(_result(path, len(results) + 1, line, trial))
    if len(lines) > len(results):
        raise DamagedFileError(
            f"{path} is damaged: it has {len(lines)} lines, but the search has {len(results)} trials"
        )
    return results


def kernels_of(folder: Path) -> str | None:
    """Return the kernels of the search in a folder; None if there is none. Raises as `read_results` does."""
    if not (folder / SEARCH).exists():
        return None
    config = read_json(folder / SEARCH, CONTENT).get("config", {})
    return str((BEFORE_THE_SETTING | config)["kernels"])


def _differences(ours: Mapping[str, Any], theirs: Any) -> list[str]:
    theirs = theirs if isinstance(theirs, dict) else {}
    clauses = []
    for name, value in ours.items():
        if name == "config":
            clauses += _differences(value, theirs.get(name))
        elif (its := theirs.get(name, BEFORE_THE_SETTING.get(name))) != value:
            clauses.append(f"{flag_name(name)} is {value!r} here and {its!r} there")
    return clauses


def _result(path: Path, number: int, values: Any, trial: Trial) -> TrialResult:
    """Return the result on a line of the file; raise `DamagedFileError` if it does not belong to the trial."""
    numbers = dict.fromkeys(("validation_loss", "validation_accuracy", "test_accuracy"), float)
    outcome = {"steps": int, **numbers, "weights_sha256": str}
    if (
        not isinstance(values, dict)
        or set(values) != {field.name for field in fields(TrialResult)}
        or any(values[name] != value for name, value in vars(trial).items())
        or not all(values[name] is None or type(values[name]) is kind for name, kind in outcome.items())
        or (values["steps"] is None) != (values["validation_loss"] is None)
    ):
        raise DamagedFileError(f"{path} is damaged: line {number} does not belong to {trial.run_folder}")
    return TrialResult(**values)


class SearchFolder:
    """The folder on rank 0, created, and locked during the life of the process.

    `ours`: this job locked the folder before, and has lost the rank that held the lock. Raises `UserError` if the disk
    refuses or another search uses the folder.
    """

    def __init__(self, folder: Path, lock: str = "flock", *, ours: bool) -> None:
        self.folder = folder
        self._created = [path for path in (folder, *folder.parents) if not path.exists()]
        self.is_new = not (folder / SEARCH).exists()
        try:
            folder.mkdir(files.FOLDER_MODE, parents=True, exist_ok=True)
            self._lock = lock_folder(folder, lock, owner_died=ours)
            files.remove_temporaries(folder)
        except OSError as error:
            raise _refused(folder, error) from None
        except InUseError:
            raise UserError(
                f"--out {folder} is in use by another search: wait for it, or give another folder"
            ) from None

    def save(self, results: Sequence[TrialResult]) -> None:
        """Replace ``results.jsonl``; if the disk refuses, keep the previous one and raise `UserError`."""
        self.write(RESULTS, b"".join(line_of(asdict(one)) for one in results))

    def write(self, name: str, content: bytes) -> None:
        """Replace a file; raise `UserError` if the disk refuses."""
        try:
            files.write_durably(self.folder / name, content)
        except OSError as error:
            raise _refused(self.folder / name, error) from None

    def undo(self) -> None:
        """Remove everything that a search without a checkpoint has created."""
        if self.is_new and not any(self.folder.glob(f"{TRIALS}/*/checkpoints/*")):
            shutil.rmtree(self.folder / TRIALS, ignore_errors=True)
            for name in (SEARCH, LOCK, OWNER):
                (self.folder / name).unlink(missing_ok=True)
            for path in self._created:
                with suppress(OSError):
                    path.rmdir()

    def close(self) -> None:
        """Unlock the folder."""
        self._lock.close()


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; make room, then continue with --resume")
