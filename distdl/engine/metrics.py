"""Metrics: sums over micro-batches that travel in the canonical tree, and the file they end in.

``metrics.jsonl`` holds nothing that depends on time, on the number of ranks or on interruptions, and so is the
same file, byte for byte, however the run went; what is timed goes to ``timing.jsonl``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.engine.storage.files import opened_log
from distdl.parallel import Field

#: The fields that metrics add to a record of the reduction.
METRIC_FIELDS = (Field("loss_sum", "f8", 1), Field("counts", "i8", 2))


@dataclass
class Sums:
    """Summed loss (float64), right answers and samples (int64), as arrays so that they reduce and save alike.

    `targets_per_sample` is the number of labels of a sample: 1, or one per pixel; 0 if targets are numbers.
    """

    loss_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))
    targets_per_sample: int = 1

    def set(self, loss_sum: float, correct: int, samples: int) -> None:
        """Overwrite the sums."""
        self.loss_sum[0] = loss_sum
        self.counts[:] = correct, samples

    def add(self, record: Mapping[str, NDArray[Any]]) -> None:
        """Add the sums of a reduced record."""
        self.loss_sum += record["loss_sum"]
        self.counts += record["counts"]

    @property
    def samples(self) -> int:
        """The number of samples summed over."""
        return int(self.counts[1])

    @property
    def loss(self) -> float:
        """The mean loss of a sample."""
        return float(self.loss_sum[0]) / self.samples

    @property
    def accuracy(self) -> float | None:
        """The share of right answers; None where no answer is right or wrong."""
        return int(self.counts[0]) / (self.samples * self.targets_per_sample) if self.targets_per_sample else None

    @property
    def score(self) -> float:
        """What tells the better of two: the greater accuracy, or the smaller loss."""
        return -self.loss if self.accuracy is None else self.accuracy

    def named(self, part: str = "") -> dict[str, float]:
        """Return the loss and, if there is one, the accuracy, by their names in the metrics: ``test_loss``."""
        start = f"{part}_" if part else ""
        accuracy = {} if self.accuracy is None else {f"{start}accuracy": self.accuracy}
        return {f"{start}loss": self.loss, **accuracy}


def line_of(record: Mapping[str, Any]) -> bytes:
    """Return the line that a record is in a log."""
    return (json.dumps(record, allow_nan=False) + "\n").encode()


class JsonLines:
    """A file of one JSON object a line, cut to a given length first.

    What a full disk refuses waits in memory, from the very byte on at which the disk was full, and is written
    before anything else as soon as there is room: no record is lost or torn.
    """

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        self.path = path
        self._file = os.fdopen(opened_log(path), "ab", buffering=0)
        self._waiting = b""
        if self.length > keep_bytes:
            self._file.truncate(keep_bytes)

    @property
    def length(self) -> int:
        """The file's length in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; if `OSError` is raised, it waits in memory and need not be written again."""
        self.append(line_of(record))

    def append(self, lines: bytes) -> None:
        """Append whole lines; if `OSError` is raised, they wait in memory."""
        self._waiting += lines
        self._write_waiting()

    def written_length(self) -> int:
        """Write the records that wait in memory and return the file's length; raise `OSError` if still refused."""
        self._write_waiting()
        return self.length

    def flush_to_disk(self) -> None:
        """Return when what is in the file is on the disk, while others may write to it; raise `OSError` if refused."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; raise `OSError` if records are still waiting and the disk still refuses them."""
        with closing(self._file):
            self._write_waiting()

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
