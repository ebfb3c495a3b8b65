"""Normalization inside of networks; images are (N, H, W, C)."""
# ruff: noqa: ARG002  every layer's forward takes the same arguments, whether it needs them or not

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.initializers import Constant, Zeros
from distdl.nn.layers import Array, BufferSpec, Layer, ParameterSpec, Shape, whole_number
from distdl.rng import Key

#: From this many numbers on, what NumPy does once a line of a matrix takes no time.
LONG_LINE = 512


class BatchNorm(Layer):
    """Batch normalization of each channel, or of each feature of flat inputs: any shape (..., C).

    In training ``y = gamma (x - mean) / sqrt(variance + epsilon) + beta`` with the moments of the micro-batch (of all
    its samples and pixels), so that the result does not depend on how many ranks share the batch. In evaluation the
    running moments take their place; once a step they become ``(1 - momentum) running + momentum batch``, with the mean
    and the unbiased variance of the whole batch, from the sums that the ranks add up. Gamma and beta do not decay.

    Sources: section 6.3; Ioffe and Szegedy 2015; Hoffer et al. 2017 ("ghost" batches). Momentum counts as in PyTorch.
    """

    def __init__(self, *, momentum: float = 0.1, epsilon: float = 1e-5) -> None:
        if not (0 < momentum <= 1 and epsilon > 0):
            raise UserError(
                f"BatchNorm: momentum {momentum}, epsilon {epsilon} given, expected a momentum above 0 and at most 1, "
                "and an epsilon above 0"
            )
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """Any input fits."""
        self.channels = input_shape[-1]
        pixels = input_shape[:-1]
        self.pixels = math.prod(pixels)
        self.pixels_in_line = next(
            (math.prod(pixels[i:]) for i in range(len(pixels), -1, -1) if math.prod(input_shape[i:]) >= LONG_LINE),
            self.pixels,
        )
        return super().build(input_shape, dtype)

    def _lines(self, x: Array) -> Array:
        """Return any (..., C) as a matrix of some pixels a line, because NumPy is slow with lines of few numbers."""
        return x.reshape(-1, self.pixels_in_line * self.channels)

    def _line(self, of_channels: Array) -> Array:
        """Return (C,) once for each pixel of a line."""
        return np.tile(of_channels, self.pixels_in_line)

    def parameter_specs(self) -> list[ParameterSpec]:
        """Return gamma, which begins as ones, and beta, as zeros, (C,) each."""
        shape = (self.channels,)
        return [
            ParameterSpec("gamma", shape, Constant(1.0), fan_in=1, decay=False),
            ParameterSpec("beta", shape, Zeros(), fan_in=1, decay=False),
        ]

    def buffer_specs(self) -> list[BufferSpec]:
        """Return the running moments, (C,) each, and the sums: of x and the count, and of x squared."""
        shape, C = (self.channels,), self.channels
        return [BufferSpec("mean", shape, 0.0, statistics=C + 1), BufferSpec("variance", shape, 1.0, statistics=C)]

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the normalized elements, any shape (..., C)."""
        rows = x.reshape(-1, self.channels)
        y = self.workspace.array("y", rows.shape)
        gamma, beta = self.parameters["gamma"], self.parameters["beta"]
        self.training = training
        if not training:
            self.inverse = 1 / np.sqrt(self.buffers["variance"] + self.epsilon)
            lines = self._lines(y)
            np.subtract(self._lines(rows), self._line(self.buffers["mean"]), out=lines)
            lines *= self._line(self.inverse * gamma)
            lines += self._line(beta)
            return y.reshape(x.shape)
        M = len(rows)
        ones = self.workspace.array("ones", (M,), fill=1)
        mean = np.matmul(ones, rows) / M
        centred = self.workspace.array("centred", rows.shape)
        np.subtract(self._lines(rows), self._line(mean), out=self._lines(centred))
        squares = np.multiply(centred, centred, out=y)
        variance = np.matmul(ones, squares) / M
        self._note(M, mean.astype(np.float64), variance.astype(np.float64))
        self.inverse = (1 / np.sqrt(variance + self.epsilon)).astype(rows.dtype, copy=False)
        lines = self._lines(centred)
        lines *= self._line(self.inverse)
        self.normalized = centred
        outputs = self._lines(y)
        np.multiply(lines, self._line(gamma), out=outputs)
        outputs += self._line(beta)
        return y.reshape(x.shape)

    def _note(self, M: int, mean: Array, variance: Array) -> None:
        """Write the micro-batch's sums, from which ranks find the moments of the batch."""
        self.statistics["mean"][:-1] = M * mean
        self.statistics["mean"][-1] = M
        self.statistics["variance"][:] = M * (variance + mean * mean)

    def update_buffers(self) -> None:
        """Move the running moments towards those of the batch, whose sums `statistics` hold."""
        sums, count = self.statistics["mean"][:-1], float(self.statistics["mean"][-1])
        if not count:
            return
        mean = sums / count
        variance = np.maximum(self.statistics["variance"] / count - mean * mean, 0) * (count / max(count - 1, 1))
        for name, moment in (("mean", mean), ("variance", variance)):
            running = self.buffers[name]
            running *= 1 - self.momentum
            running += (self.momentum * moment).astype(running.dtype)

    def backward(self, dy: Array) -> Array:
        """Set the gradients of gamma and beta; return that of the input, any shape (..., C)."""
        d = dy.reshape(-1, self.channels)
        M = len(d)
        gamma = self.parameters["gamma"]
        ones = self.workspace.array("ones", (M,), fill=1)
        dx = self.workspace.array("dx", d.shape)
        if not self.training:
            raise ValueError("BatchNorm has a gradient in training only: its running moments are no function of x")
        np.multiply(d, self.normalized, out=dx)
        np.matmul(ones, dx, out=self.gradients["gamma"])
        np.matmul(ones, d, out=self.gradients["beta"])
        # dx = gamma / sigma (dy - mean of dy - normalized x mean of (dy normalized x))
        lines = self._lines(dx)
        np.multiply(self._lines(self.normalized), self._line(self.gradients["gamma"] / M), out=lines)
        np.subtract(self._lines(d), lines, out=lines)
        lines -= self._line(self.gradients["beta"] / M)
        lines *= self._line(gamma * self.inverse)
        return dx.reshape(dy.shape)

    def __str__(self) -> str:
        return "BatchNorm"


class LocalResponseNorm(Layer):
    """Divide each element by a norm of its neighbours along the channels: AlexNet's local response normalization.

    ``y[c] = x[c] / (k + alpha / size * sum over the window of x[j]²)^beta``; the window of channel c reaches from
    ``c - size // 2`` to ``c + (size - 1) // 2``, cut off at both ends. (The paper multiplies alpha with the plain
    sum; here it is divided by the size first, as in PyTorch.) Any shape (..., C). Sources: section 7.7.2;
    Krizhevsky et al. 2012, section 3.3 of the paper.
    """

    def __init__(self, size: int = 5, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        self.size = whole_number("LocalResponseNorm", "size", size)
        if not all(math.isfinite(number) for number in (alpha, beta, k)):
            raise UserError(f"LocalResponseNorm: alpha {alpha}, beta {beta}, k {k} given, expected finite numbers")
        self.alpha, self.beta, self.k = alpha, beta, k

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the normalized elements, any shape (..., C)."""
        self.x = x
        squares = np.multiply(x, x, out=self.workspace.array("squares", x.shape))
        self.scale = self._summed(squares, "scale", before=self.size // 2, behind=(self.size - 1) // 2)
        self.scale *= self.alpha / self.size
        self.scale += self.k
        self.factor = np.power(self.scale, -self.beta, out=self.workspace.array("factor", x.shape))
        return np.multiply(x, self.factor, out=self.workspace.array("y", x.shape))

    def backward(self, dy: Array) -> Array:
        """Return ``dy f - 2 alpha beta / size x * sum over windows that hold the element of dy x f / scale``."""
        through = np.multiply(dy, self.x, out=self.workspace.array("through", dy.shape))
        through *= self.factor
        through /= self.scale
        dx = self._summed(through, "dx", before=(self.size - 1) // 2, behind=self.size // 2)
        dx *= self.x
        dx *= -2 * self.alpha * self.beta / self.size
        direct = np.multiply(dy, self.factor, out=through)
        dx += direct
        return dx

    def _summed(self, values: Array, name: str, *, before: int, behind: int) -> Array:
        """Return for each channel the sum over the channels from `before` in front of it to `behind` after it."""
        sums = self.workspace.array(name, values.shape)
        np.copyto(sums, values)
        C = values.shape[-1]
        for distance in range(1, min(before, C - 1) + 1):
            sums[..., distance:] += values[..., : C - distance]
        for distance in range(1, min(behind, C - 1) + 1):
            sums[..., : C - distance] += values[..., distance:]
        return sums

    def __str__(self) -> str:
        return f"LocalResponseNorm {self.size}"
