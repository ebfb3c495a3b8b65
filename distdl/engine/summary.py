"""The summary of a run: the content of ``summary.json``."""

from dataclasses import dataclass
from typing import Any

from distdl.config import TrainConfig
from distdl.data import batch_order
from distdl.engine import best
from distdl.engine.checks.corruption import corruption_found, odd_ones_out
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.parallel import Communicator


@dataclass(frozen=True)
class Summary:
    """The results of a run."""

    ranks: int
    steps: int
    epochs: int
    train_loss: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    """None for regression."""
    test_loss: float | None
    """None if the training is not complete."""
    test_accuracy: float | None
    best_epoch: int | None
    """The epoch of the best validation; None if no epoch is validated."""
    test_epoch: int | None
    """The epoch of the weights that the test part was scored with: the last one, or with --test-with best the best."""
    stopped_early: bool
    """Whether --early-stopping has ended the training."""
    train_seconds: float
    samples_per_second: float
    kernels: str
    weights_sha256: str
    state_sha256: str
    recoveries: list[dict[str, Any]]


def summarize(
    communicator: Communicator,
    state: TrainingState,
    test: Sums | None,
    config: TrainConfig,
    *,
    training_samples: int,
    recoveries: list[dict[str, Any]],
) -> Summary:
    """Compare the receipts of all ranks and return the summary. Collective.

    `training_samples` is the size of the training part.
    """
    receipt = state.weights_sha256()
    receipts = communicator.allgather_json(receipt)
    if len(set(receipts)) > 1:
        raise corruption_found(communicator, odd_ones_out(receipts), "the weights differ at the end")
    progress = state.progress
    seconds = progress.train_seconds
    steps_per_epoch = batch_order.steps_per_epoch(training_samples, config.batch_size)
    epochs, steps = divmod(state.step, steps_per_epoch)
    samples = epochs * training_samples + steps * config.batch_size
    return Summary(
        ranks=communicator.size,
        steps=state.step,
        epochs=epochs,
        train_loss=progress.train_loss,
        validation_loss=progress.validation_loss,
        validation_accuracy=progress.validation_accuracy,
        test_loss=None if test is None else test.loss,
        test_accuracy=None if test is None else test.accuracy,
        best_epoch=None if progress.best_step is None else progress.best_step // steps_per_epoch,
        test_epoch=None if progress.test_step is None else progress.test_step // steps_per_epoch,
        stopped_early=epochs < config.epoch_count and best.stops_early(config, state, steps_per_epoch),
        train_seconds=seconds,
        samples_per_second=samples / seconds if seconds else 0.0,
        kernels=config.kernels,
        weights_sha256=receipt,
        state_sha256=state.state_sha256(),
        recoveries=recoveries,
    )
