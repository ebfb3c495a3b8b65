"""The score of a network on some samples, shared by all ranks: for validation, test, and trained networks.

The tree sums the metrics of the micro-batches. So the result is bitwise the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from distdl.data import MicroBatches
from distdl.data.split import Rows
from distdl.engine.metrics import Sums
from distdl.nn import Sequential
from distdl.nn.losses import LossFunction
from distdl.parallel import Reduction, Shard


def evaluate(
    network: Sequential,
    loss: LossFunction,
    micro_batches: MicroBatches,
    rows: Rows,
    shards: Sequence[Shard],
    reduction: Reduction,
    *,
    rank: int,
    outputs: NDArray[Any] | None = None,
) -> Sums:
    """Return the sums of loss and correct predictions over the rows of a dataset, each counted once. Collective.

    This rank computes the micro-batches of ``shards[rank]``. `reduction` has the layout `METRIC_FIELDS`. The outputs
    of the shard are stored in `outputs` (N, ..., K), which has a place for each row.
    """
    leaf, sums = Sums(), Sums(targets_per_sample=micro_batches.dataset.targets_per_sample)
    size = micro_batches.micro_batch_size
    reduction.begin(shards)
    with network.constant_parameters():
        for index in shards[rank]:
            images, labels = micro_batches.load(rows, index)
            predicted = network.forward(images)
            if outputs is not None:
                stored = outputs[index * size : index * size + len(labels)]
                stored[...] = predicted
                predicted = stored
            leaf.set(loss.forward(predicted, labels), loss.count_correct(predicted, labels), len(labels))
            reduction.add(index, vars(leaf))
    sums.add(reduction.total())
    return sums
