"""The state of a training: everything that survives a step, replicated on every rank.

It holds the parameters, the optimizer's vectors, the network's buffers, the step, and the metric sums of the epoch so
far. Everything else follows from config and step. Checkpoints, hashes, and the state that one rank sends to another
all use `TrainingState.named_arrays`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import sha256_of_arrays
from distdl.engine.metrics import Sums
from distdl.engine.storage.header import RunProgress
from distdl.nn import Sequential
from distdl.optim import Optimizer
from distdl.parallel import Communicator


@dataclass
class TrainingState:
    """The state of a training. `progress` holds the values that a run reports; two of them affect later weights."""

    network: Sequential
    optimizer: Optimizer
    step_array: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    epoch_sums: Sums = field(default_factory=Sums)
    progress: RunProgress = field(default_factory=RunProgress)

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return int(self.step_array[0])

    def named_arrays(self) -> list[tuple[str, NDArray[Any]]]:
        """Return every array of the state with its name; parameters come first."""
        arrays = self.network.named_parameters()
        for vector_name, vector in self.optimizer.state.items():
            arrays += [(f"{vector_name}/{name}", view) for name, view in self.network.views(vector)]
        return [
            *arrays,
            *self.network.named_buffers(),
            ("step", self.step_array),
            ("epoch.loss_sum", self.epoch_sums.loss_sum),
            ("epoch.counts", self.epoch_sums.counts),
        ]

    def send_from_rank_0(self, communicator: Communicator) -> None:
        """Give every rank the state of rank 0. Collective."""
        self.progress = RunProgress.from_json(communicator.bcast_json(self.progress.to_json()))
        for _, array in self.named_arrays():
            communicator.bcast(array)

    def weights_sha256(self) -> str:
        """Return the receipt: the hash of the parameters and of the running statistics of batch normalization."""
        return sha256_of_arrays([*self.network.named_parameters(), *self.network.named_buffers()])

    def state_sha256(self) -> str:
        """Return the hash of the whole state."""
        return sha256_of_arrays(self.named_arrays())
