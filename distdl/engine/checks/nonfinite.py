"""Steps whose loss or gradient is infinite or no number: found by all ranks at once, traced to a micro-batch.

The sum is the same on every rank, so all see at the same step that it is not finite, before anything has been
updated. Then the step is computed again, and each rank looks at its micro-batches one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.parallel import Communicator, Record, Reduction, Shard

#: Elements of a gradient that fit the second-level cache twice.
BLOCK = 32768
#: Computes the micro-batches of a shard of the current step: yields the index and the record of each.
ComputeShard = Callable[[Shard], Iterable[tuple[int, Mapping[str, NDArray[Any]]]]]


@dataclass(frozen=True)
class Fault:
    """What was not finite in a step (counted from 1), the lowest micro-batch it came from, and who computed that."""

    step: int
    what: str
    micro_batch: int | None = None
    rank: int | None = None
    #: Everything was finite when it was computed again.
    transient: bool = False
    saved_in: str | None = None

    def __str__(self) -> str:
        text = f"{self.what} at step {self.step}"
        if self.micro_batch is not None:
            saved = "" if self.saved_in is None else f"; the micro-batch is saved in {self.saved_in}"
            return f"{text}, first in micro-batch {self.micro_batch} (computed by rank {self.rank}){saved}"
        if self.transient:
            return f"{text}, but not when computed again: memory or a processor is at fault, on a rank that is unknown"
        return f"{text}, though that of each micro-batch is finite: their sum overflows"


def what_is_not_finite(record: Mapping[str, NDArray[Any]]) -> str | None:
    """Return what is not finite in the record of a micro-batch, or of a step; None if all is.

    >>> what_is_not_finite({"loss_sum": np.array([np.inf]), "gradient": np.zeros(3)})
    'the loss is inf'
    """
    loss_sum = float(record["loss_sum"][0])
    if not math.isfinite(loss_sum):
        return f"the loss is {loss_sum}"
    return None if is_finite(record["gradient"]) else "the gradient is not finite"


def average(total: Mapping[str, NDArray[Any]], samples: int, mean: NDArray[Any]) -> str | None:
    """Write the mean gradient of a batch into `mean`; return what is not finite in loss or gradient, None if all is.

    Blocks of the gradient are looked at while they are in the cache: this is done in every step.
    """
    loss_sum = float(total["loss_sum"][0])
    squares = 0.0
    for start in range(0, mean.size, BLOCK):
        block = mean[start : start + BLOCK]
        np.divide(total["gradient"][start : start + BLOCK], samples, out=block)
        squares += float(np.vdot(block, block))
    if math.isfinite(squares + loss_sum):
        return None
    return what_is_not_finite({"loss_sum": total["loss_sum"], "gradient": mean})


def trace(
    communicator: Communicator,
    reduction: Reduction,
    shards: Sequence[Shard],
    compute: ComputeShard,
    *,
    step: int,
    what: str,
) -> tuple[Fault, Record]:
    """Compute the step again; return where what was not finite came from, and the sum as it is now. Collective."""
    mine: int | None = None
    reduction.begin(shards)
    for index, record in compute(shards[communicator.rank]):
        if what_is_not_finite(record) is not None:
            mine = index if mine is None else min(mine, index)
        reduction.add(index, record)
    total = reduction.total()
    found = [(index, rank) for rank, index in enumerate(communicator.allgather_json(mine)) if index is not None]
    if found:
        return Fault(step, what, *min(found)), total
    return Fault(step, what, transient=what_is_not_finite(total) is None), total


def is_finite(array: NDArray[Any]) -> bool:
    """Whether every element is finite: if not, neither is the sum of squares, which may overflow besides."""
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())
