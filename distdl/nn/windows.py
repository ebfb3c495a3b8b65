"""Windows over images (N, H, W, C): their geometry, the margin around an image, and patches as a matrix.

N samples, H height and W width of the input, C channels, FH and FW the window, OH and OW the output; a stride is
(SH, SW), a padding (PH, PW). ``OH = floor((H + 2 PH - FH) / SH) + 1``; OW is alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from distdl.errors import TooSmallError, UserError
from distdl.nn.arguments import as_whole, image_shape, show_shape
from distdl.nn.layers import Array, Shape, Workspace

Pair: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution or a pooling: (FH, FW), (SH, SW) and (PH, PW). Source: section 7.2."""

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
        """Return (OH, OW) for an input (H, W, C); raise `UserError` if it is not an image, or too small."""
        H, W, _ = image_shape(input_shape)
        output_size = self.output_size((H, W))
        if min(output_size) < 1:
            padding = self.padding[0] if self.padding[0] == self.padding[1] else show_shape(self.padding)
            raise TooSmallError(
                f"input {show_shape(input_shape)} is smaller than the {show_shape(self.kernel)} {kind} "
                f"(padding {padding}); use a larger image or a smaller {kind}, or drop layers in front"
            )
        return output_size

    def placements(self, padded: Array) -> Iterator[Array]:
        """Yield for each kernel element, in row-major order, the pixels of `padded` under it: (N, OH, OW, C)."""
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
    """Return images (N, H, W, C) with a margin of `fill`: (N, H + 2 PH, W + 2 PW, C); negative padding crops them."""
    if padding == (0, 0):
        return x
    N, H, W, C = x.shape
    PH, PW = padding
    padded = workspace.array(f"padded {padding}", (N, H + 2 * PH, W + 2 * PW, C), fill=fill)
    padded[:, _inside(H + 2 * PH, PH), _inside(W + 2 * PW, PW)] = x[:, _inside(H, -PH), _inside(W, -PW)]
    return padded


def _inside(size: int, margin: int) -> slice:
    """Return the part of an axis inside its margin, or the whole axis if the margin is not positive."""
    return slice(margin, size - margin) if margin > 0 else slice(None)


def patches(x: Array, window: Window, workspace: Workspace | None = None) -> Array:
    """Return the patches of images (N, H, W, C) as the rows of a matrix (N * OH * OW, FH * FW * C).

    This is the book's im2col (section 7.4.3), except that channels come last within a row. If a workspace is given,
    the matrix is one of its arrays. A window of one pixel needs no copy: the matrix is then a view of `x`.

    >>> patches(np.ones((1, 7, 7, 3)), Window((5, 5))).shape
    (9, 75)
    """
    if window == Window((1, 1)):
        return x.reshape(-1, x.shape[3])
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
    """Return images (N, H, W, C); each pixel is the sum of the elements of `d` to which `patches` copies it.

    `d` is (N * OH * OW, FH * FW * C), `size` is (H, W). This is the adjoint of `patches`, ``<patches(x), d>`` equals
    ``<x, patches_adjoint(d)>``, and the book's col2im (section 7.4.3). If a workspace is given, the result is one of
    its arrays.
    """
    workspace = workspace or Workspace(d.dtype)
    (H, W), (FH, FW), (PH, PW) = size, window.kernel, window.padding
    OH, OW = window.output_size(size)
    d = d.reshape(-1, OH, OW, FH * FW, d.shape[1] // (FH * FW))
    N, C = d.shape[0], d.shape[-1]
    padded = workspace.array("sums", (N, H + 2 * PH, W + 2 * PW, C))
    padded.fill(0)
    for k, pixels in enumerate(window.placements(padded)):
        np.add(pixels, d[:, :, :, k], out=pixels)
    return without_margin(padded, window.padding, workspace)


def without_margin(padded: Array, padding: Pair, workspace: Workspace) -> Array:
    """Return the images inside the margin of `pad`, as an array of the workspace."""
    if padding == (0, 0):
        return padded
    (PH, PW), (H, W) = padding, padded.shape[1:3]
    inner = padded[:, _inside(H, PH), _inside(W, PW)]
    x = workspace.array("inner", inner.shape)
    np.copyto(x, inner)
    return x


def window_of(kind: str, kernel: int | Pair, stride: int | Pair, padding: int | Pair) -> Window:
    """Return the window of a layer; raise `UserError` if its numbers are invalid."""
    pairs = []
    for name, given, least in (("size", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        try:
            pair = [as_whole(n, least) for n in given]  # type: ignore[union-attr]
        except TypeError:  # a single number
            pair = [as_whole(given, least)] * 2
        if len(pair) != 2 or pair[0] is None or pair[1] is None:
            raise UserError(f"{kind}: {name} {given!r} given, expected one or two whole numbers of at least {least}")
        pairs.append((pair[0], pair[1]))
    return Window(*pairs)
