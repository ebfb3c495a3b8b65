"""One optimizer step over all ranks: compute, reduce, average, freeze and clip, update.

Every rank computes the micro-batches of its shard. The reduction adds their gradients in the canonical tree. Every
rank then divides the sum by the number of samples and takes the same update. Nothing that outlives the step changes
before the commit, in which all ranks agree that each of them has the sum. So the survivors of a failure can repeat the
step, with the same bits.

The trainer, the benchmark, the examples and a user's own loop all take this step:

    step = OptimizerStep(communicator, network, optimizer, micro_batch_size=16)
    for number in range(100):
        rows = ...  # the samples of the batch
        compute = supervised(network, loss, partial(micro_batches.load, rows), key.of(number))
        total = step.take(compute, samples=len(rows), learning_rate=0.001, update_number=number + 1)

A loop with another loss, other data or several networks writes its own `compute`: see `examples/two_networks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data.batch_order import micro_batch_count
from distdl.engine.clipping import clip_by_norm
from distdl.engine.metrics import METRIC_FIELDS, Sums
from distdl.nn import Sequential
from distdl.nn.losses import LossFunction
from distdl.optim import Optimizer
from distdl.parallel import REDUCTIONS, Communicator, Field, Layout, Record, Shard, committed, contiguous_shards
from distdl.rng import Key

#: Computes the micro-batch of an index: leaves its gradient in the network, and returns the other fields of its record.
Compute = Callable[[int], Mapping[str, NDArray[Any]]]


class StepObserver:
    """Watches the steps of a rank. Every rank has the same observers in the same order; each method is called once per
    step, `micro_batch_done` once per micro-batch. An observer can send numbers of its own along with the gradient.
    """

    #: The fields that `micro_batch_done` writes into the record, in addition to those of the step.
    fields: tuple[Field, ...] = ()

    def begin(self, step: OptimizerStep) -> None:
        """React to the start of a step, before anything is computed. Collective calls are allowed."""

    def micro_batch_done(self, step: OptimizerStep, index: int, record: Record) -> None:
        """React to a computed micro-batch, before its record is added; write the values of `fields` into the record."""

    def shard_done(self, step: OptimizerStep) -> None:
        """React to the end of this rank's computation, before the reduction. Collective calls are allowed."""

    def allows_update(self, step: OptimizerStep) -> bool:  # noqa: ARG002
        """Return whether `step.total`, not yet committed, may update the network. All ranks must return the same.

        An error raised here must be the same on all ranks (`agreed`). Collective calls are allowed.
        """
        return True

    def before_update(self, step: OptimizerStep) -> None:
        """React to the commit, before the update."""

    def end(self, step: OptimizerStep) -> None:
        """React to the end of the step. `step.total` still holds its sums."""


class OptimizerStep:
    """Takes optimizer steps of one network on all ranks of a communicator.

    `fields` are the values that `compute` returns, in addition to the gradient. `shards_of` returns the shards of a
    number of micro-batches; by default they are equal and contiguous. The attributes are for observers.
    """

    def __init__(
        self,
        communicator: Communicator,
        network: Sequential,
        optimizer: Optimizer,
        *,
        micro_batch_size: int,
        fields: Sequence[Field] = METRIC_FIELDS,
        reduction: str = "tree",
        shards_of: Callable[[int], Sequence[Shard]] | None = None,
        clip_norm: float | None = None,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        self.communicator = communicator
        self.network = network
        self.optimizer = optimizer
        self.micro_batch_size = micro_batch_size
        self.clip_norm = clip_norm
        self.observers = observers
        self.reduction = REDUCTIONS[reduction](
            communicator, Layout([*_fields_of(network), *fields, *(field for one in observers for field in one.fields)])
        )
        self.shards: Sequence[Shard] = ()
        self.samples = 0
        self.total: Record = {}
        self._shards_of = partial(contiguous_shards, ranks=communicator.size) if shards_of is None else shards_of

    def take(self, compute: Compute, *, samples: int, learning_rate: float, update_number: int) -> Record:
        """Take one step on a batch of `samples` samples; return the sums over all its micro-batches.

        `update_number` counts from 1, for Adam's bias correction. The returned record is read-only and valid until
        the next step. Raises `PeerLost` if a rank is lost; parameters, buffers and optimizer are then unchanged.
        Collective.
        """
        self._compute, self.samples = compute, samples
        for observer in self.observers:
            observer.begin(self)
        self.deal(samples)
        for index, record in self.compute_shard(self.shards[self.communicator.rank]):
            self.reduction.add(index, record)

        with committed(self.communicator):
            for observer in self.observers:
                observer.shard_done(self)
            self.total = self.reduction.total()
            verdicts = [observer.allows_update(self) for observer in self.observers]

        for observer in self.observers:
            observer.before_update(self)
        if all(verdicts):
            self._update(learning_rate, update_number)
        for observer in self.observers:
            observer.end(self)
        return self.total

    def deal(self, samples: int) -> None:
        """Deal the micro-batches of a batch to the ranks, and make room for their partial sums. Collective.

        Raises `UserError` on every rank if a host has no room.
        """
        self.shards = self._shards_of(micro_batch_count(samples, self.micro_batch_size))
        self.reduction.begin(self.shards)

    def compute_shard(self, shard: Shard) -> Iterator[tuple[int, Record]]:
        """Compute the micro-batches of a shard; yield the index and the record of each, valid until the next."""
        record: Record = {"gradient": self.network.gradients, "statistics": self.network.statistics}
        with self.network.constant_parameters():  # values derived from the parameters are computed once
            for index in shard:
                record.update(self._compute(index))
                for observer in self.observers:
                    observer.micro_batch_done(self, index, record)
                yield index, record

    def _update(self, learning_rate: float, update_number: int) -> None:
        """Average the gradient, freeze and clip it, and update parameters and buffers. Local and deterministic.

        Unless a kernel divides, the mean gradient overwrites `network.gradients`, that of a micro-batch.
        """
        network, gradient, samples = self.network, self.total["gradient"], self.samples
        if self.clip_norm is not None or self.optimizer.fused is None:
            gradient, samples = np.divide(gradient, samples, out=network.gradients), 1
        if self.clip_norm is not None:
            for frozen in self.optimizer.frozen:  # so that it does not count
                gradient[frozen] = 0
            clip_by_norm(gradient, self.clip_norm, network.stack.kernels.norm)
        self.optimizer.update(network.parameters, gradient, learning_rate, update_number, samples)
        if "statistics" in self.total:
            share = min(1.0, self.samples / self.micro_batch_size)  # the moments of a few left-over samples count less
            network.update_buffers(self.total["statistics"], share=share)

    def close(self) -> None:
        """Free the MPI resources of the reduction; the step is unusable afterwards. Collective."""
        self.reduction.close()


def supervised(
    network: Sequential, loss: LossFunction, load: Callable[[int], tuple[NDArray[np.float32], NDArray[Any]]], key: Key
) -> Compute:
    """Return the usual `Compute`: load the micro-batch, forward, loss, backward. Its fields are `METRIC_FIELDS`.

    `load` returns the images (N, H, W, C) and targets (N, …) of an index. `key` is the key of the step.
    """
    sums = Sums()

    def compute(index: int) -> Record:
        images, targets = load(index)
        outputs = network.forward(images, training=True, key=key.of(index))
        sums.set(loss.forward(outputs, targets), loss.count_correct(outputs, targets), len(targets))
        network.backward(loss.backward())
        return sums.values()

    return compute


def _fields_of(network: Sequential) -> list[Field]:
    """Return the fields of a network: its gradient, and the statistics for its buffers if it has any."""
    gradient = Field("gradient", "f4", network.gradients.size)
    return [gradient, *([Field("statistics", "f8", network.statistics.size)] if network.statistics.size else [])]
