"""The best weights of a run: which validation finds them, how long ago that was, and their score on the test part.

Validation after an epoch is better if its accuracy is greater than every earlier one; for regression if its loss is
smaller. An equal score is not better. Early stopping, the plateau schedule, the best checkpoint and `--test-with best`
share this rule.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from distdl.config import TrainConfig
from distdl.elementary import power
from distdl.engine.metrics import Sums
from distdl.engine.state import TrainingState
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import Checkpoint
from distdl.engine.storage.restoring import copy_tensors
from distdl.errors import UserError
from distdl.parallel import Communicator, from_rank_0


def note_validation(config: TrainConfig, state: TrainingState, validation: Sums, steps_per_epoch: int) -> None:
    """Note the score of a validation in the progress, and whether the plateau schedule now reduces the rate."""
    progress = state.progress
    if progress.best_score is None or validation.score > progress.best_score:
        progress.best_step, progress.best_score = state.step, validation.score
    elif ends_plateau(config, state, steps_per_epoch):
        progress.plateau_cuts += 1
    progress.train_loss = state.epoch_sums.loss
    progress.validation_loss = validation.loss
    progress.validation_accuracy = validation.accuracy


def epochs_since_best(state: TrainingState, steps_per_epoch: int) -> int:
    """Return the number of whole epochs since the best validation."""
    best = state.progress.best_step
    return 0 if best is None else state.step // steps_per_epoch - best // steps_per_epoch


def ends_plateau(config: TrainConfig, state: TrainingState, steps_per_epoch: int) -> bool:
    """Return whether the validation after this step makes the plateau schedule reduce the rate."""
    epochs = epochs_since_best(state, steps_per_epoch)
    return config.schedule == "plateau" and epochs > 0 and epochs % config.plateau_patience == 0


def stops_early(config: TrainConfig, state: TrainingState, steps_per_epoch: int) -> bool:
    """Return whether validation has not become better for as many epochs as `--early-stopping` allows."""
    is_validated = state.step % steps_per_epoch == 0
    return is_validated and 0 < config.early_stopping <= epochs_since_best(state, steps_per_epoch)


@contextmanager
def weights_to_score(
    config: TrainConfig, communicator: Communicator, state: TrainingState, folder: Path, warn: Callable[[str], None]
) -> Iterator[int]:
    """Give the network, inside the ``with`` block, the weights that `--test-with` selects; yield their step.

    Collective. Rank 0 reads the best checkpoint. If it cannot be read, `warn` gets the reason, and the last weights are
    scored.
    """
    network, best = state.network, state.progress.best_step
    if config.test_with == "last" or best is None or best == state.step:
        yield state.step
        return

    def read() -> int:
        path = checkpoints.path_of_step(folder / "checkpoints", best)
        into = [*network.named_parameters(), *network.named_buffers()]
        try:
            tensors = checkpoints.read(path, follow=False).tensors
            weights = {name: array for name, array in tensors.items() if name in dict(into)}
            copy_tensors(Checkpoint(weights, {}), into, str(path))
        except UserError as error:
            warn(f"{error}; --test-with best scores the last weights instead")
            return state.step
        return best

    last = network.parameters.copy(), network.buffers.copy()
    try:
        step = from_rank_0(communicator, read)
        communicator.bcast(network.parameters)
        communicator.bcast(network.buffers)
        yield step
    finally:
        np.copyto(network.parameters, last[0])
        np.copyto(network.buffers, last[1])


def plateau_share(config: TrainConfig, cuts: int) -> float:
    """Return the factor of the learning rate after this number of reductions of the plateau schedule."""
    return power(config.plateau_factor, cuts)
