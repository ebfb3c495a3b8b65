"""Requirements: config, dataset, network, ranks and checkpoint must fit each other. Each check raises `UserError`.

`warnings_about` returns warnings instead.
"""

import numpy as np

from distdl.config import TrainConfig
from distdl.data import Dataset, PreparedDataset
from distdl.data.batch_order import micro_batch_count
from distdl.data.batch_order import steps_per_epoch as steps_per_epoch_of
from distdl.data.signature import Signature, default_loss
from distdl.engine.objective import check_objective
from distdl.engine.state import TrainingState
from distdl.engine.storage.checkpoints import FoundCheckpoint
from distdl.engine.storage.restoring import copy_tensors
from distdl.errors import DamagedFileError, UserError
from distdl.nn import BatchNorm, Sequential

#: The targets of a sample, for messages.
TARGETS = {
    "classification": "{} classes",
    "segmentation": "{} classes for each pixel",
    "regression": "{} numbers",
}


def outputs_of(config: TrainConfig, data: Dataset | PreparedDataset | Signature) -> tuple[int, ...]:
    """Return the shape of the outputs of a sample that the data and the loss need."""
    classes, shape = _classes_and_shape(data)
    if config.loss == "binary_cross_entropy":
        if (data.task, classes) != ("classification", 2):
            raise UserError(
                f"--loss binary_cross_entropy is for one label of two classes a sample: {config.dataset} has "
                f"{TARGETS[data.task].format(classes)}; leave the flag out"
            )
        check_objective(config, data)
        return (1,)
    if config.loss not in {"auto", default_loss(data.task)}:
        kind = "numbers" if data.task == "regression" else "labels"
        raise UserError(f"--loss {config.loss} does not fit {config.dataset}, which has {kind}; leave the flag out")
    check_objective(config, data)
    return (*(shape[:2] if data.task == "segmentation" else ()), classes)


def check_outputs(
    config: TrainConfig, output_shape: tuple[int, ...], data: Dataset | PreparedDataset | Signature
) -> None:
    """Raise `UserError` if the outputs of a network have another shape than the data and the loss need."""
    expected = outputs_of(config, data)
    if output_shape != expected:
        raise UserError(
            f"the network {config.model} returns outputs {output_shape} for a sample, expected {expected}: "
            f"{config.dataset} has {TARGETS[data.task].format(_classes_and_shape(data)[0])}"
        )


def _classes_and_shape(data: Dataset | PreparedDataset | Signature) -> tuple[int, tuple[int, ...]]:
    """Return the number of classes, or of the numbers of a sample, and the shape of an image."""
    if isinstance(data, Signature):
        return data.outputs, data.image_shape
    return data.classes, data.images.shape[1:]


def check_moments(config: TrainConfig, network: Sequential) -> None:
    """Raise `UserError` if batch normalization would see a single number per micro-batch: that is its own mean."""
    if config.micro_batch_size > 1:
        return
    if any(isinstance(layer, BatchNorm) and layer.pixels == 1 for layer in network.every_layer()):
        raise UserError(
            f"the network {config.model} normalizes each feature over a micro-batch (BatchNorm); with "
            "--micro-batch-size 1 it has a single number, which has no deviation: give 2 or more"
        )


def warnings_about(config: TrainConfig, training_samples: int, network: Sequential, ranks: int) -> list[str]:
    """Return warnings about settings that are valid, but hardly what the user wants."""
    warnings = []
    batch_size, size = config.batch_size, config.micro_batch_size
    if batch_size > training_samples:
        leaves = micro_batch_count(training_samples, size)
        idle = f"; {ranks - leaves} of {ranks} ranks compute nothing" if ranks > leaves else ""
        warnings.append(
            f"--batch-size {batch_size} is larger than the training part: every step has its {training_samples} "
            f"samples, {leaves} micro-batch{'es' if leaves > 1 else ''}{idle}"
        )
    steps = config.epoch_count * steps_per_epoch_of(training_samples, batch_size)
    if config.warmup_steps >= steps:
        warnings.append(
            f"--warmup-steps {config.warmup_steps} is not less than the {steps} steps of the run: the learning rate "
            "rises until the end"
        )
    if any(isinstance(layer, BatchNorm) for layer in network.every_layer()):
        note = ragged_batch_note(training_samples, batch_size, size)
        warnings += [] if note is None else [note]
    return warnings


def ragged_batch_note(training_samples: int, batch_size: int, micro_batch_size: int) -> str | None:
    """Return a warning if the last batch of an epoch has too few samples for batch normalization, otherwise None.

    It suggests the nearest batch size whose last batch is at least half full.

    >>> ragged_batch_note(270, 67, 16)
    'the last batch of each epoch has 2 samples, too few for batch normalization; with --batch-size 68 it has 66'
    >>> ragged_batch_note(257, 128, 16)
    'the last batch of each epoch has 1 sample, too few for batch normalization; with --batch-size 144 it has 113'
    >>> ragged_batch_note(270, 128, 16) is None
    True
    """
    left = training_samples % batch_size
    few = left < micro_batch_size and left <= max(2, micro_batch_size // 4)
    if not left or not few or batch_size > training_samples:
        return None
    unit = micro_batch_size if batch_size % micro_batch_size == 0 else 1
    sizes = range(batch_size % unit + unit, training_samples + 1, unit)
    good = [size for size in sizes if not training_samples % size or 2 * (training_samples % size) >= size]
    text = f"the last batch of each epoch has {left} sample{'s' if left > 1 else ''}, too few for batch normalization"
    if not good:
        return text
    best = min(good, key=lambda size: (abs(size - batch_size), size))
    leaves = training_samples % best
    return f"{text}; with --batch-size {best} it {f'has {leaves}' if leaves else 'is full'}"


def check_ranks(config: TrainConfig, ranks: int) -> None:
    """Raise `UserError` if there are more ranks than micro-batches."""
    if ranks > config.micro_batches:
        raise UserError(
            f"{ranks} ranks cannot share a batch of {config.micro_batches} micro-batches (--batch-size "
            f"{config.batch_size}, --micro-batch-size {config.micro_batch_size}): start at most "
            f"{config.micro_batches} ranks, or give a larger batch or smaller micro-batches"
        )


def restore(
    state: TrainingState, found: FoundCheckpoint, data_sha256: str, config: TrainConfig, steps_per_epoch: int
) -> None:
    """Copy a checkpoint into the state; raise `UserError` if the run cannot continue from it."""
    header = found.header()
    copy_tensors(found.checkpoint, state.named_arrays(), str(found.path))
    state.progress = header.progress
    if header.data_sha256 != data_sha256:
        raise UserError(
            f"cannot resume from {found.path}: it was trained on other images or labels, or with another split; "
            "give the same data, or start a new run"
        )
    batch_size = config.batch_size
    samples = state.step % steps_per_epoch * batch_size
    correct, counted = state.epoch_sums.counts.tolist()
    skipped, rest = divmod(samples - counted, batch_size)
    if (
        rest
        or not 0 <= skipped <= state.progress.skipped_steps
        or not 0 <= correct <= counted * state.epoch_sums.targets_per_sample
        or not np.isfinite(state.epoch_sums.loss_sum[0])
    ):
        raise DamagedFileError(f"{found.path} is damaged: its sums of the epoch are not those of {samples} samples")
    if config.max_steps is not None and state.step > config.max_steps:
        raise UserError(
            f"cannot resume from {found.path}: it has taken {state.step} steps, and --max-steps is "
            f"{config.max_steps}; give more, leave the flag out, or start a new run"
        )
    epochs = config.epoch_count
    if state.step > epochs * steps_per_epoch:
        raise UserError(
            f"cannot resume from {found.path}: it has taken {state.step} steps, and --epochs {epochs} are "
            f"{epochs * steps_per_epoch}; give --epochs {-(-state.step // steps_per_epoch)} or more, or start a new run"
        )
