"""The loss of a classifier, and the count of its right answers.

N samples, K classes.
"""

from __future__ import annotations

import numpy as np

from distdl.arrays import aligned_empty
from distdl.errors import UserError
from distdl.nn.layers import Array


class SoftmaxCrossEntropy:
    """Softmax and cross-entropy in one.

    ``loss = sum over n of (log(sum over k of exp(z[n, k])) - z[n, labels[n]])`` for the logits z.

    Both value and gradient are *sums* over the samples, so that those of several micro-batches can be
    added; the division by the batch size comes after. The row maximum is subtracted first, so nothing
    overflows; the arithmetic is float64. Source: sections 3.5, 4.2 and 5.6.3, appendix A.

    >>> loss = SoftmaxCrossEntropy()
    >>> loss.forward(np.zeros((2, 2)), np.array([0, 1]))
    1.3862943611198906
    >>> loss.backward().tolist()
    [[-0.5, 0.5], [0.5, -0.5]]
    """

    def forward(self, logits: Array, labels: Array) -> float:
        """Return the summed loss of logits (N, K) and labels (N,), which are integers in 0 .. K-1."""
        N, K = logits.shape
        if labels.shape != (N,) or labels.dtype.kind not in "iu":
            raise UserError(f"labels are {labels.dtype} {labels.shape}; expected {N} integers, one per sample")
        if N and not 0 <= labels.min() <= labels.max() < K:
            raise UserError(f"labels lie in {labels.min()} .. {labels.max()}; expected 0 .. {K - 1}, one per class")
        rows = np.arange(N)
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        sums = exponentials.sum(axis=1, keepdims=True)
        gradient = exponentials / sums
        gradient[rows, labels] -= 1
        self.d_logits: Array = aligned_empty((N, K), logits.dtype)
        self.d_logits[...] = gradient
        return float((np.log(sums[:, 0]) - shifted[rows, labels]).sum())

    def backward(self) -> Array:
        """Return the gradient of the summed loss by the logits, ``softmax(z) - onehot(labels)``, (N, K)."""
        return self.d_logits


def count_correct(logits: Array, labels: Array) -> int:
    """Return how many samples have their greatest logit (the first, if several are equal) at their label.

    >>> count_correct(np.array([[1, 2], [3, 3]]), np.array([1, 0]))
    2
    """
    return int((logits.argmax(axis=1) == labels).sum())
