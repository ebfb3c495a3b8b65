"""Records: the fields that a reduction sums, in one buffer, and how buffers of records are added.

A record has named fields of fixed dtype and length: the gradient in float32, the loss in float64, counts as integers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import ALIGNMENT_BYTES
from distdl.parallel.communicator import Bytes
from distdl.parallel.tree import Merges, Place

Record = dict[str, NDArray[Any]]
#: A part of a total's work, prepared once and called in each step.
Action = Callable[[], Any]

#: Additions run over blocks of this length, so that the sums so far stay in the second-level cache.
BLOCK_BYTES = 2**17


@dataclass(frozen=True)
class Field:
    """One field of a record: its name, its dtype and the number of its elements."""

    name: str
    dtype: str
    length: int


class Layout:
    """The positions of a record's fields in its buffer; each field starts on a 64-byte boundary."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self.starts: list[int] = []
        end = 0
        for field in fields:
            self.starts.append(end)
            end += -(-field.length * np.dtype(field.dtype).itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.nbytes = end

    def record(self, buffer: Bytes) -> Record:
        """Return the fields of a record as views of its buffer."""
        return {
            field.name: buffer[start : start + field.length * np.dtype(field.dtype).itemsize].view(field.dtype)
            for field, start in zip(self.fields, self.starts, strict=True)
        }

    def read_only(self, buffer: Bytes) -> Record:
        """Return the fields of a record as read-only views of its buffer."""
        view = buffer.view()
        view.flags.writeable = False
        return self.record(view)

    def pieces(self, lo: int, hi: int) -> list[tuple[int, int, str]]:
        """Return the parts of fields in bytes `lo` .. `hi` - 1, as (first byte, end, dtype), counted from `lo`.

        `lo` and `hi` are multiples of the alignment.
        """
        ends = [*self.starts[1:], self.nbytes]
        return [
            (max(start, lo) - lo, min(end, hi) - lo, field.dtype)
            for field, start, end in zip(self.fields, self.starts, ends, strict=True)
            if max(start, lo) < min(end, hi)
        ]

    def cuts(self, parts: int) -> list[int]:
        """Return the bytes at which the record is cut into `parts` slices of nearly equal length."""
        blocks = self.nbytes // ALIGNMENT_BYTES
        return [blocks * part // parts * ALIGNMENT_BYTES for part in range(parts + 1)]


def additions(
    buffers: Mapping[Place, Bytes],
    merges: Merges,
    pieces: Sequence[tuple[int, int, str]],
    root: Place | None = None,
    total: Bytes | None = None,
) -> Action:
    """Return the action that does the additions `merges` in place; with a `total`, their final sum is written there."""
    if total is not None and root is not None and not merges:
        return partial(np.copyto, total, buffers[root])
    operands = []
    for first, end, dtype in pieces:
        for start in range(first, end, BLOCK_BYTES):
            block = slice(start, min(start + BLOCK_BYTES, end))
            for number, (into, from_) in enumerate(merges, 1):
                out = buffers[into] if total is None or number < len(merges) else total
                operands.append([buffer[block].view(dtype) for buffer in (buffers[into], buffers[from_], out)])

    def add() -> None:
        for left, right, out in operands:
            np.add(left, right, out=out)

    return add
