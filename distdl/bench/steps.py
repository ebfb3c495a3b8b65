"""Take a trainer's steps without a trainer: no coordinator, validation or checkpoints."""

from __future__ import annotations

from functools import partial

import numpy as np

from distdl.config import TrainConfig
from distdl.data import MicroBatches, PreparedDataset, batch_order
from distdl.engine.checks.nonfinite import FiniteCheck
from distdl.engine.state import TrainingState
from distdl.engine.step import OptimizerStep, supervised
from distdl.engine.timing.timeline import Timeline
from distdl.nn import make_loss
from distdl.parallel import Communicator
from distdl.rng import Key


class TrainingSteps:
    """The steps of a config on the training part of a dataset, with the observers that the trainer always has.

    Each step has the same bits as a trainer's step with a constant learning rate. Collective.
    """

    def __init__(
        self, config: TrainConfig, communicator: Communicator, dataset: PreparedDataset, state: TrainingState
    ) -> None:
        self.config = config
        self.state = state
        self.timeline = Timeline(communicator)
        check = FiniteCheck(config, state, save=lambda fault: None)  # noqa: ARG005
        self._step = OptimizerStep(
            communicator,
            state.network,
            state.optimizer,
            micro_batch_size=config.micro_batch_size,
            reduction=config.reduction,
            observers=[self.timeline, check],
        )
        self._micro_batches = MicroBatches(dataset, config.micro_batch_size)
        self._loss = make_loss(dataset.default_loss)
        self._training = dataset.parts.training
        self._steps_per_epoch = batch_order.steps_per_epoch(len(self._training), config.batch_size)
        self._key = Key(config.seed)
        self._order = (-1, np.empty(0, np.int64))

    def take(self, count: int) -> None:
        """Take `count` steps."""
        state = self.state
        for step in range(state.step, state.step + count):
            epoch, position = divmod(step, self._steps_per_epoch)
            if self._order[0] != epoch:
                self._order = (epoch, self._training[batch_order.epoch_order(self._key, epoch, len(self._training))])
            rows = batch_order.batch_rows(self._order[1], position, self.config.batch_size)
            load = partial(self._micro_batches.load, rows)
            compute = supervised(state.network, self._loss, load, self._key.of("training", step))
            rate = self.config.learning_rate
            self._step.take(compute, samples=len(rows), learning_rate=rate, update_number=step + 1)
            state.step_array += 1
