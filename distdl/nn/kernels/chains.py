"""The NumPy form of convolutional parts: blocks of convolution, ReLU and 2x2 max-pooling, connected in chains.

The plain layers copy every patch and walk over every activation several times. A block computes the same with less
work and in long contiguous runs. It writes its output in the layout that the next block reads.

Layout: inside a chain an image is four *parity planes*. Pixel (2i + a, 2j + b) of the padded image is in
``planes[a, b, i, j]``, an array (2, 2, TH, TW, N, C). So every second row or column is a contiguous run, and a 2x2
window is one element of each plane. The four views of an image by parity are its *quarters*. Blocks read and write each
other's quarters. NHWC arrays have quarters too, so the layout changes during copies that are needed anyway.

The shape alone chooses between two algorithms:

- `WinogradBlock`, 3x3 with stride 1: F(2x2, 3x3) of Lavin and Gray, *Fast algorithms for convolutional neural
  networks*, 2016. It computes each 2x2 tile of the output from a 4x4 tile of the input by 16 products instead of 36.
- `PatchBlock`, the first layer, any kernel with stride 1: patches as a matrix (K, M) with one row per kernel element,
  not (M, K). With few channels this gives long runs. The first layer never needs an input gradient.

N samples of a tile, C channels, F filters, FH and FW the kernel, OH and OW the convolution's output, TH and TW the 2x2
tiles of this output along its axes, PH and PW the padding or the pooled output, K = FH FW C.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from distdl.nn.activations import ReLU
from distdl.nn.convolution import Conv2d
from distdl.nn.kernels.fused_layers import Elements, FusedLayers
from distdl.nn.layers import Array, Layer, Products, Watch, Workspace
from distdl.nn.pooling import MaxPool2d
from distdl.nn.windows import Window
from distdl.rng import Key

Parity: TypeAlias = tuple[int, int]
PARITIES: tuple[Parity, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))

Quarters: TypeAlias = dict[Parity, Array]
"""Four views (rows, columns, N, C) of an image, by the parity of row and column."""

#: The transform G of the kernel along one axis, and of both axes at once.
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_GG = np.einsum("ia,jb->ijab", _G, _G).reshape(16, 9)

#: A tile's working set should stay in the caches of one core.
TILE_BYTES = 2**22
LARGEST_TILE = 16
#: From this number of channels on, Winograd is faster than patches for a first layer of 3x3.
FEW_CHANNELS = 8
#: Floats in two of the widest vector registers: OpenBLAS is fastest if a product's width is a multiple of it.
BLAS_WIDTH = 16
MOST_LANES_PER_FILTER = 9 / 8


def quarters_of(image: Array) -> Quarters:
    """Return the quarters of an image whose first two axes are rows and columns."""
    return {(a, b): image[a::2, b::2] for a, b in PARITIES}


def quarters_of_nhwc(images: Array) -> Quarters:
    """Return the quarters of images (N, H, W, C)."""
    return quarters_of(images.transpose(1, 2, 0, 3))


class Block(ABC):
    """A convolution, with the ReLU and the 2x2 max-pooling that follow it, if any.

    One block processes all tiles of a micro-batch. Each tile has a workspace for the arrays that `backward` reads.
    The block sums the weight gradients over the tiles; `finish` writes them to the layer.
    """

    bias_after_pooling = False
    """Whether `_products` leaves the bias out if pooling follows: adding it later is a quarter of the work."""

    def __init__(self, conv: Conv2d, name: str, *, relu: bool, pool: bool) -> None:
        self.conv, self.name, self.relu, self.pool = conv, name, relu, pool
        (self.H, self.W), (self.OH, self.OW) = conv.size, conv.output_size
        self.C, self.F, self.K = conv.channels, conv.filters, conv.parameters["weight"].size // conv.filters
        self.lanes = self._lanes()
        self.TH, self.TW = -(-self.OH // 2), -(-self.OW // 2)
        self.output_size = (self.OH // 2, self.OW // 2) if pool else (self.OH, self.OW)
        self.dtype = conv.parameters["weight"].dtype
        self._own = Workspace(self.dtype)
        self._views: dict[tuple[Workspace, int], list[tuple[Array, Array]]] = {}
        self._tiles_summed = 0
        self.has_large_weights = self.weight_bytes > TILE_BYTES

    @property
    @abstractmethod
    def bytes_per_sample(self) -> int:
        """The working set of one sample."""

    @property
    def weight_bytes(self) -> int:
        """The weights in the form that each tile reads, if they may be larger than a tile."""
        return 0

    def _lanes(self) -> int:
        """Return the number of filters that the planes hold; those beyond F are zero and never leave the block."""
        return self.F

    @abstractmethod
    def prepare(self) -> None:
        """Derive data from the weights that all tiles use."""

    @abstractmethod
    def input_quarters(self, tile: Workspace, N: int) -> Quarters:
        """Return the quarters to which the input image is written."""

    def gradient_quarters(self, tile: Workspace, N: int) -> Quarters:
        """Return the quarters in which `backward` leaves the gradient with respect to the input image."""
        raise NotImplementedError

    @abstractmethod
    def _products(self, tile: Workspace, N: int, y: Array) -> None:
        """Compute the convolution's output with its bias, as parity planes `y` (2, 2, TH, TW, N, lanes)."""

    @abstractmethod
    def _gradients(self, tile: Workspace, N: int) -> None:
        """Compute the gradients from the output gradient in `_dy`."""

    @abstractmethod
    def _dy(self, tile: Workspace, N: int) -> Array:
        """Return the array for the gradient with respect to the convolution's output, (2, 2, TH, TW, N, lanes)."""

    @abstractmethod
    def finish(self) -> None:
        """Write the gradients of weight and bias, summed over the tiles."""

    def forward(self, tile: Workspace, N: int, output: Quarters) -> None:
        """Compute the block's output from the image in `input_quarters`."""
        y = self._y(tile, N)
        self._products(tile, N, y)
        if not self.pool:
            for parity in PARITIES:
                self._activate(self._valid(y, parity), output[parity])
            return
        h, p = self._maxima(tile, N)
        valid = self._pooled(y)
        np.maximum(valid[:, 0], valid[:, 1], out=h)
        np.maximum(h[0], h[1], out=p)
        if self.bias_after_pooling and self.conv.bias:
            p += self._bias(N)
        self._activate(p, p)
        _copy(quarters_of(p[..., : self.F]), output)

    def backward(self, tile: Workspace, N: int, d_output: Quarters) -> None:
        """Add to the weights' gradients, and leave the input gradient in `gradient_quarters`."""
        y, dy = self._y(tile, N), self._dy(tile, N)
        if self.pool:
            self._unpool(tile, N, d_output, y, dy)
        else:
            for parity in PARITIES:
                self._pass_gradient(self._valid(y, parity), d_output[parity], self._valid(dy, parity))
        self._gradients(tile, N)
        self._tiles_summed += 1

    def __str__(self) -> str:
        return f"{self.conv}{' + ReLU' * self.relu}{' + MaxPool2d 2x2' * self.pool} ({type(self).__name__})"

    def _unpool(self, tile: Workspace, N: int, d_output: Quarters, y: Array, dy: Array) -> None:
        """Give the gradient of each window to its first maximum: the first row with it, and its first pixel there."""
        h, p = self._maxima(tile, N)
        d = self._own.array("d", p.shape)
        maxima, d_maxima = quarters_of(p), quarters_of(d)
        for parity in PARITIES:
            self._pass_gradient(maxima[parity], d_output[parity], d_maxima[parity])
        dh = self._own.array("dh", h.shape)
        wins = self._own.array("wins", p.shape, dtype=np.bool_)
        np.greater_equal(h[0], h[1], out=wins)
        np.multiply(d, wins, out=dh[0])
        np.subtract(d, dh[0], out=dh[1])
        valid, d_valid = self._pooled(y), self._pooled(dy)
        both_win = self._own.array("both_win", h.shape, dtype=np.bool_)
        np.greater_equal(valid[:, 0], valid[:, 1], out=both_win)
        np.multiply(dh, both_win, out=d_valid[:, 0])
        np.subtract(dh, d_valid[:, 0], out=d_valid[:, 1])

    def _activate(self, y: Array, output: Array) -> None:
        y = y[..., : output.shape[-1]]
        if self.relu:
            np.maximum(y, self._own.array("zeros", y.shape), out=output)  # five times as fast as with the number 0
        elif output is not y:
            np.copyto(output, y)

    def _pass_gradient(self, y: Array, d_output: Array, dy: Array) -> None:
        """Write the gradient before the ReLU; the sign of the ReLU's input is that of `y`."""
        if self.lanes > self.F:
            np.copyto(dy[..., : self.F], d_output)
            d_output = dy  # long runs from here on
        if not self.relu:
            np.copyto(dy, d_output)
            return
        positive = self._own.array("positive", y.shape, dtype=np.bool_)
        np.greater(y, 0, out=positive)
        np.multiply(d_output, positive, out=dy)

    def _bias(self, N: int) -> Array:
        """Return the bias once per sample, (N, F): longer runs to add than F alone."""
        bias = self._own.array("bias", (N, self.F))
        np.copyto(bias, self.conv.parameters["bias"])
        return bias

    def _y(self, tile: Workspace, N: int) -> Array:
        return tile.array(f"y {id(self)}", (2, 2, self.TH, self.TW, N, self.lanes))

    def _maxima(self, tile: Workspace, N: int) -> tuple[Array, Array]:
        """Return the maxima of each row of a window, (2, PH, PW, N, lanes), and of the window, (PH, PW, N, lanes)."""
        shape = (*self.output_size, N, self.lanes)
        return tile.array(f"h {id(self)}", (2, *shape)), tile.array(f"p {id(self)}", shape)

    def _valid(self, planes: Array, parity: Parity) -> Array:
        """Return the part of a plane inside the image; if the size is odd, the image covers half of the last tile."""
        a, b = parity
        return planes[a, b, : (self.OH + 1 - a) // 2, : (self.OW + 1 - b) // 2]

    def _pooled(self, planes: Array) -> Array:
        """Return the part of the planes that belongs to whole windows."""
        return planes[:, :, : self.OH // 2, : self.OW // 2]

    def _quarters(self, planes: Array) -> Quarters:
        """Return the quarters of the input image inside the planes (2, 2, TH, TW, ...) of the padded image.

        Pixel (r, c) of the image is pixel (r + PH, c + PW) of the padded image.
        """
        PH, PW = self.conv.window.padding

        def inside(parity: int, padding: int, size: int) -> slice:
            start = (parity + padding) // 2
            return slice(start, start + (size + 1 - parity) // 2)

        return {
            (a, b): planes[(a + PH) % 2, (b + PW) % 2, inside(a, PH, self.H), inside(b, PW, self.W)]
            for a, b in PARITIES
        }

    def _add_product(self, x: Array, dy: Array, total: Array) -> None:
        """Add the product to `total`, a gradient of the weights; the first tile overwrites it."""
        if not self._tiles_summed:
            np.matmul(x, dy, out=total)
            return
        part = self._own.array("of a tile", total.shape)
        np.matmul(x, dy, out=part)
        np.add(total, part, out=total)


class PatchBlock(Block):
    """The first convolution: one product of patches (K + 1, M) with weights, M = 4 TH TW N outputs.

    The last row of the patches is all ones. So the bias is one more weight, in both directions.
    """

    @property
    def bytes_per_sample(self) -> int:
        return 4 * self.TH * self.TW * (self.K + 1 + self.lanes) * self.dtype.itemsize

    def _lanes(self) -> int:
        """Return F, or a few more if that makes a width for which BLAS is fast: 32 is faster than 30."""
        full = -(-self.F // BLAS_WIDTH) * BLAS_WIDTH
        return full if full <= self.F * MOST_LANES_PER_FILTER else self.F

    def prepare(self) -> None:
        """Put weight and bias into one matrix."""
        weights = self._weights("weights")
        weights[:-1, : self.F] = self.conv.parameters["weight"].reshape(-1, self.F)
        if self.conv.bias:
            weights[-1, : self.F] = self.conv.parameters["bias"]

    def _weights(self, name: str) -> Array:
        return self._own.array(name, (self.K + 1, self.lanes))

    def _planes(self, tile: Workspace, N: int) -> Array:
        """Return the planes of the padded input, one channel after another: (C, 2, 2, TH + FH / 2, TW + FW / 2, N)."""
        FH, FW = self.conv.window.kernel
        return tile.array(f"x {id(self)}", (self.C, 2, 2, self.TH + FH // 2, self.TW + FW // 2, N))

    def input_quarters(self, tile: Workspace, N: int) -> Quarters:
        return self._quarters(self._planes(tile, N).transpose(1, 2, 3, 4, 5, 0))

    def _patches(self, tile: Workspace, N: int) -> Array:
        return tile.array(f"patches {id(self)}", (self.K + 1, 2, 2, self.TH, self.TW, N), fill=1)

    def _products(self, tile: Workspace, N: int, y: Array) -> None:
        patches = self._patches(tile, N)
        if (tile, N) not in self._views:
            self._views[tile, N] = self._copies(tile, N)
        for pixels, elements in self._views[tile, N]:
            np.copyto(elements, pixels)
        np.matmul(patches.reshape(len(patches), -1).T, self._weights("weights"), out=y.reshape(-1, self.lanes))

    def _copies(self, tile: Workspace, N: int) -> list[tuple[Array, Array]]:
        """Return pairs of views: the input pixels under some kernel elements, and their place among the patches.

        Element (i, j) at the outputs of parity (a, b) reads the plane of parity (a + i, b + j), shifted by half of
        that. So elements two rows or columns apart read the same plane, shifted by one. One copy serves all of them.
        """
        FH, FW = self.conv.window.kernel
        planes, TH, TW = self._planes(tile, N), self.TH, self.TW
        patches = self._patches(tile, N)[:-1].reshape(FH, FW, self.C, 2, 2, TH, TW, N)
        pairs = []
        for i, j, (a, b) in itertools.product(range(min(FH, 2)), range(min(FW, 2)), PARITIES):
            elements = patches[i::2, j::2, :, a, b]
            up, left = (a + i) // 2, (b + j) // 2
            plane = planes[:, (a + i) % 2, (b + j) % 2, up : up + TH + (FH - 1 - i) // 2]
            shifts = sliding_window_view(plane[:, :, left : left + TW + (FW - 1 - j) // 2], (TH, TW), axis=(1, 2))
            pairs.append((shifts.transpose(1, 2, 0, 4, 5, 3), elements))
        return pairs

    def _dy(self, tile: Workspace, N: int) -> Array:
        # If the image is odd, the other half of the last tiles must stay zero.
        return self._own.array("dy", (2, 2, self.TH, self.TW, N, self.lanes))

    def _gradients(self, tile: Workspace, N: int) -> None:
        patches, dy = self._patches(tile, N), self._dy(tile, N)
        self._add_product(patches.reshape(len(patches), -1), dy.reshape(-1, self.lanes), self._weights("d_weights"))

    def finish(self) -> None:
        total = self._weights("d_weights")
        np.copyto(self.conv.gradients["weight"].reshape(-1, self.F), total[:-1, : self.F])
        if self.conv.bias:
            np.copyto(self.conv.gradients["bias"], total[-1, : self.F])
        self._tiles_summed = 0


class WinogradBlock(Block):
    """A 3x3 convolution with stride 1: transform input tiles, 16 products, transform back.

    Along one axis, an input tile r0 .. r3 is transformed to v = (r0 - r2, r1 + r2, r2 - r1, r1 - r3). The outputs are
    (m0 + m1 + m2, m1 - m2 - m3), from the products m. Backward, the gradient with respect to m is
    (d0, d0 + d1, d0 - d1, -d1). We store d1 instead of -d1 and change the sign of its factor, the transformed weights.

    The input is transformed one row frequency at a time, so that its working set stays in the cache.
    """

    bias_after_pooling = True

    @property
    def bytes_per_sample(self) -> int:
        return self.TH * self.TW * (4 * self.C + 8 * self.F) * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        return 16 * self.C * self.F * self.dtype.itemsize

    def prepare(self) -> None:
        """Transform the weights: U = G w G', and its transpose with changed signs for `backward`."""
        C, F = self.C, self.F
        U, UT = self._own.array("U", (4, 4, C, F)), self._own.array("UT", (4, 4, F, C))
        weight = self.conv.parameters["weight"].reshape(9, C * F)
        np.matmul(_GG.astype(self.dtype), weight, out=U.reshape(16, C * F))
        np.copyto(UT, U.swapaxes(2, 3))
        _change_signs(UT)

    def _planes(self, tile: Workspace, N: int, name: str) -> Array:
        return tile.array(name, (2, 2, self.TH + 1, self.TW + 1, N, self.C))

    def input_quarters(self, tile: Workspace, N: int) -> Quarters:
        return self._quarters(self._planes(tile, N, f"x {id(self)}"))

    def gradient_quarters(self, tile: Workspace, N: int) -> Quarters:
        return self._quarters(self._planes(self._own, N, "dx"))

    def _transformed(self, tile: Workspace, N: int) -> Array:
        return tile.array(f"V {id(self)}", (4, 4, self.TH, self.TW, N, self.C))

    def _products(self, tile: Workspace, N: int, y: Array) -> None:
        TH, TW, C, F = self.TH, self.TW, self.C, self.F
        x = self._planes(tile, N, f"x {id(self)}")
        V, U = self._transformed(tile, N), self._own.array("U", (4, 4, C, F))
        rows = self._own.array("rows", (2, TH, TW + 1, N, C))
        M = self._own.array("M", (4, TH, TW, N, F))
        z, z2 = self._own.array("z", (2, TH, TW, N, F)), self._own.array("z2", (2, TH, TW, N, F))
        r0, r1, r2, r3 = x[0, :, :TH], x[1, :, :TH], x[0, :, 1:], x[1, :, 1:]
        c0, c1, c2, c3 = rows[0, :, :TW], rows[1, :, :TW], rows[0, :, 1:], rows[1, :, 1:]
        steps = ((np.subtract, r0, r2), (np.add, r1, r2), (np.subtract, r2, r1), (np.subtract, r1, r3))
        for i, (operation, one, other) in enumerate(steps):
            operation(one, other, out=rows)
            v = V[i]
            np.subtract(c0, c2, out=v[0])
            np.add(c1, c2, out=v[1])
            np.subtract(c2, c1, out=v[2])
            np.subtract(c1, c3, out=v[3])
            np.matmul(v.reshape(4, -1, C), U[i], out=M.reshape(4, -1, F))
            if i == 1 and not self.pool and self.conv.bias:
                M[1] += self._bias(N)  # this frequency is in each of the four outputs, once
            t = (y[0], z, z2, z)[i]
            np.add(M[1], M[2], out=t[0])
            t[0] += M[0]
            np.subtract(M[1], M[2], out=t[1])
            t[1] -= M[3]
            if i == 1:
                y[0] += z
            elif i == 2:
                y[0] += z2
                np.subtract(z, z2, out=y[1])
            elif i == 3:
                y[1] -= z

    def _frequencies(self, N: int) -> Array:
        return self._own.array("D", (4, 4, self.TH, self.TW, N, self.F))

    def _dy(self, tile: Workspace, N: int) -> Array:
        return self._frequencies(N)[::3, ::3]

    def _gradients(self, tile: Workspace, N: int) -> None:
        C, F = self.C, self.F
        D = self._frequencies(N)
        axes = ((D[0, ::3], D[3, ::3], D[1, ::3], D[2, ::3]), (D[:, 0], D[:, 3], D[:, 1], D[:, 2]))
        for one, other, total, difference in axes:
            np.add(one, other, out=total)
            np.subtract(one, other, out=difference)
        V, D = self._transformed(tile, N).reshape(16, -1, C), D.reshape(16, -1, F)
        ones = self._own.array("ones", (D.shape[1],), fill=1)
        self._add_product(V.swapaxes(1, 2), D, self._own.array("d_U", (16, C, F)))
        # Frequency (1, 1) is the sum of the gradients of the four outputs.
        self._add_product(ones, D[5], self._own.array("d_bias", (F,)))
        if self.conv.needs_input_gradient:
            np.matmul(D, self._own.array("UT", (4, 4, F, C)).reshape(16, F, C), out=V)
            self._transform_back(self._transformed(tile, N), self._planes(self._own, N, "dx"), N)

    def _transform_back(self, V: Array, dx: Array, N: int) -> None:
        """Add up the gradients that each input pixel gets from its tiles: along rows, then along columns."""
        rows = self._own.array("d_rows", (4, 2, self.TH, self.TW + 1, N, self.C))
        _overlap([V[:, k] for k in range(4)], even=rows[:, 0], odd=rows[:, 1], axis=2)
        _overlap(list(rows), even=dx[0], odd=dx[1], axis=1)

    def finish(self) -> None:
        """Transform the weights' gradient back, G' dU G; write it and the gradient of the bias."""
        C, F = self.C, self.F
        d_U = self._own.array("d_U", (16, C, F))
        _change_signs(d_U.reshape(4, 4, C, F))
        np.matmul(_GG.T.astype(self.dtype), d_U.reshape(16, C * F), out=self.conv.gradients["weight"].reshape(9, C * F))
        if self.conv.bias:
            np.copyto(self.conv.gradients["bias"], self._own.array("d_bias", (F,)))
        self._tiles_summed = 0


def _change_signs(transform: Array) -> None:
    """Change the sign if exactly one of the two frequencies is the last."""
    transform[3, :3] *= -1
    transform[:3, 3] *= -1


def _overlap(v: Sequence[Array], *, even: Array, odd: Array, axis: int) -> None:
    """Add the gradients of neighbouring input tiles, which share two pixels, along one axis.

    A tile's pixels get (v0, v1 - v2 + v3, v1 + v2 - v0, -v3). The last two are the next tile's first two.
    """
    v0, v1, v2, v3, even, odd = (array.swapaxes(0, axis) for array in (*v, even, odd))
    np.subtract(v1, v2, out=odd[:-1])
    odd[:-1] += v3
    np.multiply(v3[-1:], -1, out=odd[-1:])  # NumPy 2.4's negative is wrong for some strides
    odd[1:-1] -= v3[:-1]
    np.add(v1, v2, out=even[1:])
    even[1:] -= v0
    np.copyto(even[:1], v0[:1])
    even[1:-1] += v0[1:]


class Chain(FusedLayers):
    """Blocks in a row, run over tiles of a few samples so that their working set stays in the cache.

    The shapes alone determine the tile's size. Images enter and leave as (N, H, W, C).
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self._tiles: list[Workspace] = []
        self._own = Workspace(blocks[0].dtype)
        largest = max(block.bytes_per_sample for block in blocks)
        self.tile_size = min(max(TILE_BYTES // largest, 4), LARGEST_TILE)
        if blocks[0].has_large_weights:  # each tile reads all of them again, so a tile is at least as large
            self.tile_size = max(self.tile_size, -(-max(block.weight_bytes for block in blocks) // largest))
        self.output_shape = (*blocks[-1].output_size, blocks[-1].F)

    def elements(self) -> Elements:
        """Return the elements of arrays of each tile, and of arrays that all tiles share."""
        first, last = self.blocks[0], self.blocks[-1]
        y = math.prod(last.output_size) * last.F
        x = first.H * first.W * first.C * first.conv.needs_input_gradient
        each = [_of_block(block) for block in self.blocks]
        of_weights = sum(3 * 16 * b.C * b.F if isinstance(b, WinogradBlock) else 2 * b.K * b.lanes for b in self.blocks)
        shared = sum(of_tiles for _, of_tiles in each)
        return Elements(y + sum(of_tile for of_tile, _ in each), x, of_weights, ((shared, self.tile_size),))

    def parts(self, samples: int) -> list[tuple[str, str, Products]]:
        return [(block.name, str(block), block.conv.products(samples)) for block in self.blocks]

    def prepare(self) -> None:
        for block in self.blocks:
            block.prepare()

    def forward(self, x: Array, *, training: bool, key: Key | None, watch: Watch | None = None) -> Array:
        """Return the last block's output; `watch` is called with a block's name after each tile."""
        y = self._own.array("y", (len(x), *self.blocks[-1].output_size, self.blocks[-1].F))
        for tile, rows in self._tiles_of(len(x)):
            N = rows.stop - rows.start
            _copy(quarters_of_nhwc(x[rows]), self.blocks[0].input_quarters(tile, N))
            for block, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
                output = following.input_quarters(tile, N) if following else quarters_of_nhwc(y[rows])
                block.forward(tile, N, output)
                if watch:
                    watch("forward", block.name)
        return y

    def backward(self, dy: Array, *, watch: Watch | None = None) -> Array | None:
        """Set the gradients of all blocks; return that of the input if a layer in front needs it."""
        first = self.blocks[0]
        wanted = first.conv.needs_input_gradient
        dx = self._own.array("dx", (len(dy), first.H, first.W, first.C)) if wanted else None
        for tile, rows in self._tiles_of(len(dy)):
            N = rows.stop - rows.start
            d = quarters_of_nhwc(dy[rows])
            for block in reversed(self.blocks):
                block.backward(tile, N, d)
                if watch:
                    watch("backward", block.name)
                if block is not first or wanted:
                    d = block.gradient_quarters(tile, N)
            if dx is not None:
                _copy(d, quarters_of_nhwc(dx[rows]))
        for block in self.blocks:
            block.finish()
        return dx

    def _tiles_of(self, N: int) -> list[tuple[Workspace, slice]]:
        """Return the tiles of a micro-batch, as equal as possible, and the workspace of each."""
        count = -(-N // self.tile_size)
        while len(self._tiles) < count:
            self._tiles.append(Workspace(self._own.dtype))
        return [(self._tiles[t], slice(N * t // count, N * (t + 1) // count)) for t in range(count)]


def _copy(source: Quarters, target: Quarters) -> None:
    for parity in PARITIES:
        np.copyto(target[parity], source[parity])


def chain_at(layers: Sequence[Layer], names: Sequence[str]) -> tuple[Chain | None, int]:
    """Return the chain that begins at the first of these layers and its number of layers; None and 1 without a chain.

    Classes are compared exactly: a class derived from one of ours may compute something else.
    """
    blocks: list[Block] = []
    taken = 0
    while taken < len(layers):
        conv = layers[taken]
        algorithm = _algorithm_for(conv)
        if algorithm is None:
            break
        assert isinstance(conv, Conv2d)
        following = [*layers[taken + 1 : taken + 3], Layer(), Layer()]
        relu = type(following[0]) is ReLU
        after = following[relu]
        pool = type(after) is MaxPool2d and after.window == Window((2, 2), stride=(2, 2)) and min(conv.output_size) >= 2
        block = algorithm(conv, names[taken], relu=relu, pool=pool)
        if blocks and block.has_large_weights != blocks[0].has_large_weights:
            break
        blocks.append(block)
        taken += 1 + relu + pool
    return (Chain(blocks), taken) if blocks else (None, 1)


def _algorithm_for(layer: Layer) -> type[Block] | None:
    if type(layer) is not Conv2d or layer.window.stride != (1, 1):
        return None
    if layer.window.kernel == (3, 3) and (layer.needs_input_gradient or layer.channels >= FEW_CHANNELS):
        return WinogradBlock
    return None if layer.needs_input_gradient else PatchBlock


def _of_block(block: Block) -> tuple[float, float]:
    """Return the elements of a sample in the arrays of a tile, and in those that all tiles share."""
    tiles, C, F, lanes = block.TH * block.TW, block.C, block.F, block.lanes
    pooled = math.prod(block.output_size) * lanes * block.pool
    each, shared = 4 * tiles * lanes + 3 * pooled, 3.75 * pooled + 1.25 * tiles * lanes
    if isinstance(block, PatchBlock):
        FH, FW = block.conv.window.kernel
        planes = C * 4 * (block.TH + FH // 2) * (block.TW + FW // 2)
        return each + planes + (block.K + 1) * 4 * tiles, shared + 4 * tiles * lanes
    assert isinstance(block, WinogradBlock)
    planes, wide = 4 * (block.TH + 1) * (block.TW + 1) * C, block.TH * (block.TW + 1) * C
    return each + planes + 16 * tiles * C, shared + 2 * wide + 8 * tiles * F + 16 * tiles * F + planes + 8 * wide
