"""Normalization layers; images are (N, H, W, C)."""

import math

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.arguments import whole_number
from distdl.nn.initializers import Constant, Zeros
from distdl.nn.layers import Array, BufferSpec, Layer, ParameterSpec, Shape, sum_rows
from distdl.rng import Key

#: From this length on, NumPy's overhead per line of a matrix is negligible.
LONG_LINE = 512


class BatchNorm(Layer):
    """Batch normalization of each channel, or of each feature of flat inputs: any shape (..., C).

    In training ``y = gamma (x - mean) / sqrt(variance + epsilon) + beta``, with the moments over all samples and pixels
    of the micro-batch. So the result does not depend on the number of ranks that share the batch. Evaluation uses the
    running moments instead. Once per step these become ``(1 - momentum) running + momentum batch``, with the mean and
    the unbiased variance of the whole batch, from the sums that the ranks add up. Gamma and beta do not decay.

    A single number is its own mean. So a micro-batch with one number per channel becomes beta, and a batch with one
    does not change the running moments.

    Sources: section 6.3; Ioffe and Szegedy 2015; Hoffer et al. 2017 ("ghost" batches). Momentum is as in PyTorch.
    """

    def __init__(self, *, momentum: float = 0.1, epsilon: float = 1e-5) -> None:
        if not (0 < momentum <= 1 and epsilon > 0):
            raise UserError(
                f"BatchNorm: momentum {momentum}, epsilon {epsilon} given, expected a momentum above 0 and at most 1, "
                "and an epsilon above 0"
            )
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        *pixels, self.channels = input_shape
        self.pixels = math.prod(pixels)
        self.pixels_in_line = next(
            (math.prod(pixels[i:]) for i in range(len(pixels), -1, -1) if math.prod(input_shape[i:]) >= LONG_LINE),
            self.pixels,
        )
        return super().build(input_shape, dtype)

    def _lines(self, x: Array) -> Array:
        """Return any (..., C) as a matrix with some pixels per line: NumPy is slow with short lines."""
        return x.reshape(-1, self.pixels_in_line * self.channels)

    def _line(self, of_channels: Array) -> Array:
        """Return (C,) once for each pixel of a line."""
        return np.tile(of_channels, self.pixels_in_line)

    def parameter_specs(self) -> list[ParameterSpec]:
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
        rows = x.reshape(-1, self.channels)
        y = self.workspace.array("y", rows.shape)
        gamma, beta = self.parameters["gamma"], self.parameters["beta"]
        self.training = training
        if not training:
            inverse = 1 / np.sqrt(self.buffers["variance"] + self.epsilon)
            lines = self._lines(y)
            np.subtract(self._lines(rows), self._line(self.buffers["mean"]), out=lines)
            lines *= self._line(inverse * gamma)
            lines += self._line(beta)
            return y.reshape(x.shape)
        M = len(rows)
        ones = self.workspace.array("ones", (M,), fill=1)
        mean = np.matmul(ones, rows) / M
        centred = self.workspace.array("centred", rows.shape)
        np.subtract(self._lines(rows), self._line(mean), out=self._lines(centred))
        squares = np.multiply(centred, centred, out=y)
        variance = np.matmul(ones, squares) / M
        # The micro-batch's sums, from which ranks compute the moments of the batch.
        mean64, variance64 = mean.astype(np.float64), variance.astype(np.float64)
        self.statistics["mean"][:-1], self.statistics["mean"][-1] = M * mean64, M
        self.statistics["variance"][:] = M * (variance64 + mean64 * mean64)
        self.inverse = (1 / np.sqrt(variance + self.epsilon)).astype(rows.dtype, copy=False)
        lines = self._lines(centred)
        lines *= self._line(self.inverse)
        self.normalized = centred
        outputs = self._lines(y)
        np.multiply(lines, self._line(gamma), out=outputs)
        outputs += self._line(beta)
        return y.reshape(x.shape)

    def update_buffers(self) -> None:
        """Move the running moments towards those of the batch, whose sums are in `statistics`."""
        sums, count = self.statistics["mean"][:-1], float(self.statistics["mean"][-1])
        if count < 2:
            return
        mean = sums / count
        variance = np.maximum(self.statistics["variance"] / count - mean * mean, 0) * (count / (count - 1))
        for name, moment in (("mean", mean), ("variance", variance)):
            running = self.buffers[name]
            running *= 1 - self.momentum
            running += (self.momentum * moment).astype(running.dtype)

    def backward(self, dy: Array) -> Array:
        """Set the gradients of gamma and beta; return that of the input, any shape (..., C).

        ``dx = gamma / sigma (dy - mean of dy - normalized x mean of (dy normalized x))``. Raises `ValueError` after a
        `forward` in evaluation.
        """
        if not self.training:
            raise ValueError("BatchNorm: backward follows a forward in evaluation; call forward with training=True")
        d = dy.reshape(-1, self.channels)
        M = len(d)
        dx = self.workspace.array("dx", d.shape)
        np.multiply(d, self.normalized, out=dx)
        sum_rows(dx, self.workspace, out=self.gradients["gamma"])
        sum_rows(d, self.workspace, out=self.gradients["beta"])
        lines = self._lines(dx)
        np.multiply(self._lines(self.normalized), self._line(self.gradients["gamma"] / M), out=lines)
        np.subtract(self._lines(d), lines, out=lines)
        lines -= self._line(self.gradients["beta"] / M)
        lines *= self._line(self.parameters["gamma"] * self.inverse)
        return dx.reshape(dy.shape)


class LocalResponseNorm(Layer):
    """Divide each element by a norm of its neighbours along the channels: AlexNet's local response normalization.

    ``y[c] = x[c] / (k + alpha / size * sum over the window of x[j]²)^beta``. The window of channel c reaches from
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
        self.x = x
        squares = np.multiply(x, x, out=self.workspace.array("squares", x.shape))
        self.scale = self._window_sums(squares, "scale", before=self.size // 2, after=(self.size - 1) // 2)
        self.scale *= self.alpha / self.size
        self.scale += self.k
        self.factor = np.power(self.scale, -self.beta, out=self.workspace.array("factor", x.shape))
        return np.multiply(x, self.factor, out=self.workspace.array("y", x.shape))

    def backward(self, dy: Array) -> Array:
        """Return ``dy f - 2 alpha beta / size x * sum over the windows with this element of dy x f / scale``."""
        through = np.multiply(dy, self.x, out=self.workspace.array("through", dy.shape))
        through *= self.factor
        through /= self.scale
        dx = self._window_sums(through, "dx", before=(self.size - 1) // 2, after=self.size // 2)
        dx *= self.x
        dx *= -2 * self.alpha * self.beta / self.size
        direct = np.multiply(dy, self.factor, out=through)
        dx += direct
        return dx

    def _window_sums(self, values: Array, name: str, *, before: int, after: int) -> Array:
        """Return for each channel the sum over it, the `before` channels in front and the `after` channels after it."""
        sums = self.workspace.array(name, values.shape)
        np.copyto(sums, values)
        C = values.shape[-1]
        for distance in range(1, min(before, C - 1) + 1):
            sums[..., distance:] += values[..., : C - distance]
        for distance in range(1, min(after, C - 1) + 1):
            sums[..., : C - distance] += values[..., distance:]
        return sums

    def __str__(self) -> str:
        return f"LocalResponseNorm {self.size}"
