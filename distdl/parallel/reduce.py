"""The sum of all micro-batches of a step, on every rank, in the order of the canonical tree.

What is summed is a *record*: named fields of fixed dtype and length (the gradient in float32, the loss in
float64, counts as integers) that lie in one buffer and travel together.

1. Each rank adds the micro-batches of its shard into the maximal canonical nodes of that shard as it computes
   them (`add`), so that it holds a few partial sums and never one record a micro-batch.
2. Every rank owns one slice of the record. `alltoallv` sends each owner that slice of every node; owners
   finish the tree for their slice; `allgatherv` returns the sum to all (`total`).

Each element is added in the same order whatever the number of ranks, and so has the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import ALIGNMENT_BYTES, aligned_empty, aligned_zeros
from distdl.parallel.communicator import Bytes, Communicator
from distdl.parallel.tree import Node, Shard, are_siblings, fold, maximal_nodes

Record = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Field:
    """One field of a record: its name, its dtype, and how many elements it holds."""

    name: str
    dtype: str
    length: int


class Layout:
    """Where the fields of a record lie in its buffer; each starts on a 64-byte boundary."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self.starts: list[int] = []
        end = 0
        for field in fields:
            self.starts.append(end)
            end += -(-field.length * np.dtype(field.dtype).itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.nbytes = end

    def new_buffer(self) -> Bytes:
        """Return the buffer of a record, all zeros."""
        return aligned_zeros(self.nbytes, np.uint8)

    def record(self, buffer: Bytes) -> Record:
        """Return the fields of a record as views of its buffer."""
        return {
            field.name: buffer[start : start + field.length * np.dtype(field.dtype).itemsize].view(field.dtype)
            for field, start in zip(self.fields, self.starts, strict=True)
        }

    def pieces(self, lo: int, hi: int) -> list[tuple[int, int, str]]:
        """Return what lies in bytes `lo` .. `hi` - 1: (first byte, end, dtype), counted from `lo`.

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


class Reduction:
    """Sums one record a micro-batch over all micro-batches of a step and all ranks.

    Use: `begin` with the step's shards, `add` for each micro-batch of this rank's own shard, in order, then
    `total`. The total is a record that stays valid until the next `begin`.
    """

    def __init__(self, communicator: Communicator, layout: Layout) -> None:
        self.communicator = communicator
        self.layout = layout
        self._slots: list[Bytes] = []
        self._records: list[Record] = []
        self._nodes: list[Node] = []
        self._shards: tuple[Shard, ...] = ()
        self._leaves = 0

    def begin(self, shards: Sequence[Shard]) -> None:
        """Start a step in which rank r computes the micro-batches ``shards[r]``; all leaves 0..V-1 are dealt.

        A shard may hold any leaves; the fewer nodes of the tree they make up, the fewer partial sums are sent.
        """
        self._shards = tuple(shards)
        self._leaves = sum(len(shard) for shard in shards)
        self._nodes = []

    def add(self, leaf: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Add the record of micro-batch `leaf`; `values` are copied or added, and may be reused after."""
        node = Node(leaf, leaf + 1)
        if self._nodes and are_siblings(self._nodes[-1], node, self._leaves):
            slot = len(self._nodes) - 1
            for name, field in self._records[slot].items():
                np.add(field, values[name], out=field)
            self._nodes[slot] = Node(self._nodes[slot].lo, node.hi)
            self._merge()
        else:
            slot = len(self._nodes)
            if slot == len(self._slots):
                self._slots.append(self.layout.new_buffer())
                self._records.append(self.layout.record(self._slots[slot]))
            for name, field in self._records[slot].items():
                field[...] = values[name]
            self._nodes.append(node)

    def _merge(self) -> None:
        nodes = self._nodes
        while len(nodes) > 1 and are_siblings(nodes[-2], nodes[-1], self._leaves):
            left = self._records[len(nodes) - 2]
            right = self._records[len(nodes) - 1]
            for name, field in left.items():
                np.add(field, right[name], out=field)
            nodes[-2:] = [Node(nodes[-2].lo, nodes[-1].hi)]

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step, the same bits on every rank. Collective."""
        raise NotImplementedError


class TreeReduction(Reduction):
    """The canonical tree over a communicator: same bits on any number of ranks."""

    def __init__(self, communicator: Communicator, layout: Layout) -> None:
        super().__init__(communicator, layout)
        self._cuts = layout.cuts(communicator.size)
        lo, hi = self._cuts[communicator.rank : communicator.rank + 2]
        self._own = slice(lo, hi)
        self._pieces = layout.pieces(lo, hi)
        self._lengths = [b - a for a, b in pairwise(self._cuts)]
        self._total = layout.new_buffer()
        self._send = aligned_empty(0, np.uint8)
        self._receive = aligned_empty(0, np.uint8)

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step, the same bits on every rank. Collective."""
        rank, size = self.communicator.rank, self.communicator.size
        plan = _plan(self._shards, self._leaves)
        assert self._nodes == plan.nodes[rank], f"added {self._nodes}, the plan has {plan.nodes[rank]}"
        if size == 1:
            return self._records[0]
        own = self._lengths[rank]
        receive_counts = [len(nodes) * own for nodes in plan.nodes]
        send_counts = [len(self._nodes) * length for length in self._lengths]
        received = self._at_least("_receive", sum(receive_counts))
        self.communicator.alltoallv(self._packed(), send_counts, received, receive_counts)
        rows = [received[i * own : (i + 1) * own] for i in range(len(plan.in_order))]
        for into, from_ in plan.merges:
            for start, end, dtype in self._pieces:
                left = rows[plan.in_order[into]][start:end].view(dtype)
                left += rows[plan.in_order[from_]][start:end].view(dtype)
        result = rows[plan.in_order[0]]
        self.communicator.allgatherv(result, self._total, self._lengths)
        return self.layout.record(self._total)

    def _packed(self) -> Bytes:
        """Return what this rank sends: for each owner, its slice of each of our nodes."""
        if len(self._nodes) == 1:
            return self._slots[0]
        send = self._at_least("_send", len(self._nodes) * self.layout.nbytes)
        end = 0
        for lo, hi in pairwise(self._cuts):
            for slot in self._slots[: len(self._nodes)]:
                send[end : end + hi - lo] = slot[lo:hi]
                end += hi - lo
        return send

    def _at_least(self, name: str, nbytes: int) -> Bytes:
        buffer: Bytes = getattr(self, name)
        if buffer.size < nbytes:
            buffer = aligned_empty(nbytes, np.uint8)
            setattr(self, name, buffer)
        return buffer


class AllreduceReduction(Reduction):
    """MPI's own Allreduce of each rank's sum: the bits depend on the number of ranks and on the MPI library."""

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step. Collective."""
        if not self._slots:
            self._slots.append(self.layout.new_buffer())
            self._records.append(self.layout.record(self._slots[0]))
        total = self._records[0]
        if not self._nodes:
            self._slots[0][...] = 0
        for record in self._records[1 : len(self._nodes)]:
            for name, field in total.items():
                np.add(field, record[name], out=field)
        for field in total.values():
            self.communicator.allreduce(field)
        return total


REDUCTIONS: dict[str, type[Reduction]] = {"tree": TreeReduction, "allreduce": AllreduceReduction}


@dataclass(frozen=True)
class _Plan:
    """Who holds which nodes after its own additions, and the merges that are left to the owners."""

    nodes: list[list[Node]]
    in_order: list[int]  # the place, in rank order, of the first node, the second … in order of their leaves
    merges: list[tuple[int, int]]


@lru_cache(maxsize=64)
def _plan(shards: tuple[Shard, ...], leaves: int) -> _Plan:
    nodes = [maximal_nodes(shard, leaves) for shard in shards]
    held = [node for rank in nodes for node in rank]
    in_order = sorted(range(len(held)), key=lambda place: held[place].lo)
    roots, merges = fold([held[place] for place in in_order], leaves)
    assert roots == [Node(0, leaves)], f"shards {shards} do not hold the leaves 0..{leaves - 1} once each"
    return _Plan(nodes, in_order, merges)
