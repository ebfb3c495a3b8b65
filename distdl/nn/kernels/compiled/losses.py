"""Compiled losses: the definitions of `distdl.nn.losses`, with own exp and log. All arithmetic is float64.

The order of operations, without fused multiply-adds; every sum begins with 0 and adds its terms in ascending order:

- Softmax: ``s[k] = z[k] - m`` with the maximum m, or NaN if some z is NaN; ``e[k] = exp(s[k])``; S is their sum.
  ``d[k] = e[k] / S``, then -1 at the label; with label smoothing ε, +ε at the label, and ``- ε / K`` everywhere.
  The loss is ``log(S) - s[label]``; with label smoothing ``+ ε (s[label] - (sum over k of s[k]) / K)``.
- Sigmoid: ``e = exp(-|z|)``, ``d = (1 or e) / (1 + e) - label``, loss ``(max(z, 0) - label z) + log1p(e)``.
- Both are multiplied by the weight of the class, and for labels of positions then by 1 / (labelled positions of the
  sample), or by 0 without a label. The sum over a sample's positions comes first, then that over the samples.
- Squared error: ``q = y - target``, ``d = q (2 / K)``; q² is summed over a sample, then over the samples; then the sum
  is divided by K.

M positions, K classes or outputs.
"""

import math

import numpy as np

from distdl.nn.kernels.compiled.arrays import KeptArrays
from distdl.nn.kernels.compiled.double_functions import exp, log, log1p
from distdl.nn.kernels.compiled.functions import greatest_number
from distdl.nn.kernels.compiled.jit import kernel
from distdl.nn.layers import Array
from distdl.nn.losses import LossFunction, MeanSquaredError, SigmoidCrossEntropy, SoftmaxCrossEntropy

NO_LABEL = -1
#: Numbers whose exp is computed together.
BLOCK = 2048


@kernel
def softmax_cross_entropy(z_, labels_, each, has_positions, smoothing, weights_, d_):
    """Write the gradient d (M, K); return whether all labels are in range, and the loss.

    `each` consecutive positions belong to a sample; `weights` (K,) is empty without weights.
    """
    M, K = z_.shape
    least = NO_LABEL if has_positions else 0
    for m in range(M):
        if labels_[m] < least or labels_[m] >= K:
            return False, 0.0
    rows = max(1, BLOCK // K)
    s_, e_ = np.empty(rows * K), np.empty(rows * K)
    loss, of_sample, share = 0.0, 0.0, 1.0
    for start in range(0, M, rows):
        count = min(rows, M - start)
        for i in range(count):
            greatest = np.float64(greatest_number(z_[start + i]))
            for k in range(K):
                s_[i * K + k] = np.float64(z_[start + i, k]) - greatest
        for j in range(count * K):
            e_[j] = exp(s_[j])
        for i in range(count):
            m, o = start + i, i * K
            label = labels_[m] if labels_[m] >= 0 else K - 1
            total = 0.0
            for k in range(K):
                total += e_[o + k]
            for k in range(K):
                e_[o + k] = e_[o + k] / total
            e_[o + label] -= 1.0
            of_position = log(total) - s_[o + label]
            if smoothing > 0:
                e_[o + label] += smoothing
                mean = 0.0
                for k in range(K):
                    e_[o + k] -= smoothing / K
                    mean += s_[o + k]
                of_position += smoothing * (s_[o + label] - mean / K)
            if weights_.size:
                of_position *= weights_[label]
                for k in range(K):
                    e_[o + k] *= weights_[label]
            if has_positions:
                if m % each == 0:
                    labelled = 0
                    for p in range(m, m + each):
                        labelled += labels_[p] != NO_LABEL
                    share, of_sample = 1.0 / max(labelled, 1), 0.0
                factor = share if labels_[m] != NO_LABEL else 0.0
                of_sample += of_position * factor
                for k in range(K):
                    d_[m, k] = np.float32(e_[o + k] * factor)
                if m % each == each - 1:
                    loss += of_sample
            else:
                for k in range(K):
                    d_[m, k] = np.float32(e_[o + k])
                loss += of_position
    return True, loss


@kernel
def sigmoid_cross_entropy(z_, labels_, weights_, d_):
    """Write the gradient d (M,); return whether all labels are 0 or 1, and the loss."""
    loss = 0.0
    for m in range(len(z_)):
        label = labels_[m]
        if label < 0 or label > 1:
            return False, 0.0
        z = np.float64(z_[m])
        e = exp(-abs(z))
        d = (1.0 if z >= 0 else e) / (1.0 + e) - label
        of_sample = (0.0 if z < 0 else z) - label * z + log1p(e)
        if weights_.size:
            d *= weights_[label]
            of_sample *= weights_[label]
        d_[m] = np.float32(d)
        loss += of_sample
    return True, loss


@kernel
def mean_squared_error(y_, targets_, d_):
    """Write the gradient d (M, K) and return the loss."""
    M, K = y_.shape
    loss, factor = 0.0, 2 / K
    for m in range(M):
        of_sample = 0.0
        for k in range(K):
            q = np.float64(y_[m, k]) - targets_[m, k]
            d_[m, k] = np.float32(q * factor)
            of_sample += q * q
        loss += of_sample
    return loss / K


@kernel
def correct_predictions(z_, labels_, each):
    """Return the number of labels with the greatest of the numbers z (M, K); see `distdl.nn.losses.count_correct`."""
    M, K = z_.shape
    total = 0
    for start in range(0, M, each):
        correct, labelled = 0, 0
        for m in range(start, start + each):
            best = 0
            for k in range(1, K):
                if not z_[m, k] <= z_[m, best] and z_[m, best] == z_[m, best]:  # the first NaN wins
                    best = k
            correct += best == labels_[m]
            labelled += labels_[m] != NO_LABEL
        total += (2 * correct * each + labelled) // max(2 * labelled, 1)
    return total


class _Arrays:
    """The working arrays of a loss."""

    def __init__(self) -> None:
        self._kept = KeptArrays()

    def labels(self, targets: Array) -> Array:
        """Return the labels in one row."""
        labels = self._kept.array("labels", (targets.size,), np.int64)
        labels[...] = targets.reshape(-1)
        return labels

    def numbers(self, targets: Array) -> Array:
        """Return numbers as a matrix."""
        numbers = self._kept.array("numbers", (len(targets), math.prod(targets.shape[1:])), np.float64)
        numbers[...] = targets.reshape(numbers.shape)
        return numbers

    def gradient(self, outputs: Array) -> Array:
        """Return the array of the gradient."""
        return self._kept.array("gradient", outputs.shape)


_NO_WEIGHTS = np.empty(0)


def _weights(given: Array | None) -> Array:
    return _NO_WEIGHTS if given is None else np.ascontiguousarray(given, np.float64)


def _fits(outputs: Array, targets: Array) -> bool:
    """Return whether these are contiguous float32 outputs with an integer for each position."""
    is_float32 = outputs.dtype == np.float32 and outputs.flags.c_contiguous
    return is_float32 and targets.shape == outputs.shape[:-1] and targets.dtype.kind in "iu"


class CompiledSoftmaxCrossEntropy(SoftmaxCrossEntropy):
    """The same loss. Other arrays than those of a compiled network go to the definition, which also reports errors."""

    def __init__(self, loss: SoftmaxCrossEntropy) -> None:
        super().__init__(label_smoothing=loss.label_smoothing, class_weights=loss.class_weights)
        self._arrays, self._weights = _Arrays(), _weights(loss.class_weights)

    def forward(self, outputs: Array, targets: Array) -> float:
        if not _fits(outputs, targets):
            return super().forward(outputs, targets)
        gradient, (each, has_positions) = self._arrays.gradient(outputs), _positions(targets)
        K = outputs.shape[-1]
        are_labels, loss = softmax_cross_entropy(
            outputs.reshape(-1, K), self._arrays.labels(targets), each, has_positions, float(self.label_smoothing),
            self._weights, gradient.reshape(-1, K),
        )  # fmt: skip
        if not are_labels:
            return super().forward(outputs, targets)
        self.d_outputs = gradient
        return float(loss)

    def count_correct(self, outputs: Array, targets: Array) -> int:
        if not _fits(outputs, targets):
            return super().count_correct(outputs, targets)
        rows, each = outputs.reshape(-1, outputs.shape[-1]), _positions(targets)[0]
        return int(correct_predictions(rows, self._arrays.labels(targets), each))


def _positions(targets: Array) -> tuple[int, bool]:
    """Return the number of positions of a sample, and whether they are more than the sample itself."""
    return max(1, math.prod(targets.shape[1:])), targets.ndim > 1


class CompiledSigmoidCrossEntropy(SigmoidCrossEntropy):
    """The same loss; see `CompiledSoftmaxCrossEntropy`."""

    def __init__(self, loss: SigmoidCrossEntropy) -> None:
        super().__init__(class_weights=loss.class_weights)
        self._arrays, self._weights = _Arrays(), _weights(loss.class_weights)

    def forward(self, outputs: Array, targets: Array) -> float:
        if not _fits(outputs, targets) or outputs.shape[1:] != (1,):
            return super().forward(outputs, targets)
        gradient = self._arrays.gradient(outputs)
        labels = self._arrays.labels(targets)
        are_labels, loss = sigmoid_cross_entropy(outputs.reshape(-1), labels, self._weights, gradient.reshape(-1))
        if not are_labels:
            return super().forward(outputs, targets)
        self.d_outputs = gradient
        return float(loss)


class CompiledMeanSquaredError(MeanSquaredError):
    """The same loss; see `CompiledSoftmaxCrossEntropy`."""

    def __init__(self, loss: MeanSquaredError) -> None:
        super().__init__()
        self._arrays = _Arrays()

    def forward(self, outputs: Array, targets: Array) -> float:
        is_float32 = outputs.dtype == np.float32 and outputs.flags.c_contiguous
        if not is_float32 or targets.shape != outputs.shape:
            return super().forward(outputs, targets)
        self.d_outputs = self._arrays.gradient(outputs)
        numbers = self._arrays.numbers(targets)
        d_numbers = self.d_outputs.reshape(numbers.shape)
        return float(mean_squared_error(outputs.reshape(numbers.shape), numbers, d_numbers))


def compiled_loss(loss: LossFunction) -> LossFunction:
    """Return the compiled form of a loss; a loss of another class computes by itself."""
    if type(loss) is SoftmaxCrossEntropy:
        return CompiledSoftmaxCrossEntropy(loss)
    if type(loss) is SigmoidCrossEntropy:
        return CompiledSigmoidCrossEntropy(loss)
    if type(loss) is MeanSquaredError:
        return CompiledMeanSquaredError(loss)
    return loss
