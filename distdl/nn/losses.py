"""Losses, which training minimizes, and the count of correct predictions.

N samples, K outputs; ``...`` are the positions of a sample's targets: none for one label per sample, (H, W) for one
label per pixel. A position with the label `NO_LABEL`, -1, counts neither in the loss and its gradient nor as correct.
A loss and its gradient are *sums* over samples, so that the sums of several micro-batches can be added. The caller
divides by the batch size afterwards. The arithmetic is float64.
"""

import math
from typing import Any, Protocol

import numpy as np

from distdl.arrays import NO_LABEL, aligned_empty
from distdl.errors import UserError, unknown_name
from distdl.nn.layers import Array


class LossFunction(Protocol):
    """A loss (section 4.2), including the output's activation (5.6.3); `backward` belongs to the latest `forward`."""

    def forward(self, outputs: Array, targets: Array) -> float:
        """Return the loss summed over the samples, for outputs (N, ...) and their targets."""

    def backward(self) -> Array:
        """Return the gradient of that sum with respect to the outputs, in their shape."""

    def count_correct(self, outputs: Array, targets: Array) -> int:
        """Return the number of correct predictions; 0 if the targets are numbers."""


class _StoredGradient:
    """The part that all losses share: `forward` stores the gradient that `backward` returns."""

    def _store(self, gradient: Array, outputs: Array) -> None:
        """Store the gradient in the shape and dtype of the outputs."""
        self.d_outputs: Array = aligned_empty(outputs.shape, outputs.dtype)
        self.d_outputs[...] = gradient.reshape(outputs.shape)

    def backward(self) -> Array:
        """Return the gradient of the summed loss with respect to the outputs, in their shape."""
        return self.d_outputs


class SoftmaxCrossEntropy(_StoredGradient):
    """Softmax and cross-entropy in one.

    ``loss = sum over n of (log(sum over k of exp(z[n, k])) - z[n, labels[n]])`` for the logits z. If a sample has
    labels at several positions, its loss is the mean over the positions that have a label.

    Its gradient is ``softmax(z) - onehot(labels)``. The row maximum is subtracted first, so nothing overflows.
    Source: sections 3.5, 4.2 and 5.6.3, appendix A; for pixels section 8.4 and Long et al. 2015.

    `label_smoothing` ε replaces ``onehot(labels)`` by ``(1 - ε) onehot(labels) + ε / K``: Szegedy et al. 2016, section
    7 of the paper. `class_weights` (K,) multiply the loss of each label by the weight of its class.

    >>> loss = SoftmaxCrossEntropy()
    >>> loss.forward(np.zeros((2, 2)), np.array([0, 1]))
    1.3862943611198906
    >>> loss.backward().tolist()
    [[-0.5, 0.5], [0.5, -0.5]]
    """

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: Array | None = None) -> None:
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def forward(self, outputs: Array, targets: Array) -> float:
        """Return the summed loss of logits (N, ..., K) and class labels (N, ...).

        Labels are integers in 0 .. K-1, or `NO_LABEL` at a position without one.
        """
        N, *positions, K = outputs.shape
        if targets.shape != (N, *positions) or targets.dtype.kind not in "iu":
            raise UserError(
                f"labels are {targets.dtype} {targets.shape}; expected {math.prod([N, *positions])} integers, "
                f"one per {'position of a ' if positions else ''}sample"
            )
        least = NO_LABEL if positions else 0
        if targets.size and not least <= targets.min() <= targets.max() < K:
            raise UserError(f"labels lie in {targets.min()} .. {targets.max()}; expected 0 .. {K - 1}, one per class")
        each = math.prod(positions)
        rows, columns = np.arange(N * each), targets.reshape(-1)
        shifted = outputs.reshape(-1, K).astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        sums = exponentials.sum(axis=1, keepdims=True)
        gradient = exponentials / sums
        gradient[rows, columns] -= 1
        losses = np.log(sums[:, 0]) - shifted[rows, columns]
        if self.label_smoothing:
            gradient[rows, columns] += self.label_smoothing
            gradient -= self.label_smoothing / K
            losses += self.label_smoothing * (shifted[rows, columns] - shifted.mean(axis=1))
        if self.class_weights is not None:
            weights = self.class_weights[columns]
            gradient *= weights.reshape(-1, 1)
            losses *= weights
        if targets.size and targets.min() == NO_LABEL:
            counted = targets.reshape(N, each) != NO_LABEL
            share = counted / np.maximum(counted.sum(axis=1, keepdims=True), 1)
            gradient *= share.reshape(-1, 1)
            loss = float((losses * share.reshape(-1)).sum())
        elif positions:
            gradient /= each
            loss = float(losses.sum()) / each
        else:
            loss = float(losses.sum())
        self._store(gradient, outputs)
        return loss

    def count_correct(self, outputs: Array, targets: Array) -> int:
        return count_correct(outputs, targets)


class SigmoidCrossEntropy(_StoredGradient):
    """The sigmoid of a single output and the cross-entropy of two classes in one: logistic regression.

    ``loss = sum over n of log(1 + exp(z[n])) - labels[n] z[n]``, computed as ``max(z, 0) - labels z + log(1 +
    exp(-|z|))``, which does not overflow. Its gradient is ``sigmoid(z) - labels``.
    `class_weights` (2,) multiply the loss of each label by the weight of its class.
    Source: Ng's course, week 2; section 3.2.4 has the sigmoid.

    >>> SigmoidCrossEntropy().forward(np.zeros((2, 1)), np.array([0, 1]))
    1.3862943611198906
    """

    def __init__(self, *, class_weights: Array | None = None) -> None:
        self.class_weights = class_weights

    def forward(self, outputs: Array, targets: Array) -> float:
        """Return the summed loss of logits (N, 1) and class labels (N,), which are 0 or 1."""
        N = len(outputs)
        if outputs.shape != (N, 1):
            raise UserError(f"logits are {outputs.shape}; expected a single output for two classes, ({N}, 1)")
        is_whole = targets.shape == (N,) and targets.dtype.kind in "iu"
        if not is_whole or (N and not 0 <= targets.min() <= targets.max() <= 1):
            raise UserError(f"labels are {targets.dtype} {targets.shape}; expected {N} integers that are 0 or 1")
        z = outputs[:, 0].astype(np.float64)
        small = np.exp(-np.abs(z))
        sigmoid = np.where(z >= 0, 1, small) / (1 + small)
        gradient, losses = sigmoid - targets, np.maximum(z, 0) - targets * z + np.log1p(small)
        if self.class_weights is not None:
            weights = self.class_weights[targets]
            gradient, losses = gradient * weights, losses * weights
        self._store(gradient, outputs)
        return float(losses.sum())

    def count_correct(self, outputs: Array, targets: Array) -> int:
        """Return the number of samples with a logit above 0 and label 1, or any other logit and label 0."""
        return int(((outputs[:, 0] > 0) == (targets == 1)).sum())


class MeanSquaredError(_StoredGradient):
    """The squared error, its mean over a sample's outputs: regression, with the identity as the output's activation.

    ``loss = sum over n of (mean over k of (y[n, k] - targets[n, k])²)``, with the gradient ``2 (y - targets) / K``.
    Sources: sections 3.5 and 4.2.1. The book has half the sum over k; the mean is the usual convention and PyTorch's.

    >>> MeanSquaredError().forward(np.array([[1.0, 2.0]]), np.array([[0.0, 0.0]]))
    2.5
    """

    def forward(self, outputs: Array, targets: Array) -> float:
        """Return the summed loss of outputs and targets, both (N, K)."""
        if outputs.shape != targets.shape:
            raise UserError(f"outputs are {outputs.shape}, targets {targets.shape}; expected the same shape")
        each = math.prod(outputs.shape[1:])
        difference = outputs.astype(np.float64) - targets
        self._store(difference * (2 / each), outputs)
        return float((difference * difference).sum()) / each

    def count_correct(self, outputs: Array, targets: Array) -> int:
        """Return 0: a number is near its target or far from it, not correct or wrong."""
        return 0


LOSSES: dict[str, type[LossFunction]] = {
    "cross_entropy": SoftmaxCrossEntropy,
    "binary_cross_entropy": SigmoidCrossEntropy,
    "mean_squared_error": MeanSquaredError,
}


def make_loss(name: str, **settings: Any) -> LossFunction:
    """Return the loss with this name and these settings.

    Raises `UserError`, listing the known ones, for an unknown name.
    """
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)
    return LOSSES[name](**settings)


def count_correct(logits: Array, labels: Array) -> int:
    """Return the number of labels (N, ...) with the greatest of the logits (N, ..., K), the first among equals.

    Divided by the number of labels it is the accuracy of section 3.6. If some positions of a sample have no label, the
    share of correct ones among the others counts for all positions, rounded.

    >>> count_correct(np.array([[1, 2], [3, 3]]), np.array([1, 0]))
    2
    >>> count_correct(np.zeros((1, 2, 3, 2)), np.array([[[-1, 0, 1], [-1, 0, -1]]]))  # two thirds of six
    4
    """
    correct = logits.argmax(axis=-1) == labels
    if labels.ndim == 1 or not labels.size or labels.min() != NO_LABEL:
        return int(correct.sum())
    each = math.prod(labels.shape[1:])
    correct_of, counted = (one.reshape(-1, each).sum(axis=1) for one in (correct, labels != NO_LABEL))
    return int(((2 * correct_of * each + counted) // np.maximum(2 * counted, 1)).sum())
