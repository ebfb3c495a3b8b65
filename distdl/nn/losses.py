"""What a network is trained to make small, and the count of its right answers.

N samples, K outputs, ``...`` the places of an answer: none for a label a sample, (H, W) for a label a pixel. A place
whose label is `NO_LABEL`, -1, is not counted, neither in loss nor gradient nor right answers. A loss is
a *sum* over samples, and so is its gradient, so that those of several micro-batches can be added; the division by
the batch size comes after. The arithmetic is float64.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from distdl.arrays import NO_LABEL, aligned_empty
from distdl.errors import UserError, unknown_name
from distdl.nn.layers import Array


class LossFunction(Protocol):
    """A loss (section 4.2), with the output's activation in it (5.6.3); `backward` belongs to the latest `forward`."""

    def forward(self, outputs: Array, targets: Array) -> float:
        """Return the sum over the samples, of outputs (N, ...) and what they should be."""

    def backward(self) -> Array:
        """Return the gradient of that sum by the outputs, of their shape."""

    def count_correct(self, outputs: Array, targets: Array) -> int:
        """Return how many answers are right; 0 where none is right or wrong."""


class SoftmaxCrossEntropy:
    """Softmax and cross-entropy in one.

    ``loss = sum over n of (log(sum over k of exp(z[n, k])) - z[n, labels[n]])`` for the logits z; where a sample has a
    label at each of several places, the mean over its places that have one takes the place of its loss.

    The row maximum is subtracted first, so nothing overflows. Source: sections 3.5, 4.2 and 5.6.3, appendix A; for
    pixels section 8.4 and Long et al. 2015.

    >>> loss = SoftmaxCrossEntropy()
    >>> loss.forward(np.zeros((2, 2)), np.array([0, 1]))
    1.3862943611198906
    >>> loss.backward().tolist()
    [[-0.5, 0.5], [0.5, -0.5]]
    """

    def forward(self, logits: Array, labels: Array) -> float:
        """Return the summed loss of logits (N, ..., K) and labels (N, ...).

        They are integers in 0 .. K-1, or `NO_LABEL` for a place that has none.
        """
        N, *places, K = logits.shape
        if labels.shape != (N, *places) or labels.dtype.kind not in "iu":
            raise UserError(
                f"labels are {labels.dtype} {labels.shape}; expected {math.prod([N, *places])} integers, "
                f"one per {'place of a ' if places else ''}sample"
            )
        least = NO_LABEL if places else 0
        if labels.size and not least <= labels.min() <= labels.max() < K:
            raise UserError(f"labels lie in {labels.min()} .. {labels.max()}; expected 0 .. {K - 1}, one per class")
        each = math.prod(places)
        rows, columns = np.arange(N * each), labels.reshape(-1)
        shifted = logits.reshape(-1, K).astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        sums = exponentials.sum(axis=1, keepdims=True)
        gradient = exponentials / sums
        gradient[rows, columns] -= 1
        losses = np.log(sums[:, 0]) - shifted[rows, columns]
        if labels.size and labels.min() == NO_LABEL:
            counted = labels.reshape(N, each) != NO_LABEL
            share = counted / np.maximum(counted.sum(axis=1, keepdims=True), 1)
            gradient *= share.reshape(-1, 1)
            loss = float((losses * share.reshape(-1)).sum())
        elif places:
            gradient /= each
            loss = float(losses.sum()) / each
        else:
            loss = float(losses.sum())
        self.d_logits: Array = aligned_empty(logits.shape, logits.dtype)
        self.d_logits.reshape(-1, K)[...] = gradient
        return loss

    def backward(self) -> Array:
        """Return the gradient of the summed loss by the logits, ``softmax(z) - onehot(labels)``, (N, ..., K)."""
        return self.d_logits

    def count_correct(self, logits: Array, labels: Array) -> int:
        """Return how many labels have the greatest logit."""
        return count_correct(logits, labels)


class SigmoidCrossEntropy:
    """The sigmoid of a single output, and the cross-entropy of two classes in one: logistic regression.

    ``loss = sum over n of log(1 + exp(z[n])) - labels[n] z[n]``, computed as ``max(z, 0) - labels z + log(1 +
    exp(-|z|))``, where nothing overflows. Source: Ng's course, week 2; section 3.2.4 has the sigmoid.

    >>> SigmoidCrossEntropy().forward(np.zeros((2, 1)), np.array([0, 1]))
    1.3862943611198906
    """

    def forward(self, logits: Array, labels: Array) -> float:
        """Return the summed loss of logits (N, 1) and labels (N,), which are 0 or 1."""
        N = len(logits)
        if logits.shape != (N, 1):
            raise UserError(f"logits are {logits.shape}; expected a single output for two classes, ({N}, 1)")
        if labels.shape != (N,) or labels.dtype.kind not in "iu" or (N and not 0 <= labels.min() <= labels.max() <= 1):
            raise UserError(f"labels are {labels.dtype} {labels.shape}; expected {N} integers that are 0 or 1")
        z = logits[:, 0].astype(np.float64)
        small = np.exp(-np.abs(z))
        sigmoid = np.where(z >= 0, 1, small) / (1 + small)
        self.d_logits: Array = aligned_empty(logits.shape, logits.dtype)
        self.d_logits[:, 0] = sigmoid - labels
        return float((np.maximum(z, 0) - labels * z + np.log1p(small)).sum())

    def backward(self) -> Array:
        """Return the gradient of the summed loss by the logits, ``sigmoid(z) - labels``, (N, 1)."""
        return self.d_logits

    def count_correct(self, logits: Array, labels: Array) -> int:
        """Return how many samples have a logit above 0 if, and only if, their label is 1."""
        return int(((logits[:, 0] > 0) == (labels == 1)).sum())


class MeanSquaredError:
    """The mean over a sample's outputs of the squared error: regression, with the identity as the output's activation.

    ``loss = sum over n of (mean over k of (y[n, k] - targets[n, k])²)``. Sources: sections 3.5 and 4.2.1; the book has
    half the sum over k, the mean is the field's and PyTorch's.

    >>> MeanSquaredError().forward(np.array([[1.0, 2.0]]), np.array([[0.0, 0.0]]))
    2.5
    """

    def forward(self, outputs: Array, targets: Array) -> float:
        """Return the summed loss of outputs and targets, both (N, K)."""
        if outputs.shape != targets.shape:
            raise UserError(f"outputs are {outputs.shape}, targets {targets.shape}; expected the same shape")
        each = math.prod(outputs.shape[1:])
        difference = outputs.astype(np.float64) - targets
        self.d_outputs: Array = aligned_empty(outputs.shape, outputs.dtype)
        self.d_outputs[...] = difference * (2 / each)
        return float((difference * difference).sum()) / each

    def backward(self) -> Array:
        """Return the gradient of the summed loss by the outputs, ``2 (y - targets) / K``, (N, K)."""
        return self.d_outputs

    def count_correct(self, outputs: Array, targets: Array) -> int:  # noqa: ARG002
        """Return 0: a number is near or far, not right or wrong."""
        return 0


LOSSES: dict[str, type[LossFunction]] = {
    "cross_entropy": SoftmaxCrossEntropy,
    "binary_cross_entropy": SigmoidCrossEntropy,
    "mean_squared_error": MeanSquaredError,
}


def make_loss(name: str) -> LossFunction:
    """Return the loss of that name; raise `UserError` listing the known ones otherwise."""
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)
    return LOSSES[name]()


def count_correct(logits: Array, labels: Array) -> int:
    """Return how many labels (N, ...) have the greatest of the logits (N, ..., K), the first if several are equal.

    Divided by their number it is the accuracy of section 3.6. Of a sample some of whose places have no label, the share
    among the others counts for all places, rounded.

    >>> count_correct(np.array([[1, 2], [3, 3]]), np.array([1, 0]))
    2
    >>> count_correct(np.zeros((1, 2, 3, 2)), np.array([[[-1, 0, 1], [-1, 0, -1]]]))  # two thirds of six
    4
    """
    right = logits.argmax(axis=-1) == labels
    if labels.ndim == 1 or not labels.size or labels.min() != NO_LABEL:
        return int(right.sum())
    each = math.prod(labels.shape[1:])
    right_of, counted = (one.reshape(-1, each).sum(axis=1) for one in (right, labels != NO_LABEL))
    return int(((2 * right_of * each + counted) // np.maximum(2 * counted, 1)).sum())
