"""Pooling over images kept as (N, H, W, C); see `windows` for the names of sizes."""
# ruff: noqa: ARG002  every layer's forward takes the same arguments, whether it needs them or not

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.layers import Array, Layer, Shape, show_shape
from distdl.nn.windows import Pair, pad, window_of, without_margin
from distdl.rng import Key


class MaxPool2d(Layer):
    """The maximum of each window and channel: (N, H, W, C) becomes (N, OH, OW, C).

    The gradient of a window goes to one winner, the first maximum in row-major order; ties are everywhere
    on images with blank areas. The stride is the size unless given; padding never wins. Where the stride
    does not divide, the rest is left out, as in PyTorch. Source: section 7.3.
    """

    def __init__(self, size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0) -> None:
        self.window = window_of("MaxPool2d", size, size if stride is None else stride, padding)
        kernel = self.window.kernel
        if self.window.padding[0] >= kernel[0] or self.window.padding[1] >= kernel[1]:
            raise UserError(
                f"MaxPool2d: padding {show_shape(self.window.padding)} given, expected less than the window "
                f"{show_shape(kernel)}; windows full of padding have no maximum"
            )
        stride = self.window.stride
        self.windows_overlap = stride[0] < kernel[0] or stride[1] < kernel[1]

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """The input must be an image (H, W, C), with padding no smaller than the window."""
        super().build(input_shape, dtype)
        return (*self.window.fitted_size(input_shape, "window"), input_shape[2])

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the maxima, (N, OH, OW, C)."""
        self.padded = pad(x, self.window.padding, self.workspace, fill=-np.inf)
        first, *others = self.window.placements(self.padded)
        self.y = self.workspace.array("y", first.shape)
        np.copyto(self.y, first)
        for seen in others:
            np.maximum(self.y, seen, out=self.y)
        return self.y

    def backward(self, dy: Array) -> Array:
        """Return the gradient by the input, (N, H, W, C): `dy` at the winners, 0 elsewhere."""
        waiting = self.workspace.array("waiting", dy.shape, dtype=np.bool_)  # windows without a winner so far
        wins = self.workspace.array("wins", dy.shape, dtype=np.bool_)
        share = self.workspace.array("share", dy.shape)
        d_padded = self.workspace.array("d_padded", self.padded.shape)
        waiting.fill(True)
        if self.windows_overlap:
            d_padded.fill(0)
        placements = zip(self.window.placements(self.padded), self.window.placements(d_padded), strict=True)
        for seen, d_seen in placements:
            np.equal(seen, self.y, out=wins)
            np.logical_and(wins, waiting, out=wins)
            np.logical_xor(waiting, wins, out=waiting)
            if self.windows_overlap:
                np.multiply(dy, wins, out=share)
                np.add(d_seen, share, out=d_seen)
            else:
                np.multiply(dy, wins, out=d_seen)
        return without_margin(d_padded, self.window.padding, self.workspace)

    def __str__(self) -> str:
        return f"MaxPool2d {self.window}"


class AvgPool2d(Layer):
    """The mean of each window and channel: (N, H, W, C) becomes (N, OH, OW, C).

    Padding counts as zeros that are part of the window, as in PyTorch. The stride is the size unless given. Where the
    stride does not divide, the rest is left out. Source: section 7.3.
    """

    def __init__(self, size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0) -> None:
        self.window = window_of("AvgPool2d", size, size if stride is None else stride, padding)

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """The input must be an image (H, W, C), with padding no smaller than the window."""
        super().build(input_shape, dtype)
        return (*self.window.fitted_size(input_shape, "window"), input_shape[2])

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the means, (N, OH, OW, C)."""
        padded = pad(x, self.window.padding, self.workspace)
        self.padded_shape = padded.shape
        first, *others = self.window.placements(padded)
        y = self.workspace.array("y", first.shape)
        np.copyto(y, first)
        for seen in others:
            np.add(y, seen, out=y)
        y *= 1 / math.prod(self.window.kernel)
        return y

    def backward(self, dy: Array) -> Array:
        """Return the gradient by the input, (N, H, W, C): an equal share of `dy` for each pixel of its window."""
        share = np.multiply(dy, 1 / math.prod(self.window.kernel), out=self.workspace.array("share", dy.shape))
        d_padded = self.workspace.array("d_padded", self.padded_shape)
        d_padded.fill(0)
        for d_seen in self.window.placements(d_padded):
            np.add(d_seen, share, out=d_seen)
        return without_margin(d_padded, self.window.padding, self.workspace)

    def __str__(self) -> str:
        return f"AvgPool2d {self.window}"


class GlobalAvgPool2d(Layer):
    """The mean of each channel over the whole image: (N, H, W, C) becomes (N, C). Source: Lin et al. 2014."""

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """The input must be an image (H, W, C)."""
        super().build(input_shape, dtype)
        if len(input_shape) != 3:
            raise UserError(f"input {show_shape(input_shape)} is not an image; expected height x width x channels")
        self.input_shape = input_shape
        return (input_shape[2],)

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the means, (N, C)."""
        return x.mean(axis=(1, 2), out=self.workspace.array("y", (len(x), x.shape[3])))

    def backward(self, dy: Array) -> Array:
        """Return the gradient by the input, (N, H, W, C)."""
        H, W, C = self.input_shape
        dx = self.workspace.array("dx", (len(dy), H, W, C))
        np.multiply(dy[:, None, None], 1 / (H * W), out=dx)
        return dx
