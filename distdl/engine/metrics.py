"""Metrics: the sums of loss, correct predictions and samples, which travel in the canonical tree."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.parallel import Field

#: The fields that metrics add to a record of the reduction.
METRIC_FIELDS = (Field("loss_sum", "f8", 1), Field("counts", "i8", 2))


@dataclass
class Sums:
    """Summed loss (float64), and the counts of correct predictions and samples (int64).

    They are arrays, so that they are reduced and saved like all others. `targets_per_sample` is the number of labels of
    a sample: 1, or one per pixel; 0 if targets are numbers.
    """

    loss_sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, np.int64))
    targets_per_sample: int = 1

    def set(self, loss_sum: float, correct: int, samples: int) -> None:
        """Overwrite the sums."""
        self.loss_sum[0] = loss_sum
        self.counts[:] = correct, samples

    def add(self, record: Mapping[str, NDArray[Any]]) -> None:
        """Add the sums of a reduced record."""
        self.loss_sum += record["loss_sum"]
        self.counts += record["counts"]

    def values(self) -> dict[str, NDArray[Any]]:
        """Return the sums as the values of `METRIC_FIELDS`."""
        return {"loss_sum": self.loss_sum, "counts": self.counts}

    @property
    def samples(self) -> int:
        """The number of samples."""
        return int(self.counts[1])

    @property
    def loss(self) -> float:
        """The mean loss of a sample."""
        return float(self.loss_sum[0]) / self.samples

    @property
    def accuracy(self) -> float | None:
        """The share of correct predictions; None for regression."""
        return int(self.counts[0]) / (self.samples * self.targets_per_sample) if self.targets_per_sample else None

    @property
    def score(self) -> float:
        """The number that is greater for the better of two: the accuracy, or minus the loss for regression."""
        return -self.loss if self.accuracy is None else self.accuracy

    def named(self, part: str = "") -> dict[str, float]:
        """Return the loss and, if there is one, the accuracy, by their names in the metrics: ``test_loss``."""
        prefix = f"{part}_" if part else ""
        accuracy = {} if self.accuracy is None else {f"{prefix}accuracy": self.accuracy}
        return {f"{prefix}loss": self.loss, **accuracy}
