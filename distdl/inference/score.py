"""Score trained networks: each alone, and all together as an ensemble.

A network gets the same micro-batches as in its training. So its score is bitwise that of the run's own summary.

N samples, K classes. ``...`` are the places of a label: none for one label per sample, (H, W) for one per pixel. For
regression, K numbers per sample take the place of labels, probabilities and predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.data import MicroBatches
from distdl.engine import evaluation
from distdl.engine.environment import numerics
from distdl.engine.metrics import METRIC_FIELDS
from distdl.errors import UserError
from distdl.inference.load import Trained
from distdl.inference.options import Part
from distdl.nn import make_loss
from distdl.nn.network_copies import half_precision
from distdl.parallel import REDUCTIONS, Communicator, Layout, contiguous_shards, guard, together, world


@dataclass(frozen=True)
class Score:
    """The mean loss of a sample, the correct predictions, and the number of targets; 0 of both for regression."""

    loss: float
    correct: int
    targets: int

    @property
    def accuracy(self) -> float | None:
        """The share of correct predictions; None for regression."""
        return self.correct / self.targets if self.targets else None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores on a part of the dataset: of each network alone, and of the mean of their probabilities."""

    rows: NDArray[np.int64]
    """(N,), the rows of the part in the dataset."""
    labels: NDArray[Any]
    """(N, ...), the actual classes; for regression numbers (N, K)."""
    scores: list[Score]
    ensemble: Score
    probabilities: NDArray[np.float64]
    """(N, ..., K), of the ensemble; for regression the mean of the outputs, (N, K)."""
    predictions: NDArray[Any]
    """(N, ...), the most probable class, the first of several; for regression the same as `probabilities`."""


def evaluate(trained: Sequence[Trained], part: Part, communicator: Communicator | None = None) -> Evaluation:
    """Return the scores of networks, and of all of them as an ensemble, on a part of their dataset.

    The probabilities of an ensemble are the mean of those of its members (softmax; sigmoid for logistic regression), in
    float64 and in the given order. Its loss is the mean of ``-log(probability of the label)``. For regression the mean
    of the outputs is scored by its squared error. An ensemble of one scores like its member. Source: section 8.1.2.

    The bits do not depend on the number of ranks. Every rank holds the outputs of all samples. Collective. Raises
    `UserError` if the parts of the networks have different samples.
    """
    communicator = world() if communicator is None else communicator
    with guard(communicator):
        rows = [np.asarray(getattr(one.data.parts, part)) for one in trained]
        together(communicator, lambda: _refuse_other_rows(trained, part, rows))
        scored = [_score(one, rows[0], communicator) for one in trained]
    labels, scores = trained[0].data.labels[rows[0]], [score for score, _ in scored]
    mean = probabilities_of(trained[0], scored[0][1])
    for one, (_, outputs) in zip(trained[1:], scored[1:], strict=True):
        mean += probabilities_of(one, outputs)
    mean /= len(trained)
    if len(trained) == 1:
        return Evaluation(rows[0], labels, scores, scores[0], mean, predictions_of(trained[0], scored[0][1]))
    if not trained[0].data.targets_per_sample:
        error = mean - labels
        if (targets := trained[0].data.target_normalization) is not None:  # in the units of the members' losses
            error /= targets.deviation
        return Evaluation(rows[0], labels, scores, Score(float((error * error).mean()), 0, 0), mean, mean)
    predictions = mean.argmax(axis=-1)
    of_labels = np.take_along_axis(mean, labels[..., np.newaxis], axis=-1)
    with np.errstate(divide="ignore"):  # a probability of 0 gives an infinite loss
        loss = -float(np.log(of_labels).sum()) / labels.size
    ensemble = Score(loss, int((predictions == labels).sum()), labels.size)
    return Evaluation(rows[0], labels, scores, ensemble, mean, predictions)


def in_half_precision(trained: Sequence[Trained]) -> list[Trained]:
    """Return the same networks with weights and activations stored as float16: see `half_precision`."""
    return [replace(one, network=half_precision(one.network)) for one in trained]


def _score(one: Trained, rows: NDArray[np.int64], communicator: Communicator) -> tuple[Score, NDArray[np.float32]]:
    """Return the score of a network on some rows, and its outputs (N, ..., K), on every rank. Collective."""
    size, rank = one.config.micro_batch_size, communicator.rank
    batches = MicroBatches(one.data, size)
    shards = contiguous_shards(batches.count(len(rows)), communicator.size)
    reduction = REDUCTIONS["tree"](communicator, Layout(METRIC_FIELDS))
    outputs = np.empty((len(rows), *one.network.output_shape), np.float32)
    loss = one.network.stack.kernels.loss(make_loss(one.loss_name))
    with numerics(one.config.threads_per_rank):
        sums = evaluation.evaluate(one.network, loss, batches, rows, shards, reduction, rank=rank, outputs=outputs)
    ends = [min(shard.stop * size, len(rows)) for shard in shards]
    counts = np.diff([0, *ends]) * outputs[:1].nbytes
    communicator.allgatherv(outputs.reshape(-1).view(np.uint8), counts.tolist())
    return Score(sums.loss, int(sums.counts[0]), sums.samples * one.data.targets_per_sample), outputs


def probabilities_of(one: Trained, outputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the probability of each class, (N, ..., K), in float64; for regression the outputs."""
    exact = outputs.astype(np.float64)
    if one.loss_name == "mean_squared_error":
        return one.in_units_of_labels(exact)
    if one.loss_name == "binary_cross_entropy":
        exact = np.concatenate([np.zeros_like(exact), exact], axis=-1)  # the sigmoid is the softmax of 0 and the logit
    with np.errstate(invalid="ignore"):  # half precision may give infinite logits
        exponentials = np.exp(exact - exact.max(axis=-1, keepdims=True))
        probabilities: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def predictions_of(one: Trained, outputs: NDArray[np.float32]) -> NDArray[Any]:
    """Return the predictions of a single network: the class of the greatest output, (N, ...), or the numbers."""
    if one.loss_name == "mean_squared_error":
        return one.in_units_of_labels(outputs)
    if one.loss_name == "binary_cross_entropy":
        return np.greater(outputs[:, 0], 0).astype(np.int64)
    classes: NDArray[np.int64] = outputs.argmax(axis=-1)
    return classes


def _refuse_other_rows(trained: Sequence[Trained], part: Part, rows: Sequence[NDArray[np.int64]]) -> None:
    first = trained[0]
    for other, its_rows in zip(trained[1:], rows[1:], strict=True):
        if not np.array_equal(its_rows, rows[0]):
            raise UserError(
                f"the {part} part of {other.given} (--seed {other.config.seed}) has other samples than that of "
                f"{first.given} (--seed {first.config.seed}): expected one split; train with one --seed, or score the "
                "test part of a dataset that has one of its own"
            )
