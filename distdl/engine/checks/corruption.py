"""Silent corruption: bits that memory or a processor got wrong without anybody noticing.

All ranks take the same steps from the same state, so their replicas must be equal bit for bit (`compare_replicas`),
and whoever computes a micro-batch must get the same bits (`audit`). Where that fails, a machine is at fault. Which
one is judged from reports that all ranks have, so all raise the same `CorruptionError`.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import sha256_of_arrays
from distdl.engine.checks.nonfinite import ComputeShard
from distdl.engine.state import TrainingState
from distdl.errors import CorruptionError
from distdl.parallel import Communicator, Reduction, Shard

#: Those fields of a record that follow from config and step alone, unlike the seconds it took.
AUDITED = ("gradient", "statistics", "loss_sum", "counts")


def checksum(array: NDArray[np.generic]) -> tuple[int, int]:
    """Return the sum and the exclusive or of an array's 64-bit words: a thirtieth of the time of a sha256.

    Any change within one word changes both; that several changes cancel out in both takes intent.
    """
    octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = octets.size // 8 * 8
    words, rest = octets[:whole].view(np.uint64), int.from_bytes(octets[whole:].tobytes(), "little")
    return (int(np.add.reduce(words)) + rest) % 2**64, int(np.bitwise_xor.reduce(words)) ^ rest


def odd_ones_out(values: Sequence[Hashable]) -> list[int]:
    """Return the ranks whose value is not the most frequent one; all of them where several are as frequent.

    >>> odd_ones_out("aab"), odd_ones_out("ab"), odd_ones_out("aa")
    ([2], [0, 1], [])
    """
    counts = Counter(values).most_common(2)
    tied = len(counts) > 1 and counts[0][1] == counts[1][1]
    return [rank for rank, value in enumerate(values) if tied or value != counts[0][0]]


def compare_replicas(communicator: Communicator, state: TrainingState) -> None:
    """Raise `CorruptionError` on every rank unless all have the same state. Collective."""
    if communicator.size == 1:
        return
    arrays = state.named_arrays()
    mine = [checksum(array) for _, array in arrays]
    replicas = communicator.allgather_json(sha256_of_arrays([("checksums", np.array(mine, np.uint64))]))
    different = odd_ones_out(replicas)
    if not different:
        return
    sums = communicator.allgather_json(mine)
    first = next((name for place, (name, _) in enumerate(arrays) if len({tuple(one[place]) for one in sums}) > 1), None)
    among = "differ" if len(different) > 1 else "differs from the others"
    raise found(communicator, different, f"the replica {among} after step {state.step}, first in {first}")


def audit(
    communicator: Communicator,
    reduction: Reduction,
    shards: Sequence[Shard],
    compute: ComputeShard,
    state: TrainingState,
    *,
    own_model: bool = False,
) -> None:
    """Raise `CorruptionError` on every rank unless each gets the partial sums that the rank after it has. Collective.

    Called when all micro-batches are added and before they are reduced, so nothing wrong has gone further. Alone, a
    rank computes its own shard a second time. The layers of a user's `own_model` may be at fault themselves.
    """
    impure = " (or a layer of the model is no pure function of its input and key: mend that)" if own_model else ""
    rank, size = communicator.rank, communicator.size

    def computed(owner: int) -> str:
        again = Reduction(communicator, reduction.layout)
        again.begin(shards)
        for index, record in compute(shards[owner]):
            again.add(index, record)
        return _digest(again)

    audited = (rank + 1) % size
    first = communicator.allgather_json([_digest(reduction), computed(audited)])
    pairs = [{one, (one + 1) % size} for one in range(size) if first[one][1] != first[(one + 1) % size][0]]
    if not pairs:
        return
    second = communicator.allgather_json([computed(rank), computed(audited)])
    step = state.step + 1
    fickle = [one for one in range(size) if first[one] != second[one]]
    if fickle:
        raise found(communicator, fickle, f"a shard of step {step} has other bits when computed again{impure}")
    compare_replicas(communicator, state)
    suspects = set.intersection(*pairs) or set.union(*pairs)
    raise found(communicator, sorted(suspects), f"the same shard of step {step} has other bits on another rank{impure}")


def _digest(reduction: Reduction) -> str:
    return sha256_of_arrays(
        (f"{node.lo}-{node.hi} {name}", record[name])
        for node, record in reduction.partial_sums()
        for name in AUDITED
        if name in record
    )


def found(communicator: Communicator, ranks: Sequence[int], what: str) -> CorruptionError:
    """Return the error, the same on every rank, that names the suspects and their machines. Collective."""
    hosts = communicator.allgather_json(socket.gethostname())
    numbers = communicator.world_ranks  # as the launcher started them
    names = " or ".join(f"{numbers[rank]} (host {hosts[rank]})" for rank in ranks)
    return agreed(f"silent corruption on rank {names}: {what}; leave that machine out and go on")


def agreed(what: str) -> CorruptionError:
    """Return the error that every rank raises alike."""
    error = CorruptionError(f"{what} from the last checkpoint with --resume")
    error.agreed = True
    return error
