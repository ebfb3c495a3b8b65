"""Evaluation: the loss and the correct predictions of a network over some samples, shared by all ranks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data import MicroBatches
from distdl.engine.metrics import Sums
from distdl.nn import Sequential
from distdl.nn.losses import LossFunction
from distdl.parallel import Reduction, Shard


def evaluate(
    network: Sequential,
    loss: LossFunction,
    micro_batches: MicroBatches,
    rows: NDArray[np.int64],
    shards: Sequence[Shard],
    reduction: Reduction,
    *,
    rank: int,
    outputs: NDArray[Any] | None = None,
) -> Sums:
    """Return the sums over the samples `rows` (N,), each counted once. Collective.

    This rank computes the micro-batches ``shards[rank]``; `reduction` sums `METRIC_FIELDS`. If `outputs` (N, ..., K) is
    given, the outputs of these micro-batches are stored there.
    """
    sums = Sums(targets_per_sample=micro_batches.dataset.targets_per_sample)
    leaf, size = Sums(), micro_batches.micro_batch_size
    reduction.begin(shards)
    with network.constant_parameters():
        for index in shards[rank]:
            images, targets = micro_batches.load(rows, index)
            found = network.forward(images)
            if outputs is not None:
                outputs[index * size : index * size + len(images)] = found
            leaf.set(loss.forward(found, targets), loss.count_correct(found, targets), len(targets))
            reduction.add(index, leaf.values())
    sums.add(reduction.total())
    return sums
