"""The part of a reduction between hosts.

A large sum is exchanged by the leaders of the hosts. Each leader finishes the tree for its slice of the record, and
sends the sum straight into the memory that the other hosts' ranks see. A small sum is finished on every rank: then the
number of waits matters more than the traffic.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from distdl.arrays import aligned_empty
from distdl.parallel.communicator import Bytes, Communicator, Span
from distdl.parallel.record import Action, Layout, additions
from distdl.parallel.tree import Place, Plan


def exchange(
    leaders: Communicator, layout: Layout, plan: Plan, buffers: Mapping[Place, Bytes], received: Bytes, total: Bytes
) -> list[Action]:
    """Return the actions of a leader: finish the tree for its slice, and copy the other slices into `total`.

    `buffers` holds the tree nodes of its host. `received` has room for the slices of all hosts' remaining nodes.
    """
    own = leaders.rank
    cuts = layout.cuts(leaders.size)
    lengths = [hi - lo for lo, hi in pairwise(cuts)]
    lo, hi = cuts[own], cuts[own + 1]
    slices = {place: buffers[place][lo:hi] for place in plan.remaining[own]}
    actions: list[Action] = []
    end = 0
    for turn in range(max(map(len, plan.remaining))):  # in turn n, each host with more than n nodes sends its n-th one
        senders = [host for host, places in enumerate(plan.remaining) if turn < len(places)]
        receive_spans: list[Span] = [(0, 0)] * leaders.size
        for host in senders:
            if host != own:
                receive_spans[host] = end, hi - lo
                slices[plan.remaining[host][turn]] = received[end : end + hi - lo]
                end += hi - lo
        # A leader that sends nothing still needs another buffer than `received`: Open MPI treats equal buffers as
        # MPI_IN_PLACE.
        send, send_spans = next(iter(buffers.values())), [(0, 0)] * leaders.size
        if own in senders:
            send = buffers[plan.remaining[own][turn]]
            send_spans = list(zip(cuts[:-1], lengths, strict=True))
            send_spans[own] = (0, 0)
        actions.append(partial(leaders.alltoallv, send, send_spans, received, receive_spans))
    actions.append(additions(slices, plan.between, layout.pieces(lo, hi), plan.root, total[lo:hi]))
    actions.append(partial(leaders.allgatherv, total, lengths))
    return actions


def gather_and_sum(
    communicator: Communicator, layout: Layout, plan: Plan, slots: Sequence[Bytes]
) -> tuple[list[Action], Bytes]:
    """Return the actions by which every rank gets all tree nodes and finishes the tree itself, and the total's buffer.

    `plan` treats all ranks as one host; `slots` holds this rank's own nodes.
    """
    nbytes = layout.nbytes
    received = aligned_empty(plan.count * nbytes, np.uint8)
    places = [(rank, slot) for rank, nodes in enumerate(plan.nodes) for slot in range(len(nodes))]
    buffers = {place: received[number * nbytes :][:nbytes] for number, place in enumerate(places)}
    actions: list[Action] = [
        partial(np.copyto, buffers[communicator.rank, slot], slots[slot])
        for slot in range(len(plan.nodes[communicator.rank]))
    ]
    actions.append(partial(communicator.allgatherv, received, [len(nodes) * nbytes for nodes in plan.nodes]))
    actions.append(additions(buffers, plan.within[0], layout.pieces(0, nbytes)))
    return actions, buffers[plan.root]
