"""Convolution and max-pooling over images kept as (N, H, W, C).

N samples, H height and W width of the input, C channels, FN filters, FH and FW the kernel, OH and OW the
output; a stride is (SH, SW), a padding (PH, PW). ``OH = floor((H + 2 PH - FH) / SH) + 1``, and OW alike.

The idea (im2col, section 7.4): copy the patch of the image under every position of the kernel into one row
of a matrix (N * OH * OW, FH * FW * C). The convolution is then one product with the weights (FH * FW * C,
FN), and its result is already an image (N, OH, OW, FN) again. The matrix transposed on the other side gives
the weights' gradient. The input's gradient, for stride 1, is itself a convolution: of the padded output
gradient with the kernel turned by 180 degrees; for other strides the gradients of the patches are added
back to where they came from (col2im).
"""
# ruff: noqa: ARG002  every layer's forward takes the same arguments, whether it needs them or not

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.initializers import He, Initializer, Zeros
from distdl.nn.layers import Array, Layer, ParameterSpec, Product, Products, Shape, Workspace, show_shape
from distdl.rng import Key

Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution or a pooling: (FH, FW), (SH, SW) and (PH, PW)."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)

    def output_size(self, size: Pair) -> Pair:
        """Return (OH, OW) for an input of (H, W).

        >>> Window((2, 2), stride=(2, 2)).output_size((5, 8))
        (2, 4)
        """
        OH, OW = (
            (n + 2 * p - f) // s + 1 for n, f, s, p in zip(size, self.kernel, self.stride, self.padding, strict=True)
        )
        return OH, OW

    def fitted_size(self, input_shape: Shape, kind: str) -> Pair:
        """Return (OH, OW) for an input (H, W, C); raise `UserError` if it is no image, or one too small."""
        if len(input_shape) != 3:
            raise UserError(f"input {show_shape(input_shape)} is not an image; expected height x width x channels")
        output_size = self.output_size((input_shape[0], input_shape[1]))
        if min(output_size) < 1:
            padding = self.padding[0] if self.padding[0] == self.padding[1] else show_shape(self.padding)
            raise UserError(
                f"input {show_shape(input_shape)} is smaller than the {show_shape(self.kernel)} {kind} "
                f"(padding {padding}); use a larger image or a smaller {kind}, or drop layers in front"
            )
        return output_size

    def placements(self, padded: Array) -> Iterator[Array]:
        """Yield what each element of the kernel, in row-major order, sees of `padded`: (N, OH, OW, C)."""
        (FH, FW), (SH, SW) = self.kernel, self.stride
        OH, OW = Window(self.kernel, self.stride).output_size((padded.shape[1], padded.shape[2]))
        for i in range(FH):
            for j in range(FW):
                yield padded[:, i : i + SH * OH : SH, j : j + SW * OW : SW]

    def __str__(self) -> str:
        text = show_shape(self.kernel)
        for name, pair, usual in (("stride", self.stride, 1), ("padding", self.padding, 0)):
            if pair != (usual, usual):
                text += f" {name} {pair[0] if pair[0] == pair[1] else show_shape(pair)}"
        return text


def pad(x: Array, padding: Pair, workspace: Workspace, *, fill: float = 0) -> Array:
    """Return images (N, H, W, C) with a margin of `fill` around them: (N, H + 2 PH, W + 2 PW, C).

    A negative padding cuts a margin off.
    """
    if padding == (0, 0):
        return x
    N, H, W, C = x.shape
    PH, PW = padding
    padded = workspace.array(f"padded {padding}", (N, H + 2 * PH, W + 2 * PW, C), fill=fill)
    padded[:, _inside(H + 2 * PH, PH), _inside(W + 2 * PW, PW)] = x[:, _inside(H, -PH), _inside(W, -PW)]
    return padded


def _inside(size: int, margin: int) -> slice:
    """Return what a margin, if there is one, leaves of an axis."""
    return slice(margin, size - margin) if margin > 0 else slice(None)


def patches(x: Array, window: Window, workspace: Workspace | None = None) -> Array:
    """Return the patches of images (N, H, W, C) as the rows of a matrix (N * OH * OW, FH * FW * C).

    This is the book's im2col (section 7.4.3), except that channels come last within a row. With a workspace,
    the matrix is a buffer of it.

    >>> patches(np.ones((1, 7, 7, 3)), Window((5, 5))).shape
    (9, 75)
    """
    workspace = workspace or Workspace(x.dtype)
    padded = pad(x, window.padding, workspace)
    SH, SW = window.stride
    view = sliding_window_view(padded, window.kernel, axis=(1, 2))[:, ::SH, ::SW]
    view = view.transpose(0, 1, 2, 4, 5, 3)  # N, OH, OW, FH, FW, C
    N, OH, OW, FH, FW, C = view.shape
    matrix = workspace.array("patches", (N * OH * OW, FH * FW * C))
    np.copyto(matrix.reshape(view.shape), view)
    return matrix


def patches_adjoint(d: Array, size: Pair, window: Window, workspace: Workspace | None = None) -> Array:
    """Return images (N, H, W, C), each pixel the sum of the elements of `d` that `patches` copies it to.

    `d` is (N * OH * OW, FH * FW * C), `size` is (H, W). The adjoint of `patches`: ``<patches(x), d>`` equals
    ``<x, patches_adjoint(d)>``. The book's col2im. With a workspace, the result is a buffer of it.
    """
    workspace = workspace or Workspace(d.dtype)
    (H, W), (FH, FW), (PH, PW) = size, window.kernel, window.padding
    OH, OW = window.output_size(size)
    d = d.reshape(-1, OH, OW, FH * FW, d.shape[1] // (FH * FW))
    N, C = d.shape[0], d.shape[-1]
    padded = workspace.array("sums", (N, H + 2 * PH, W + 2 * PW, C))
    padded.fill(0)
    for k, seen in enumerate(window.placements(padded)):
        np.add(seen, d[:, :, :, k], out=seen)
    return _without_margin(padded, window.padding, workspace)


def _without_margin(padded: Array, padding: Pair, workspace: Workspace) -> Array:
    """Return what `pad` was given, as a buffer of the workspace."""
    if padding == (0, 0):
        return padded
    (PH, PW), (H, W) = padding, padded.shape[1:3]
    inner = padded[:, _inside(H, PH), _inside(W, PW)]
    x = workspace.array("inner", inner.shape)
    np.copyto(x, inner)
    return x


class Conv2d(Layer):
    """Convolution: the dot product of each filter with each patch of the image, plus a bias.

    ``y[n, i, j, f] = b[f] + sum over h, w, c of x[n, i SH + h - PH, j SW + w - PW, c] weight[h, w, c, f]``

    x is (N, H, W, C), the weight (FH, FW, C, FN), the bias (FN,), y is (N, OH, OW, FN). Kernel, stride and
    padding are one number or a pair (height, width). Where the stride does not divide, the rest is left
    out, as in PyTorch. Source: sections 7.2 and 7.4.
    """

    def __init__(
        self,
        filters: int,
        kernel: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        initializer: Initializer | None = None,
    ) -> None:
        if filters < 1:
            raise UserError(f"Conv2d: {filters} filters given, expected at least 1")
        self.filters = filters
        self.window = _window("Conv2d", kernel, stride, padding)
        self.initializer = initializer or He()

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """The input must be an image (H, W, C), with padding no smaller than the kernel."""
        super().build(input_shape, dtype)
        self.output_size = self.window.fitted_size(input_shape, "kernel")
        H, W, C = input_shape
        self.size, self.channels = (H, W), C
        self.backward_workspace = Workspace(dtype)
        return (*self.output_size, self.filters)

    def parameter_specs(self) -> list[ParameterSpec]:
        """Return weight (FH, FW, C, FN) and bias (FN,)."""
        FH, FW = self.window.kernel
        C, FN = self.channels, self.filters
        return [
            ParameterSpec("weight", (FH, FW, C, FN), self.initializer, fan_in=FH * FW * C),
            ParameterSpec("bias", (FN,), Zeros(), fan_in=FH * FW * C, decay=False),
        ]

    def products(self, samples: int) -> Products:
        """Return those of the plain form: patches times weights; for each gradient as many operations."""
        (OH, OW), (FH, FW), C, FN = self.output_size, self.window.kernel, self.channels, self.filters
        rows, patch = samples * OH * OW, FH * FW * C
        dx = (Product(rows, FN, patch),) if self.needs_input_gradient else ()
        return Products(forward=(Product(rows, patch, FN),), backward=(Product(patch, rows, FN), *dx))

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        """Return the filtered images, (N, OH, OW, FN)."""
        self.patches = patches(x, self.window, self.workspace)
        weight = self.parameters["weight"].reshape(-1, self.filters)  # FH * FW * C, FN
        y = self.workspace.array("y", (len(self.patches), self.filters))
        np.matmul(self.patches, weight, out=y)
        y += self.parameters["bias"]
        return y.reshape(len(x), *self.output_size, self.filters)

    def backward(self, dy: Array) -> Array | None:
        """Set the gradients of weight and bias; return that of the input, (N, H, W, C)."""
        d = dy.reshape(-1, self.filters)  # N * OH * OW, FN
        np.matmul(self.patches.T, d, out=self.gradients["weight"].reshape(-1, self.filters))
        ones = self.workspace.array("ones", (len(d),), fill=1)
        np.matmul(ones, d, out=self.gradients["bias"])
        if not self.needs_input_gradient:
            return None
        return self._turned_convolution(dy) if self.window.stride == (1, 1) else self._scattered(d)

    def _turned_convolution(self, dy: Array) -> Array:
        """Return the input's gradient for stride 1: patches of the padded dy times the turned kernel."""
        (FH, FW), (PH, PW) = self.window.kernel, self.window.padding
        around = Window((FH, FW), padding=(FH - 1 - PH, FW - 1 - PW))
        d_patches = patches(dy, around, self.backward_workspace)  # N * H * W, FH * FW * FN
        turned = self.workspace.array("turned", (FH, FW, self.filters, self.channels))
        np.copyto(turned, self.parameters["weight"][::-1, ::-1].swapaxes(2, 3))
        dx = self.workspace.array("dx", (len(d_patches), self.channels))
        np.matmul(d_patches, turned.reshape(-1, self.channels), out=dx)
        return dx.reshape(len(dy), *self.size, self.channels)

    def _scattered(self, d: Array) -> Array:
        """Return the input's gradient for any stride: gradients of the patches, added back."""
        weight = self.parameters["weight"].reshape(-1, self.filters)
        d_patches = self.backward_workspace.array("patches", self.patches.shape)
        np.matmul(d, weight.T, out=d_patches)
        return patches_adjoint(d_patches, self.size, self.window, self.backward_workspace)

    def __str__(self) -> str:
        return f"Conv2d {self.filters}@{self.window}"


class MaxPool2d(Layer):
    """The maximum of each window and channel: (N, H, W, C) becomes (N, OH, OW, C).

    The gradient of a window goes to one winner, the first maximum in row-major order; ties are everywhere
    on images with blank areas. The stride is the size unless given; padding never wins. Where the stride
    does not divide, the rest is left out, as in PyTorch. Source: section 7.3.
    """

    def __init__(self, size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0) -> None:
        self.window = _window("MaxPool2d", size, size if stride is None else stride, padding)
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
        return _without_margin(d_padded, self.window.padding, self.workspace)

    def __str__(self) -> str:
        return f"MaxPool2d {self.window}"


def _window(kind: str, kernel: int | Pair, stride: int | Pair, padding: int | Pair) -> Window:
    """Return the window of a layer; raise `UserError` if its numbers make no sense."""
    pairs = []
    for name, given, least in (("size", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        pair = (given, given) if isinstance(given, int) else tuple(given)
        if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
            raise UserError(f"{kind}: {name} {given!r} given, expected one or two whole numbers from {least} on")
        pairs.append((pair[0], pair[1]))
    return Window(*pairs)
