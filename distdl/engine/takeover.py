"""The coordinator that a follower becomes: it opens the run folder of the one that was lost, and goes on there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distdl.config import TrainConfig
from distdl.engine.console import Console
from distdl.engine.coordinator import Coordinator
from distdl.engine.logbook import Journal
from distdl.engine.metrics import JsonLines
from distdl.engine.storage.files import remove_temporaries
from distdl.engine.storage.run_folder import lock_folder
from distdl.errors import UserError


class Successor(Coordinator):
    """Goes on in `folder` as if it had been the coordinator from the start.

    Raises `UserError` where the folder cannot be used any more.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        environment: Mapping[str, Any],
        data_sha256: str,
        console: Console,
        journal: Journal,
    ) -> None:
        self._set_up(config, environment, data_sha256, console, journal)
        self.folder = folder
        self._checkpoints = folder / "checkpoints"
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)  # on a host that does not share the folder
            self._lock = lock_folder(folder, owner_died=True)
            for place in (folder, self._checkpoints):
                remove_temporaries(place)
            timing = folder / "timing.jsonl"
            self._logs = {"timing": JsonLines(timing, _whole_lines(timing))}
            for name in journal.names:
                log = JsonLines(folder / f"{name}.jsonl", journal.lengths[name])
                if log.length < journal.lengths[name]:
                    console.warning(f"{log.path} lacks records from before the loss: it was on another host")
                with suppress(OSError):  # what a full disk refuses waits in memory
                    log.append(journal.lines[name])
                self._logs[name] = log
        except OSError as error:
            raise UserError(
                f"cannot go on in the run folder {folder}: {error.strerror or error}; its checkpoints are intact: "
                "--resume goes on from there"
            ) from None


def _whole_lines(path: Path) -> int:
    """Return how many bytes of a log are whole lines."""
    return path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
