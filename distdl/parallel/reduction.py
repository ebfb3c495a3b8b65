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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import ALIGNMENT_BYTES, aligned_empty, aligned_zeros
from distdl.parallel.communicator import Bytes, Communicator, Span
from distdl.parallel.shared import shared_bytes
from distdl.parallel.tree import Shard, TreeNode, are_siblings, fold, maximal_nodes

Record = dict[str, NDArray[Any]]

#: Up to here, all nodes together, every rank of several hosts is sent all of them: what counts then is not how much
#: travels but how often ranks wait for each other.
SMALL_BYTES = 2**18
#: What is added of each row before the next: the sums so far stay in the second-level cache.
BLOCK_BYTES = 2**17
#: How many ways of dealing shards are remembered; a training has two or three.
LARGEST_NUMBER_OF_WAYS = 64


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
    """Sums one record a micro-batch over all micro-batches of a step and all ranks. All but `add` is collective.

    Use: `begin` with the step's shards, `add` for each micro-batch of this rank's own shard, in order, then
    `total`. The total is a record, read-only, since other ranks may see it too, that stays valid until the next
    `begin`. All but `add` are collective.
    """

    def __init__(self, communicator: Communicator, layout: Layout) -> None:
        self.communicator = communicator
        self.layout = layout
        self._slots: list[Bytes] = []
        self._records: list[Record] = []
        self._nodes: list[TreeNode] = []
        self._shards: tuple[Shard, ...] = ()
        self._leaves = 0

    def begin(self, shards: Sequence[Shard]) -> None:
        """Start a step in which rank r computes the micro-batches ``shards[r]``; all leaves 0..V-1 are dealt.

        A shard may hold any leaves; the fewer nodes of the tree they make up, the fewer partial sums are sent.
        Raises `UserError` on every rank where a host has no room for the partial sums.
        """
        self._shards = tuple(shards)
        self._leaves = sum(len(shard) for shard in shards)
        self._nodes = []

    def add(self, leaf: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Add the record of micro-batch `leaf`; `values` are copied or added, and may be reused after."""
        node = TreeNode(leaf, leaf + 1)
        if self._nodes and are_siblings(self._nodes[-1], node, self._leaves):
            slot = len(self._nodes) - 1
            for name, field in self._records[slot].items():
                np.add(field, values[name], out=field)
            self._nodes[slot] = TreeNode(self._nodes[slot].lo, node.hi)
            self._merge()
        else:
            slot = len(self._nodes)
            self._make_slots(slot + 1)
            for name, field in self._records[slot].items():
                field[...] = values[name]
            self._nodes.append(node)

    def held(self) -> list[tuple[TreeNode, Record]]:
        """Return this rank's partial sums and which nodes of the tree they are; valid until `total` or `begin`."""
        return list(zip(self._nodes, self._records, strict=False))

    def _make_slots(self, count: int) -> None:
        while len(self._slots) < count:
            self._slots.append(self.layout.new_buffer())
            self._records.append(self.layout.record(self._slots[-1]))

    def _merge(self) -> None:
        nodes = self._nodes
        while len(nodes) > 1 and are_siblings(nodes[-2], nodes[-1], self._leaves):
            left = self._records[len(nodes) - 2]
            right = self._records[len(nodes) - 1]
            for name, field in left.items():
                np.add(field, right[name], out=field)
            nodes[-2:] = [TreeNode(nodes[-2].lo, nodes[-1].hi)]

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step, the same bits on every rank. Collective."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what MPI keeps for it; it is of no use after. Collective."""


class TreeReduction(Reduction):
    """The canonical tree over a communicator: same bits on any number of ranks.

    `node` is the group of ranks that share memory, found out if not given. What there is to do for a total is a
    list of actions on arrays, made once for each way of dealing the shards.
    """

    def __init__(self, communicator: Communicator, layout: Layout, *, node: Communicator | None = None) -> None:
        super().__init__(communicator, layout)
        self._node = communicator.host() if node is None else node
        leader_of = communicator.allgather_json(self._node.bcast_json(communicator.rank))
        leaders = sorted(set(leader_of))
        self._hosts = tuple(tuple(r for r in range(communicator.size) if leader_of[r] == leader) for leader in leaders)
        self._host = leaders.index(leader_of[communicator.rank])
        self._leaders = communicator.split(0 if self._node.rank == 0 else None) if len(leaders) > 1 else None
        self._shared: dict[Place, Bytes] = {}
        self._total = aligned_empty(0, np.uint8)
        self._received = aligned_empty(0, np.uint8)
        self._ways: dict[tuple[Shard, ...], _Way] = {}

    def begin(self, shards: Sequence[Shard]) -> None:
        """Start a step in which rank r computes the micro-batches ``shards[r]``; all leaves 0..V-1 are dealt.

        Raises `UserError` on every rank where a host has no room for the partial sums.
        """
        super().begin(shards)
        if self.communicator.size > 1 and self._shards not in self._ways:
            if len(self._ways) == LARGEST_NUMBER_OF_WAYS:
                self._ways.clear()
            way = self._new_way()
            self._ways[self._shards] = way

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step, the same bits on every rank. Collective."""
        alone = self.communicator.size == 1
        plan = _plan(self._shards, self._leaves, self._hosts) if alone else self._ways[self._shards].plan
        nodes = plan.nodes[self.communicator.rank]
        assert self._nodes == nodes, f"added {self._nodes}, the plan has {nodes}"
        if alone:
            return self.layout.record(_read_only(self._slots[0]))
        way = self._ways[self._shards]
        for act in way.actions:
            act()
        return way.total

    def close(self) -> None:
        """Give back what MPI keeps for the leaders of the hosts, of which it has about two thousand in all."""
        if self._leaders is not None:
            self._leaders.free()
            self._leaders = None

    def _new_way(self) -> _Way:
        """Return what to do for shards that were never dealt before. Collective."""
        plan, several_hosts = _plan(self._shards, self._leaves, self._hosts), len(self._hosts) > 1
        if several_hosts and self.layout.nbytes * plan.count <= SMALL_BYTES:
            return self._all_to_everyone()
        rows = self._rows(plan)
        actions: list[Action] = []
        if self._node.size > 1:
            lo, hi = self.layout.cuts(self._node.size)[self._node.rank :][:2]
            cut, pieces = {place: row[lo:hi] for place, row in rows.items()}, self.layout.pieces(lo, hi)
            whole = () if several_hosts else (plan.root, self._total[lo:hi])
            actions = [
                self._node.barrier,
                _sums(cut, plan.within[self._host], pieces, *whole),
                self._node.barrier,
            ]
        if self._leaders is not None:
            actions += self._exchange(plan, rows, self._leaders)
        if self._node.size > 1 and several_hosts:
            actions.append(self._node.barrier)
        return _Way(plan, actions, self.layout.record(_read_only(self._total)))

    def _rows(self, plan: _Plan) -> dict[Place, Bytes]:
        """Return the slots of our host that hold the nodes of the plan; make them, and the total, where need be."""
        slots_a_rank, nbytes = max(map(len, plan.nodes)), self.layout.nbytes
        ranks, mine = self._hosts[self._host], self.communicator.rank
        if len(self._hosts) == self.communicator.size:
            self._make_slots(slots_a_rank)
            self._total = self._slots[0]  # nobody else sees it, and what was in it has been sent when the sums come in
            return {(mine, slot): self._slots[slot] for slot in range(slots_a_rank)}
        if (mine, slots_a_rank - 1) not in self._shared:
            self._ways.clear()
            places = [(rank, slot) for rank in ranks for slot in range(slots_a_rank)]
            memory = shared_bytes(
                self.communicator, self._node, (len(places) + 1) * nbytes, "partial sums of gradients"
            )
            self._total, *slots = (memory[start : start + nbytes] for start in range(0, memory.size, nbytes))
            self._shared = dict(zip(places, slots, strict=True))
            self._slots[:slots_a_rank] = [self._shared[mine, slot] for slot in range(slots_a_rank)]
            self._records = [self.layout.record(slot) for slot in self._slots]
        return self._shared

    def _all_to_everyone(self) -> _Way:
        """Let every rank send all its nodes to all others, and finish the tree by itself."""
        everyone = tuple(range(self.communicator.size))
        plan, nbytes = _plan(self._shards, self._leaves, (everyone,)), self.layout.nbytes
        received = aligned_empty(plan.count * nbytes, np.uint8)
        pieces = (received[start : start + nbytes] for start in range(0, received.size, nbytes))
        rows = {(rank, slot): next(pieces) for rank in everyone for slot in range(len(plan.nodes[rank]))}
        self._make_slots(len(plan.nodes[self.communicator.rank]))
        actions: list[Action] = [
            partial(np.copyto, rows[self.communicator.rank, slot], self._slots[slot])
            for slot in range(len(plan.nodes[self.communicator.rank]))
        ]
        counts = [len(nodes) * nbytes for nodes in plan.nodes]
        actions.append(partial(self.communicator.allgatherv, received, counts))
        actions.append(_sums(rows, plan.within[0], self.layout.pieces(0, nbytes)))
        return _Way(plan, actions, self.layout.record(_read_only(rows[plan.root])))

    def _exchange(self, plan: _Plan, rows: Mapping[Place, Bytes], leaders: Communicator) -> list[Action]:
        """Finish the tree for our own slice with what the other leaders send, and send them the sum."""
        cuts = self.layout.cuts(leaders.size)
        lengths = [hi - lo for lo, hi in pairwise(cuts)]
        lo, hi = cuts[leaders.rank :][:2]
        received = self._room_for((hi - lo) * sum(map(len, plan.left)))
        cut = {place: rows[place][lo:hi] for place in plan.left[self._host]}
        actions: list[Action] = []
        end = 0
        for turn in range(max(map(len, plan.left))):  # in which each host sends its node of that number, if it has one
            senders = [host for host, places in enumerate(plan.left) if turn < len(places)]
            receive_spans: list[Span] = [(0, 0)] * leaders.size
            for host in senders:
                if host != self._host:
                    receive_spans[host] = end, hi - lo
                    cut[plan.left[host][turn]] = received[end : end + hi - lo]
                    end += hi - lo
            # Not the buffer that it receives into: Open MPI takes equal buffers for MPI_IN_PLACE.
            send, send_spans = next(iter(rows.values())), [(0, 0)] * leaders.size
            if self._host in senders:
                send = rows[plan.left[self._host][turn]]
                send_spans = list(zip(cuts[:-1], lengths, strict=True))
                send_spans[self._host] = (0, 0)
            actions.append(partial(leaders.alltoallv, send, send_spans, received, receive_spans))
        actions.append(_sums(cut, plan.between, self.layout.pieces(lo, hi), plan.root, self._total[lo:hi]))
        actions.append(partial(leaders.allgatherv, self._total, lengths))
        return actions

    def _room_for(self, nbytes: int) -> Bytes:
        if self._received.size < nbytes:
            self._ways.clear()
            self._received = aligned_empty(nbytes, np.uint8)
        return self._received


class AllreduceReduction(Reduction):
    """MPI's own Allreduce of each rank's sum: the bits depend on the number of ranks and on the MPI library."""

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step. Collective."""
        self._make_slots(1)
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
Action = Callable[[], Any]


@dataclass(frozen=True)
class _Plan:
    """Who holds which nodes after its own additions, and the merges that are left."""

    nodes: list[list[TreeNode]]  #: of each rank
    count: int  #: of all ranks
    within: list[Merges]  #: of each host
    left: list[list[Place]]  #: what each host then holds
    between: Merges
    root: Place


class _Way(NamedTuple):
    """What one rank does for a total, and where it then lies."""

    plan: _Plan
    actions: list[Action]
    total: Record


@lru_cache(maxsize=LARGEST_NUMBER_OF_WAYS)
def _plan(shards: tuple[Shard, ...], leaves: int, hosts: tuple[tuple[int, ...], ...]) -> _Plan:
    nodes = [maximal_nodes(shard, leaves) for shard in shards]
    held = {(rank, slot): node for rank, of_rank in enumerate(nodes) for slot, node in enumerate(of_rank)}
    within, left = [], []
    for ranks in hosts:
        rest, merges = _fold_held({place: node for place, node in held.items() if place[0] in ranks}, leaves)
        within.append(merges)
        left.append(rest)
    roots, between = _fold_held({place: node for rest in left for place, node in rest.items()}, leaves)
    assert list(roots.values()) == [TreeNode(0, leaves)], (
        f"shards {shards} do not hold the leaves 0..{leaves - 1} once each"
    )
    return _Plan(nodes, len(held), within, [list(rest) for rest in left], between, next(iter(roots)))


def _fold_held(held: Mapping[Place, TreeNode], leaves: int) -> tuple[dict[Place, TreeNode], Merges]:
    """Merge siblings until none are left; return what then lies where, and the merges."""
    places = sorted(held, key=lambda place: held[place].lo)
    rest, merges = fold([held[place] for place in places], leaves)
    merged = {from_ for _, from_ in merges}
    remain = [place for position, place in enumerate(places) if position not in merged]
    return dict(zip(remain, rest, strict=True)), [(places[into], places[from_]) for into, from_ in merges]


def _sums(
    rows: Mapping[Place, Bytes],
    merges: Merges,
    pieces: Sequence[tuple[int, int, str]],
    root: Place | None = None,
    total: Bytes | None = None,
) -> Action:
    """Return the action that adds rows in place as `merges` say; with a `total`, the sum of all is written there."""
    if total is not None and root is not None and not merges:
        return partial(np.copyto, total, rows[root])
    additions = []
    for first, end, dtype in pieces:
        for start in range(first, end, BLOCK_BYTES):
            block = slice(start, min(start + BLOCK_BYTES, end))
            for number, (into, from_) in enumerate(merges, 1):
                out = rows[into] if total is None or number < len(merges) else total
                additions.append([row[block].view(dtype) for row in (rows[into], rows[from_], out)])

    def add() -> None:
        for left, right, out in additions:
            np.add(left, right, out=out)

    return add


def _read_only(buffer: Bytes) -> Bytes:
    view = buffer.view()
    view.flags.writeable = False
    return view
