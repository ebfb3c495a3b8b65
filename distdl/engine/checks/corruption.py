"""Silent corruption: wrong bits from memory or a processor, without an error.

All ranks take the same steps from the same state. So their replicas must be equal bit for bit (`compare_replicas`), and
every rank must get the same bits for a micro-batch (`CrossCheck`). Otherwise the hardware is at fault. All ranks judge
which one from the same reports, so all raise the same `CorruptionError`.
"""

import socket
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import sha256_of_arrays
from distdl.config import TrainConfig, is_own
from distdl.engine.state import TrainingState
from distdl.engine.step import OptimizerStep, StepObserver
from distdl.errors import CorruptionError
from distdl.parallel import Communicator, Reduction

#: The fields of a record that follow from config and step alone, unlike seconds or stop requests.
COMPARED = ("gradient", "statistics", "loss_sum", "counts")


class CrossCheck(StepObserver):
    """Recomputes the shard of the next rank every `cross_check` steps, and compares the bits before the reduction.

    Alone, a rank recomputes its own shard. If the model is the user's, its layers may be at fault themselves. Raises
    `CorruptionError` on every rank if bits differ.
    """

    def __init__(self, config: TrainConfig, state: TrainingState) -> None:
        self._state = state
        self._every = config.cross_check
        hint = " (or a layer of the model is not a pure function of its input and key: fix that)"
        self._hint = hint if is_own(config.model) else ""

    def shard_done(self, step: OptimizerStep) -> None:
        """Check the step if its turn has come. Collective."""
        number = self._state.step + 1
        if number % self._every:
            return
        communicator, rank, size = step.communicator, step.communicator.rank, step.communicator.size
        checked = (rank + 1) % size
        first = communicator.allgather_json([_digest(step.reduction), _recomputed(step, checked)])
        pairs = [{one, (one + 1) % size} for one in range(size) if first[one][1] != first[(one + 1) % size][0]]
        if not pairs:
            return
        second = communicator.allgather_json([_recomputed(step, rank), _recomputed(step, checked)])
        fickle = [one for one in range(size) if first[one] != second[one]]
        if fickle:
            what = f"a shard of step {number} has other bits when computed again{self._hint}"
            raise corruption_found(communicator, fickle, what)
        compare_replicas(communicator, self._state)
        suspects = sorted(set.intersection(*pairs) or set.union(*pairs))
        what = f"the same shard of step {number} has other bits on another rank{self._hint}"
        raise corruption_found(communicator, suspects, what)


def _recomputed(step: OptimizerStep, owner: int) -> str:
    """Compute the shard of rank `owner`; return the hash of its partial sums."""
    again = Reduction(step.communicator, step.reduction.layout)
    again.begin(step.shards)
    for index, record in step.compute_shard(step.shards[owner]):
        again.add(index, record)
    return _digest(again)


def _digest(reduction: Reduction) -> str:
    return sha256_of_arrays(
        (f"{tree_node.lo}-{tree_node.hi} {name}", record[name])
        for tree_node, record in reduction.partial_sums()
        for name in COMPARED
        if name in record
    )


def checksum(array: NDArray[np.generic]) -> tuple[int, int]:
    """Return the sum and the exclusive or of an array's 64-bit words, in a thirtieth of the time of a sha256.

    Any change within one word changes both. Several changes cancel out in both only by intent.
    """
    octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = octets.size // 8 * 8
    words, rest = octets[:whole].view(np.uint64), int.from_bytes(octets[whole:].tobytes(), "little")
    return (int(np.add.reduce(words)) + rest) % 2**64, int(np.bitwise_xor.reduce(words)) ^ rest


def odd_ones_out(values: Sequence[Hashable]) -> list[int]:
    """Return the ranks whose value is not the most frequent one; all ranks if several values are equally frequent.

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
    raise corruption_found(communicator, different, f"the replica {among} after step {state.step}, first in {first}")


def corruption_found(communicator: Communicator, ranks: Sequence[int], what: str) -> CorruptionError:
    """Return the error, the same on every rank, that names the suspected ranks and their hosts. Collective."""
    hosts = communicator.allgather_json(socket.gethostname())
    numbers = communicator.world_ranks  # as the launcher started them
    names = " or ".join(f"{numbers[rank]} (host {hosts[rank]})" for rank in ranks)
    return agreed(f"silent corruption on rank {names}: {what}; leave that machine out and continue")


def agreed(what: str) -> CorruptionError:
    """Return the error that every rank raises."""
    return CorruptionError(f"{what} from the last checkpoint with --resume", agreed=True)
