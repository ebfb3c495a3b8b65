"""Pooling over images (N, H, W, C); see `windows` for the names of sizes."""

import math

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.arguments import image_shape, show_shape
from distdl.nn.layers import Array, Layer, Shape
from distdl.nn.windows import Pair, pad, window_of, without_margin
from distdl.rng import Key


class _Pool2d(Layer):
    """Pooling with a window; the stride is the size unless given."""

    def __init__(self, size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0) -> None:
        self.window = window_of(type(self).__name__, size, size if stride is None else stride, padding)

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """Accept an image (H, W, C) that, with its padding, is at least as large as the window."""
        super().build(input_shape, dtype)
        return (*self.window.fitted_size(input_shape, "window"), input_shape[2])

    def _combined(self, padded: Array, combine: np.ufunc) -> Array:
        """Return the elements of each window combined in row-major order, (N, OH, OW, C)."""
        first, *others = self.window.placements(padded)
        y = self.workspace.array("y", first.shape)
        np.copyto(y, first)
        for pixels in others:
            combine(y, pixels, out=y)
        return y

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.window}"


class MaxPool2d(_Pool2d):
    """The maximum of each window and channel: (N, H, W, C) becomes (N, OH, OW, C).

    The gradient of a window goes to one winner, the first maximum in row-major order; images with blank areas have
    many ties. The stride is the size unless given; padding never wins. If the stride does not divide the size,
    the rest of the image is ignored, as in PyTorch. Source: section 7.3.
    """

    def __init__(self, size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0) -> None:
        super().__init__(size, stride, padding)
        (FH, FW), (SH, SW), (PH, PW) = self.window.kernel, self.window.stride, self.window.padding
        if PH >= FH or PW >= FW:
            raise UserError(
                f"MaxPool2d: padding {show_shape(self.window.padding)} given, expected less than the window "
                f"{show_shape(self.window.kernel)}; windows full of padding have no maximum"
            )
        self.windows_overlap = SH < FH or SW < FW

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.padded = pad(x, self.window.padding, self.workspace, fill=-np.inf)
        self.y = self._combined(self.padded, np.maximum)
        return self.y

    def backward(self, dy: Array) -> Array:
        waiting = self.workspace.array("waiting", dy.shape, dtype=np.bool_)  # windows without a winner so far
        wins = self.workspace.array("wins", dy.shape, dtype=np.bool_)
        share = self.workspace.array("share", dy.shape)
        d_padded = self.workspace.array("d_padded", self.padded.shape)
        waiting.fill(True)
        if self.windows_overlap:
            d_padded.fill(0)
        placements = zip(self.window.placements(self.padded), self.window.placements(d_padded), strict=True)
        for pixels, d_pixels in placements:
            np.equal(pixels, self.y, out=wins)
            np.logical_and(wins, waiting, out=wins)
            np.logical_xor(waiting, wins, out=waiting)
            if self.windows_overlap:
                np.multiply(dy, wins, out=share)
                np.add(d_pixels, share, out=d_pixels)
            else:
                np.multiply(dy, wins, out=d_pixels)
        return without_margin(d_padded, self.window.padding, self.workspace)


class AvgPool2d(_Pool2d):
    """The mean of each window and channel: (N, H, W, C) becomes (N, OH, OW, C).

    Padding counts as zeros that belong to the window, as in PyTorch. The stride is the size unless given. If the stride
    does not divide the size, the rest of the image is ignored. Source: section 7.3.
    """

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        padded = pad(x, self.window.padding, self.workspace)
        self.padded_shape = padded.shape
        y = self._combined(padded, np.add)
        y *= 1 / math.prod(self.window.kernel)
        return y

    def backward(self, dy: Array) -> Array:
        share = np.multiply(dy, 1 / math.prod(self.window.kernel), out=self.workspace.array("share", dy.shape))
        d_padded = self.workspace.array("d_padded", self.padded_shape)
        d_padded.fill(0)
        for d_pixels in self.window.placements(d_padded):
            np.add(d_pixels, share, out=d_pixels)
        return without_margin(d_padded, self.window.padding, self.workspace)


class GlobalAvgPool2d(Layer):
    """The mean of each channel over the whole image: (N, H, W, C) becomes (N, C). Source: Lin et al. 2014."""

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        self.input_shape = image_shape(super().build(input_shape, dtype))
        return (input_shape[2],)

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        return x.mean(axis=(1, 2), out=self.workspace.array("y", (len(x), x.shape[3])))

    def backward(self, dy: Array) -> Array:
        H, W, C = self.input_shape
        dx = self.workspace.array("dx", (len(dy), H, W, C))
        np.multiply(dy[:, None, None], 1 / (H * W), out=dx)
        return dx
