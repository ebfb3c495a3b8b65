"""Log files of one JSON object per line, which lose no record when a disk is full for a while."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from distdl.engine.storage.files import opened_log

BLOCK_BYTES = 2**20


def line_of(record: Mapping[str, Any]) -> bytes:
    """Return the line of a record in a log."""
    return (json.dumps(record, allow_nan=False) + "\n").encode()


class JsonLines:
    """A file of one JSON object per line, first cut to a given length.

    Bytes that a full disk refuses wait in memory, and are written first as soon as there is room. So no record is torn.
    """

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        self.path = path
        handle = opened_log(path)
        self._file = os.fdopen(handle, "ab", buffering=0)
        self._waiting = b""
        if self.length > keep_bytes:
            self._file.truncate(keep_bytes)
        self._digest = hashlib.sha256()
        for start in range(0, self.length, BLOCK_BYTES):
            self._digest.update(os.pread(handle, BLOCK_BYTES, start))

    @property
    def length(self) -> int:
        """The file's length in bytes."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def sha256(self) -> str:
        """The hash of the file's content."""
        return self._digest.hexdigest()

    def append(self, lines: bytes) -> None:
        """Append whole lines. If this raises `OSError`, they wait in memory; do not append them again."""
        self._waiting += lines
        self.write_waiting()

    def write_waiting(self) -> None:
        """Write the records that wait in memory; raise `OSError` if they are still refused."""
        while self._waiting:
            count = self._file.write(self._waiting)
            self._digest.update(self._waiting[:count])
            self._waiting = self._waiting[count:]

    def flush_to_disk(self) -> None:
        """Return when the file's content is on the disk; another thread may write to it meanwhile.

        Raises `OSError` if the disk refuses.
        """
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; raise `OSError` if records still wait and the disk still refuses them."""
        with closing(self._file):
            self.write_waiting()
