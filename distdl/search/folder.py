"""The folder of a search: ``search.json`` says what is searched, ``results.jsonl`` has a line for each trial so far.

Both hold nothing that depends on time, ranks or interruptions, and so are the same bytes however the search went.
``results.jsonl`` is written anew after each trial, as a whole, so no line is ever torn. The trainings lie in
``trials/``, each a run folder, from which a training that was cut off goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from distdl.engine.storage.files import (
    FOLDER_MODE,
    TEMPORARY_SUFFIX,
    indented_json,
    remove_temporaries,
    try_folder,
    write_durably,
)
from distdl.engine.storage.json_lines import line_of
from distdl.engine.storage.run_folder import lock_folder, unused_folder
from distdl.errors import DamagedFileError, UserError
from distdl.search.procedure import Record, Trial, planned
from distdl.search.settings import Settings

SEARCH, RESULTS, SUMMARY, LOCK, TRIALS = "search.json", "results.jsonl", "summary.json", "lock", "trials"
#: Where the picture is, if one can be drawn.
PICTURE = "search.svg"


def choose(settings: Settings) -> Path:
    """Return the folder of the search; raise `UserError` where it cannot be. Nothing is written."""
    what = f"{settings.config.dataset}-{settings.config.model}-search"
    folder = settings.out or unused_folder(what)
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is no folder: give another")
        for name in (SEARCH, RESULTS, SUMMARY, LOCK, TRIALS, PICTURE):
            if (folder / name).is_symlink():
                raise UserError(
                    f"{folder / name} is a symbolic link: inside the folder of a search none is followed, so that no "
                    "file elsewhere is written; put what it leads to in its place"
                )
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if found and not settings.resume:
            raise UserError(f"--out {folder} is not empty: give another folder, or --resume to go on with its search")
        if SEARCH not in found and any(name != LOCK and not name.endswith(TEMPORARY_SUFFIX) for name in found):
            raise UserError(f"--resume: there is no search in --out {folder}, but other files; give another folder")
        try_folder(folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be used: {error.strerror or error}; give another") from None
    return folder


def content_of_search(settings: Settings, data_sha256: str) -> dict[str, Any]:
    """Return the content of ``search.json``: all that decides on the results."""
    return {**settings.to_json(), "data_sha256": data_sha256}


def read(folder: Path, settings: Settings, data_sha256: str) -> list[Record]:
    """Return the records of a search that goes on; none where it begins.

    Raises `UserError` where it had other settings or data, and `DamagedFileError` where the files are not as we write
    them.
    """
    if not (folder / SEARCH).exists():
        return []
    before, ours = _json(folder / SEARCH, _bytes(folder / SEARCH)), content_of_search(settings, data_sha256)
    if not isinstance(before, dict):
        raise DamagedFileError(f"{folder / SEARCH} is damaged: it is not what a search writes")
    different = _differences(json.loads(json.dumps(ours)), before)
    if different:
        raise UserError(
            f"cannot go on with the search in {folder}: {'; '.join(different)}; give the same, or another --out"
        )
    path, records = folder / RESULTS, list[Record]()
    lines = _bytes(path).splitlines() if path.exists() else []
    for number in range(1, settings.rounds + 1):
        for trial, line in zip(planned(settings, number, records), lines[len(records) :], strict=False):
            records.append(_record(path, len(records) + 1, _json(path, line), trial))
    if len(lines) > len(records):
        raise DamagedFileError(f"{path} is damaged: it has {len(lines)} lines, the search {len(records)} trials")
    return records


def _differences(ours: Mapping[str, Any], theirs: Any) -> list[str]:
    theirs = theirs if isinstance(theirs, dict) else {}
    clauses = []
    for name, value in ours.items():
        if name == "config":
            clauses += _differences(value, theirs.get(name))
        elif theirs.get(name) != value:
            clauses.append(f"{name.replace('_', '-')} is {value!r} here and {theirs.get(name)!r} there")
    return clauses


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _json(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise DamagedFileError(f"{path} is damaged: it is not the JSON that a search writes") from None


def _record(path: Path, number: int, values: Any, trial: Trial) -> Record:
    """Return the record of a line; raise `DamagedFileError` where it is not that of the trial."""
    expected = vars(trial)
    numbers = dict.fromkeys(("validation_loss", "validation_accuracy", "test_accuracy"), float)
    outcome = {"steps": int, **numbers, "weights_sha256": str}
    if (
        not isinstance(values, dict)
        or set(values) != {field.name for field in fields(Record)}
        or any(values[name] != value for name, value in expected.items())
        or not all(values[name] is None or type(values[name]) is kind for name, kind in outcome.items())
        or (values["steps"] is None) != (values["validation_loss"] is None)
    ):
        raise DamagedFileError(f"{path} is damaged: line {number} is not that of {expected['run_folder']}")
    return Record(**values)


class SearchFolder:
    """The folder, made and locked as long as the process lives; rank 0 has it.

    `ours`: this job had the folder before, and has lost the rank that had locked it. Raises `UserError` where the disk
    refuses or another search is at work there.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any], *, ours: bool) -> None:
        self.folder = folder
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self.is_new = not (folder / SEARCH).exists()
        try:
            folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            self._lock: IO[bytes] = _locked(folder, ours=ours)
            remove_temporaries(folder)
            self.write(SEARCH, indented_json(content))
        except OSError as error:
            raise _refused(folder, error) from None

    def save(self, records: Sequence[Record]) -> None:
        """Write the table; raise `UserError` where the disk refuses, and leave the one before."""
        self.write(RESULTS, b"".join(line_of(record.to_json()) for record in records))

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``; raise `UserError` where the disk refuses."""
        self.write(SUMMARY, indented_json(summary))

    def write(self, name: str, content: bytes) -> None:
        """Replace a file; raise `UserError` where the disk refuses."""
        try:
            write_durably(self.folder / name, content)
        except OSError as error:
            raise _refused(self.folder / name, error) from None

    def undo(self) -> None:
        """Take away again what a search has made that could not begin; what has been trained stays."""
        if self.is_new and not any(self.folder.glob(f"{TRIALS}/*/checkpoints/*")):
            shutil.rmtree(self.folder / TRIALS, ignore_errors=True)
            for name in (SEARCH, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            for path in self._made:
                with suppress(OSError):
                    path.rmdir()

    def close(self) -> None:
        """Unlock the folder."""
        self._lock.close()


def _locked(folder: Path, *, ours: bool) -> IO[bytes]:
    try:
        return lock_folder(folder, owner_died=ours)
    except UserError:
        raise UserError(f"--out {folder} is in use by another search: wait for it, or give another") from None


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}; make room, and --resume goes on from there")
