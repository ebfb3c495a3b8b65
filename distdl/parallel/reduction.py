"""The sum of all micro-batches of a step, on every rank, in the order of the canonical tree.

Each micro-batch gives a record (`record.py`); its fields travel together.

1. While a rank computes its shard, it adds the micro-batches into maximal nodes of the canonical tree (`add`). So it
   holds a few partial sums, never one record per micro-batch.
2. The ranks of a host hold their partial sums in slots of shared memory. Each rank owns a slice of the record and
   merges there the siblings that are on the host. On a single host this completes the tree.
3. Between hosts, the leaders finish the tree (`across_hosts.py`).

Each element is added in the same order for any number of ranks and hosts, so it has the same bits. docs/numerics.md
describes the actions, and why one set of buffers is enough.

The barriers are MPI's. A flag in shared memory would be faster, but wrong: Python cannot order its writes before the
write of the flag on every processor, and a rank that died would never set it, whereas MPI reports the failure.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import aligned_empty, aligned_zeros
from distdl.parallel import across_hosts
from distdl.parallel.communicator import Bytes, Communicator
from distdl.parallel.record import Action, Layout, Record, additions
from distdl.parallel.shared import shared_bytes
from distdl.parallel.tree import Place, Plan, Shard, TreeNode, are_siblings, plan_sum

#: Several hosts: if all tree nodes together have at most this size, every rank receives all of them.
SMALL_BYTES = 2**18
#: Schedules kept at a time; a training deals its shards in two or three ways.
SCHEDULES_KEPT = 64


class Reduction:
    """Sums one record per micro-batch over all micro-batches of a step and all ranks.

    Use: `begin` with the step's shards; `add` for each micro-batch of this rank's own shard, in order; `total`.
    All methods except `add` and `partial_sums` are collective.
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
        """Start a step in which rank r computes the micro-batches ``shards[r]``; the shards hold all leaves 0..V-1.

        A shard may hold any leaves. The fewer tree nodes they form, the fewer partial sums are sent.
        Raises `UserError` on every rank if a host has no room for the partial sums.
        """
        self._shards = tuple(shards)
        self._leaves = sum(len(shard) for shard in shards)
        self._nodes = []

    def add(self, leaf: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Add the record of micro-batch `leaf`; the caller may overwrite `values` afterwards."""
        nodes, node = self._nodes, TreeNode(leaf, leaf + 1)
        if nodes and are_siblings(nodes[-1], node, self._leaves):
            _add(self._records[len(nodes) - 1], values)
            nodes[-1] = TreeNode(nodes[-1].lo, node.hi)
        else:
            self._make_slots(len(nodes) + 1)
            for name, field in self._records[len(nodes)].items():
                field[...] = values[name]
            nodes.append(node)
        while len(nodes) > 1 and are_siblings(nodes[-2], nodes[-1], self._leaves):
            _add(*self._records[len(nodes) - 2 : len(nodes)])
            nodes[-2:] = [TreeNode(nodes[-2].lo, nodes[-1].hi)]

    def partial_sums(self) -> list[tuple[TreeNode, Record]]:
        """Return this rank's tree nodes and their sums; valid until `total` or `begin`."""
        return list(zip(self._nodes, self._records, strict=False))

    def _make_slots(self, count: int) -> None:
        while len(self._slots) < count:
            self._slots.append(aligned_zeros(self.layout.nbytes, np.uint8))
            self._records.append(self.layout.record(self._slots[-1]))

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step. Collective.

        The record is read-only, because other ranks may see the same memory. It is valid until the next `begin`.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release MPI's resources for this object; do not use it afterwards. Collective."""


def _add(total: Record, values: Mapping[str, NDArray[Any]]) -> None:
    for name, field in total.items():
        np.add(field, values[name], out=field)


class _Schedule(NamedTuple):
    """A rank's part in the total of a step: its own tree nodes, its actions, and the total that they fill."""

    nodes: list[TreeNode]
    actions: list[Action]
    total: Record


class TreeReduction(Reduction):
    """The canonical tree over a communicator: same bits on any number of ranks.

    `host` is the group of ranks that share memory (default: ``communicator.host()``). The schedule of a total is
    prepared once for each way of dealing the shards.
    """

    def __init__(self, communicator: Communicator, layout: Layout, *, host: Communicator | None = None) -> None:
        super().__init__(communicator, layout)
        self._host = communicator.host() if host is None else host
        leader_of = communicator.allgather_json(self._host.bcast_json(communicator.rank))
        leaders = sorted(set(leader_of))
        #: The ranks of each host.
        self._hosts = tuple(tuple(r for r in range(communicator.size) if leader_of[r] == leader) for leader in leaders)
        self._host_number = leaders.index(leader_of[communicator.rank])
        self._leaders = communicator.split(0 if self._host.rank == 0 else None) if len(leaders) > 1 else None
        self._shared: dict[Place, Bytes] = {}
        self._total = aligned_empty(0, np.uint8)
        self._received = aligned_empty(0, np.uint8)
        self._schedules: dict[tuple[Shard, ...], _Schedule] = {}

    def begin(self, shards: Sequence[Shard]) -> None:
        """Start a step; see `Reduction.begin`."""
        super().begin(shards)
        if self._shards not in self._schedules:
            if len(self._schedules) == SCHEDULES_KEPT:
                self._schedules.clear()
            schedule = self._new_schedule()  # may clear them too
            self._schedules[self._shards] = schedule

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step, the same bits on every rank. Collective."""
        schedule = self._schedules[self._shards]
        assert self._nodes == schedule.nodes, f"added {self._nodes}, the plan has {schedule.nodes}"
        for act in schedule.actions:
            act()
        return schedule.total

    def close(self) -> None:
        """Release the group of leaders: MPI has about two thousand groups in all."""
        if self._leaders is not None:
            self._leaders.free()
            self._leaders = None

    def _new_schedule(self) -> _Schedule:
        """Return the schedule for shards that were not dealt before. Collective."""
        layout, host, rank = self.layout, self._host, self.communicator.rank
        several_hosts = len(self._hosts) > 1
        plan = plan_sum(self._shards, self._leaves, self._hosts)
        if several_hosts and layout.nbytes * plan.count <= SMALL_BYTES:
            plan = plan_sum(self._shards, self._leaves, (tuple(range(self.communicator.size)),))
            self._make_slots(len(plan.nodes[rank]))
            actions, total = across_hosts.gather_and_sum(self.communicator, layout, plan, self._slots)
            return _Schedule(plan.nodes[rank], actions, layout.read_only(total))
        buffers = self._buffers(plan)
        actions = []
        if host.size > 1:
            lo, hi = layout.cuts(host.size)[host.rank :][:2]
            slices = {place: buffer[lo:hi] for place, buffer in buffers.items()}
            whole_tree = () if several_hosts else (plan.root, self._total[lo:hi])
            add = additions(slices, plan.within[self._host_number], layout.pieces(lo, hi), *whole_tree)
            actions = [host.barrier, add, host.barrier]
        if self._leaders is not None:
            lo, hi = layout.cuts(self._leaders.size)[self._leaders.rank :][:2]
            nbytes = (hi - lo) * sum(map(len, plan.remaining))
            if self._received.size < nbytes:
                self._schedules.clear()
                self._received = aligned_empty(nbytes, np.uint8)
            actions += across_hosts.exchange(self._leaders, layout, plan, buffers, self._received, self._total)
        if host.size > 1 and several_hosts:
            actions.append(host.barrier)
        return _Schedule(plan.nodes[rank], actions, layout.read_only(self._total))

    def _buffers(self, plan: Plan) -> dict[Place, Bytes]:
        """Return the slots of this host for the plan's tree nodes; make them and the total if necessary."""
        slots_per_rank, nbytes = max(map(len, plan.nodes)), self.layout.nbytes
        rank = self.communicator.rank
        if len(self._hosts) == self.communicator.size:
            self._make_slots(slots_per_rank)
            self._total = self._slots[0]  # no other rank sees it, and its content is sent before the sums arrive
            return {(rank, slot): self._slots[slot] for slot in range(slots_per_rank)}
        if (rank, slots_per_rank - 1) not in self._shared:
            self._schedules.clear()
            places = [(one, slot) for one in self._hosts[self._host_number] for slot in range(slots_per_rank)]
            nbytes_in_all = (len(places) + 1) * nbytes
            memory = shared_bytes(self.communicator, self._host, nbytes_in_all, "partial sums of gradients")
            self._total, *slots = (memory[start : start + nbytes] for start in range(0, memory.size, nbytes))
            self._shared = dict(zip(places, slots, strict=True))
            self._slots[:slots_per_rank] = [self._shared[rank, slot] for slot in range(slots_per_rank)]
            self._records = [self.layout.record(slot) for slot in self._slots]
        return self._shared


class AllreduceReduction(Reduction):
    """MPI's own Allreduce of each rank's sum: the bits depend on the number of ranks and on the MPI library."""

    def total(self) -> Record:
        """Return the sum over all micro-batches of the step. Collective."""
        self._make_slots(1)
        total = self._records[0]
        if not self._nodes:
            self._slots[0][...] = 0
        for record in self._records[1 : len(self._nodes)]:
            _add(total, record)
        for field in total.values():
            self.communicator.allreduce(field)
        return self.layout.read_only(self._slots[0])


REDUCTIONS: dict[str, type[Reduction]] = {"tree": TreeReduction, "allreduce": AllreduceReduction}
