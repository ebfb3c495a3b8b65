"""The sum of all micro-batches of a step, on every rank, in the order of the canonical tree.

What is summed is a *record*: named fields of fixed dtype and length (the gradient in float32, the loss in
float64, counts as integers) that lie in one buffer and travel together.

1. Each rank adds the micro-batches of its shard into the maximal canonical nodes of that shard as it computes
   them (`add`), so that it holds a few partial sums and never one record a micro-batch.
2. Ranks of one host hold their partial sums in slots that all of them see. Each merges, for its own slice of the
   record, the siblings that met on the host. On a single host that is the whole tree, and `total` is done.
3. Between hosts one leader each goes on: it owns a slice of the record, is sent that slice of every host's nodes,
   finishes the tree there, and sends the sum to the other leaders, straight into what their hosts' ranks see.

Each element is added in the same order whatever the number of ranks and hosts, and so has the same bits.

Ranks that share memory tell each other through a barrier of MPI that their slots are full and that the total is
complete. A flag in that memory would be quicker to write and wrong: Python cannot order its writes before the flag's
on every processor; a rank that died would never raise it, where MPI reports the loss; and whoever waits for it
would have to burn its core or sleep without knowing how long.

After those barriers no slot is read before the next step fills it, and no slice of the total is written before every
rank has come back for the next one; so one set of buffers is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import ALIGNMENT_BYTES, aligned_empty, aligned_zeros
from distdl.parallel.communicator import Bytes, Communicator, Span
from distdl.parallel.shared import shared_bytes
from distdl.parallel.tree import Node, are_siblings, fold, maximal_nodes

Record = dict[str, NDArray[Any]]

#: Up to here, all nodes together, every rank is sent all of them: one message more costs less than one wait more.
SMALL_BYTES = 32768


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
    `total`. The total is a record, read-only, since other ranks may see it too, that stays valid until the next
    `begin`. All but `add` are collective.

    `node` is the group of ranks that share memory, found out if not given.
    """

    def __init__(self, communicator: Communicator, layout: Layout, *, node: Communicator | None = None) -> None:
        self.communicator = communicator
        self.layout = layout
        self._node = communicator.node() if node is None else node
        self._slots: list[Bytes] = []
        self._records: list[Record] = []
        self._nodes: list[Node] = []
        self._shards: tuple[range, ...] = ()
        self._leaves = 0

    def begin(self, shards: Sequence[range]) -> None:
        """Start a step in which rank r computes the micro-batches ``shards[r]``; all leaves 0..V-1 are dealt.

        Raises `UserError` on every rank where a host has no room for the partial sums.
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

    def __init__(self, communicator: Communicator, layout: Layout, *, node: Communicator | None = None) -> None:
        super().__init__(communicator, layout, node=node)
        leader_of = communicator.allgather_json(self._node.bcast_json(communicator.rank))
        leaders = sorted(set(leader_of))
        self._hosts = tuple(tuple(r for r in range(communicator.size) if leader_of[r] == leader) for leader in leaders)
        self._host = leaders.index(leader_of[communicator.rank])
        self._leaders = communicator.split(0 if self._node.rank == 0 else None) if len(leaders) > 1 else None
        self._total = aligned_empty(0, np.uint8)
        self._received = aligned_empty(0, np.uint8)
        self._shared_slots: dict[Place, Bytes] = {}
        self._slots_a_rank = 0

    def begin(self, shards: Sequence[range]) -> None:
        """Start a step in which rank r computes the micro-batches ``shards[r]``; all leaves 0..V-1 are dealt.

        Raises `UserError` on every rank where a host has no room for the partial sums.
        """
        super().begin(shards)
        if self.communicator.size > 1 and len(self._hosts) < self.communicator.size and not self._is_small():
            needed = max(len(nodes) for nodes in self._plan().nodes)
            if needed > self._slots_a_rank:
                self._share_slots(needed)

    def _share_slots(self, slots_a_rank: int) -> None:
        """Move the total and the first slots of every rank to memory that all ranks of the host see."""
        ranks, nbytes = self._hosts[self._host], self.layout.nbytes
        shared = shared_bytes(
            self.communicator, self._node, (1 + len(ranks) * slots_a_rank) * nbytes, "gradients shared by ranks"
        )
        self._total, *slots = (shared[start : start + nbytes] for start in range(0, shared.size, nbytes))
        places = [(rank, slot) for rank in ranks for slot in range(slots_a_rank)]
        self._shared_slots = dict(zip(places, slots, strict=True))
        self._slots_a_rank = slots_a_rank
        self._slots[:slots_a_rank] = [self._shared_slots[self.communicator.rank, i] for i in range(slots_a_rank)]
        self._records = [self.layout.record(slot) for slot in self._slots]

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step, the same bits on every rank. Collective."""
        plan, rank = self._plan(), self.communicator.rank
        assert self._nodes == plan.nodes[rank], f"added {self._nodes}, the plan has {plan.nodes[rank]}"
        if self.communicator.size == 1:
            return self.layout.record(_read_only(self._slots[0]))
        if self._is_small():
            return self.layout.record(_read_only(self._total_of_all_nodes()))
        if self._total.size == 0:
            self._total = self.layout.new_buffer()
        if self._node.size > 1:
            self._node.barrier()
            self._merge_within_the_host(plan)
            self._node.barrier()
        if self._leaders is not None:
            self._merge_between_hosts(plan, self._leaders)
        if self._node.size > 1 and len(self._hosts) > 1:
            self._node.barrier()
        return self.layout.record(_read_only(self._total))

    def _total_of_all_nodes(self) -> Bytes:
        """Send all nodes to all ranks, and finish the tree on each."""
        plan = _plan(self._shards, self._leaves, (tuple(range(self.communicator.size)),))
        nbytes = self.layout.nbytes
        received = self._room_for(nbytes * sum(map(len, plan.nodes)))
        rows = {place: received[i * nbytes : (i + 1) * nbytes] for i, place in enumerate(_places(plan.nodes))}
        for slot in range(len(self._nodes)):
            rows[self.communicator.rank, slot][...] = self._slots[slot]
        self.communicator.allgatherv(received, [len(nodes) * nbytes for nodes in plan.nodes])
        _add_up(rows, plan.within[0], self.layout.pieces(0, nbytes))
        return rows[plan.root]

    def _merge_within_the_host(self, plan: _Plan) -> None:
        """Merge, for our own slice, what siblings the ranks of our host hold."""
        lo, hi = self.layout.cuts(self._node.size)[self._node.rank :][:2]
        rows = {place: slot[lo:hi] for place, slot in self._shared_slots.items()}
        pieces = self.layout.pieces(lo, hi)
        if len(self._hosts) == 1:
            _add_up(rows, plan.within[self._host], pieces, plan.root, self._total[lo:hi])
        else:
            _add_up(rows, plan.within[self._host], pieces)

    def _merge_between_hosts(self, plan: _Plan, leaders: Communicator) -> None:
        """Finish the tree for our own slice with what the other leaders send, and send them the sum."""
        cuts = self.layout.cuts(leaders.size)
        lengths = [hi - lo for lo, hi in pairwise(cuts)]
        lo, hi = cuts[leaders.rank :][:2]
        held = {place: self._shared_slots.get(place, self._slots[place[1]]) for place in plan.left[self._host]}
        rows = {place: slot[lo:hi] for place, slot in held.items()}
        received = self._room_for((hi - lo) * sum(map(len, plan.left)))
        end = 0
        for turn in range(max(map(len, plan.left))):  # the turn-th node of every host
            send_spans: list[Span] = [(0, 0)] * leaders.size
            receive_spans: list[Span] = [(0, 0)] * leaders.size
            send = received
            for host, places in enumerate(plan.left):
                if turn < len(places) and host != self._host:
                    receive_spans[host] = end, hi - lo
                    rows[places[turn]] = received[end : end + hi - lo]
                    end += hi - lo
            if turn < len(held):
                send = held[plan.left[self._host][turn]]
                send_spans = [
                    (cut, 0 if host == self._host else length)
                    for host, (cut, length) in enumerate(zip(cuts, lengths, strict=False))
                ]
            leaders.alltoallv(send, send_spans, received, receive_spans)
        _add_up(rows, plan.between, self.layout.pieces(lo, hi), plan.root, self._total[lo:hi])
        leaders.allgatherv(self._total, lengths)

    def _plan(self) -> _Plan:
        return _plan(self._shards, self._leaves, self._hosts)

    def _is_small(self) -> bool:
        return self.layout.nbytes * sum(map(len, self._plan().nodes)) <= SMALL_BYTES

    def _room_for(self, nbytes: int) -> Bytes:
        if self._received.size < nbytes:
            self._received = aligned_empty(nbytes, np.uint8)
        return self._received[:nbytes]


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
        return self.layout.record(_read_only(self._slots[0]))


REDUCTIONS: dict[str, type[Reduction]] = {"tree": TreeReduction, "allreduce": AllreduceReduction}


Place = tuple[int, int]  #: Where a node is held: the rank, and which of its slots.
Merges = Sequence[tuple[Place, Place]]  #: Whose values are to be added, in order; the sum stays at the first place.


@dataclass(frozen=True)
class _Plan:
    """Who holds which nodes after its own additions, and the merges that are left."""

    nodes: list[list[Node]]  #: of each rank
    within: list[Merges]  #: of each host
    left: list[list[Place]]  #: what each host then holds
    between: Merges
    root: Place


@lru_cache(maxsize=64)
def _plan(shards: tuple[range, ...], leaves: int, hosts: tuple[tuple[int, ...], ...]) -> _Plan:
    nodes = [maximal_nodes(shard, leaves) for shard in shards]
    held = {(rank, slot): node for rank, of_rank in enumerate(nodes) for slot, node in enumerate(of_rank)}
    within, left = [], []
    for ranks in hosts:
        rest, merges = _fold_held({place: node for place, node in held.items() if place[0] in ranks}, leaves)
        within.append(merges)
        left.append(rest)
    roots, between = _fold_held({place: node for rest in left for place, node in rest.items()}, leaves)
    assert list(roots.values()) == [Node(0, leaves)], f"shards {shards} do not hold the leaves 0..{leaves - 1} once each"
    return _Plan(nodes, within, [list(rest) for rest in left], between, next(iter(roots)))


def _fold_held(held: Mapping[Place, Node], leaves: int) -> tuple[dict[Place, Node], Merges]:
    """Merge siblings until none are left; return what then lies where, and the merges."""
    places = sorted(held, key=lambda place: held[place].lo)
    rest, merges = fold([held[place] for place in places], leaves)
    merged = {from_ for _, from_ in merges}
    remain = [place for position, place in enumerate(places) if position not in merged]
    return dict(zip(remain, rest, strict=True)), [(places[into], places[from_]) for into, from_ in merges]


def _places(nodes: Sequence[Sequence[Node]]) -> Iterable[Place]:
    return ((rank, slot) for rank, of_rank in enumerate(nodes) for slot in range(len(of_rank)))


def _add_up(
    rows: Mapping[Place, Bytes],
    merges: Merges,
    pieces: Sequence[tuple[int, int, str]],
    root: Place | None = None,
    total: Bytes | None = None,
) -> None:
    """Add rows in place as `merges` say; with `total`, the last sum, which is that of all, is written there."""
    for number, (into, from_) in enumerate(merges, 1):
        out = rows[into] if total is None or number < len(merges) else total
        for start, end, dtype in pieces:
            left, right = rows[into][start:end].view(dtype), rows[from_][start:end].view(dtype)
            np.add(left, right, out=out[start:end].view(dtype))
    if total is not None and root is not None and not merges:
        total[...] = rows[root]


def _read_only(buffer: Bytes) -> Bytes:
    view = buffer.view()
    view.flags.writeable = False
    return view
