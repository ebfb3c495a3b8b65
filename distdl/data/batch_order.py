"""The order of samples: the rows of an epoch, of a step's batch and of a micro-batch. Pure index arithmetic.

Every rank computes the same order, so nothing needs to be sent. An order is a permutation of 0 .. count-1, the
*positions* in a part: ``parts.training[order]`` are the rows of an epoch.
"""

import numpy as np

from distdl.data.split import Rows
from distdl.rng import Key


def epoch_order(key: Key, epoch: int, count: int) -> Rows:
    """Return an epoch's order of `count` samples: a permutation, and a pure function of (seed, epoch)."""
    return key.of("order", epoch).permutation(count)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return the number of batches in `count` samples, including the ragged last one."""
    return -(-count // batch_size)


def batch_rows(order: Rows, step_in_epoch: int, batch_size: int) -> Rows:
    """Return the rows of a step's batch; the last batch may be ragged.

    >>> batch_rows(np.arange(10), 2, 4)
    array([8, 9])
    """
    return order[step_in_epoch * batch_size : (step_in_epoch + 1) * batch_size]


def micro_batch_count(count: int, micro_batch_size: int) -> int:
    """Return the number of micro-batches in a batch of `count` samples, including the ragged last one."""
    return -(-count // micro_batch_size)


def micro_batch(rows: Rows, index: int, micro_batch_size: int) -> Rows:
    """Return the rows of one micro-batch of a batch; the last micro-batch may be ragged."""
    return rows[index * micro_batch_size : (index + 1) * micro_batch_size]


class BatchOrder:
    """The batches of a training: the rows of each step, with the order of the current epoch kept.

    `training` are the rows of the training part, `key` is that of the run.
    """

    def __init__(self, training: Rows, batch_size: int, key: Key) -> None:
        self.steps_per_epoch = steps_per_epoch(len(training), batch_size)
        self._training = training
        self._batch_size = batch_size
        self._key = key
        self._epoch, self._rows = -1, np.empty(0, np.int64)

    def rows(self, step: int) -> Rows:
        """Return the rows of the batch of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._training[epoch_order(self._key, epoch, len(self._training))]
        return batch_rows(self._rows, position, self._batch_size)
