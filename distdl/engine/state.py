"""The state of a training: all that survives a step, replicated on every rank.

Parameters, the optimizer's vectors, the network's buffers, the step, and the metric sums of the epoch so far.
Everything else follows from config and step. Checkpoints, the hashes, and the state that one rank hands to another all
go through `TrainingState.named_arrays`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import sha256_of_arrays
from distdl.engine.metrics import Sums
from distdl.nn import Sequential
from distdl.optim import Optimizer


@dataclass
class TrainingState:
    """Where a training stands. `progress` holds what is reported; only its `skipped_steps` act on later weights."""

    network: Sequential
    optimizer: Optimizer
    step_array: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    epoch_sums: Sums = field(default_factory=Sums)
    progress: dict[str, Any] = field(
        default_factory=lambda: {
            "train_loss": None,
            "validation_loss": None,
            "validation_accuracy": None,
            "best_step": None,
            "train_seconds": 0.0,
        }
    )

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return int(self.step_array[0])

    def named_arrays(self) -> list[tuple[str, NDArray[Any]]]:
        """Return every array of the state with its name: parameters first, then all the rest."""
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

    def weights_sha256(self) -> str:
        """Return the receipt: the hash of the parameters, and of what batch normalization keeps besides."""
        return sha256_of_arrays([*self.network.named_parameters(), *self.network.named_buffers()])

    def state_sha256(self) -> str:
        """Return the hash of the whole state."""
        return sha256_of_arrays(self.named_arrays())
