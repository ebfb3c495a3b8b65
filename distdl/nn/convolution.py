"""Convolution over images (N, H, W, C).

N samples, H height and W width of the input, C channels, FN filters, FH and FW the kernel, OH and OW the output; see
`windows` for their geometry.

The idea (im2col, section 7.4): copy the patch of the image under every position of the kernel into one row of a matrix
(N * OH * OW, FH * FW * C). The convolution is then one product with the weights (FH * FW * C, FN). Its result is
again an image (N, OH, OW, FN). The transposed matrix times the output gradient is the gradient of the weights. For
stride 1 the input gradient is a convolution too: of the padded output gradient with the kernel flipped along both axes.
For other strides the gradients of the patches are added back to their pixels (col2im).
"""

import numpy as np
from numpy.typing import DTypeLike

from distdl.errors import UserError
from distdl.nn.arguments import image_shape, show_shape, whole_number
from distdl.nn.initializers import He, Initializer, Zeros
from distdl.nn.layers import Array, Layer, ParameterSpec, Product, Products, Shape, Workspace, sum_rows
from distdl.nn.windows import Pair, Window, patches, patches_adjoint, window_of
from distdl.rng import Key


class Conv2d(Layer):
    """Convolution: the dot product of each filter with each patch of the image, plus a bias.

    ``y[n, i, j, f] = b[f] + sum over h, w, c of x[n, i SH + h - PH, j SW + w - PW, c] weight[h, w, c, f]``

    x is (N, H, W, C), the weight (FH, FW, C, FN), the bias (FN,), y is (N, OH, OW, FN). Kernel, stride and padding are
    one number or a pair (height, width). If the stride does not divide the size, the rest of the image is ignored, as
    in PyTorch. `bias` false leaves the bias out: a `BatchNorm` that follows would subtract it again.
    Source: sections 7.2 and 7.4.
    """

    def __init__(
        self,
        filters: int,
        kernel: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        initializer: Initializer | None = None,
        bias: bool = True,
    ) -> None:
        self.filters, self.bias = whole_number("Conv2d", "filters", filters), bias
        self.window = window_of("Conv2d", kernel, stride, padding)
        self.initializer = initializer or He()

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """Accept an image (H, W, C) that, with its padding, is at least as large as the kernel."""
        super().build(input_shape, dtype)
        self.output_size = self.window.fitted_size(input_shape, "kernel")
        H, W, self.channels = input_shape
        self.size = (H, W)
        self.backward_workspace = Workspace(dtype)
        return (*self.output_size, self.filters)

    def parameter_specs(self) -> list[ParameterSpec]:
        FH, FW = self.window.kernel
        C, FN = self.channels, self.filters
        weight = ParameterSpec("weight", (FH, FW, C, FN), self.initializer, fan_in=FH * FW * C)
        bias = ParameterSpec("bias", (FN,), Zeros(), fan_in=FH * FW * C, decay=False)
        return [weight, bias] if self.bias else [weight]

    def products(self, samples: int) -> Products:
        """Return the product of the plain form: patches times weights; each gradient has as many operations."""
        (OH, OW), (FH, FW), C, FN = self.output_size, self.window.kernel, self.channels, self.filters
        rows, patch = samples * OH * OW, FH * FW * C
        dx = (Product(rows, FN, patch),) if self.needs_input_gradient else ()
        return Products(forward=(Product(rows, patch, FN),), backward=(Product(patch, rows, FN), *dx))

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.patches = patches(x, self.window, self.workspace)
        weight = self.parameters["weight"].reshape(-1, self.filters)  # FH * FW * C, FN
        y = self.workspace.array("y", (len(self.patches), self.filters))
        np.matmul(self.patches, weight, out=y)
        if self.bias:
            y += self.parameters["bias"]
        return y.reshape(len(x), *self.output_size, self.filters)

    def backward(self, dy: Array) -> Array | None:
        d = dy.reshape(-1, self.filters)  # N * OH * OW, FN
        np.matmul(self.patches.T, d, out=self.gradients["weight"].reshape(-1, self.filters))
        if self.bias:
            sum_rows(d, self.workspace, out=self.gradients["bias"])
        if not self.needs_input_gradient:
            return None
        return self._by_flipped_kernel(dy) if self.window.stride == (1, 1) else self._by_scattering(d)

    def _by_flipped_kernel(self, dy: Array) -> Array:
        """Return the input gradient for stride 1: patches of the padded dy times the flipped kernel."""
        (FH, FW), (PH, PW) = self.window.kernel, self.window.padding
        around = Window((FH, FW), padding=(FH - 1 - PH, FW - 1 - PW))
        d_patches = patches(dy, around, self.backward_workspace)  # N * H * W, FH * FW * FN
        flipped = self.workspace.array("flipped", (FH, FW, self.filters, self.channels))
        np.copyto(flipped, self.parameters["weight"][::-1, ::-1].swapaxes(2, 3))
        dx = self.workspace.array("dx", (len(d_patches), self.channels))
        np.matmul(d_patches, flipped.reshape(-1, self.channels), out=dx)
        return dx.reshape(len(dy), *self.size, self.channels)

    def _by_scattering(self, d: Array) -> Array:
        """Return the input gradient for any stride: the gradients of the patches, added back."""
        weight = self.parameters["weight"].reshape(-1, self.filters)
        d_patches = self.backward_workspace.array("patches", self.patches.shape)
        np.matmul(d, weight.T, out=d_patches)
        return patches_adjoint(d_patches, self.size, self.window, self.backward_workspace)

    def __str__(self) -> str:
        return f"Conv2d {self.filters}@{self.window}"


class ConvTranspose2d(Layer):
    """Transposed convolution: the adjoint of `Conv2d` with respect to its input; it enlarges images.

    Each pixel of the input adds its multiple of the kernel to the output: with x (N, H, W, C), weight (FH, FW, FN, C)
    and bias (FN,), ``y[n, i SH + h - PH, j SW + w - PW, f] += sum over c of x[n, i, j, c] weight[h, w, f, c]``. The
    output is (N, OH, OW, FN) with ``OH = (H - 1) SH + FH - 2 PH``; OW is alike. Source: section 8.4 (FCN); Dumoulin
    and Visin, *A guide to convolution arithmetic*, 2016.
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
        self.filters = whole_number("ConvTranspose2d", "filters", filters)
        self.window = window_of("ConvTranspose2d", kernel, stride, padding)
        self.initializer = initializer or He()

    def build(self, input_shape: Shape, dtype: DTypeLike) -> Shape:
        """Accept an image (H, W, C) whose output has at least one pixel."""
        super().build(input_shape, dtype)
        H, W, self.channels = image_shape(input_shape)
        (FH, FW), (SH, SW), (PH, PW) = self.window.kernel, self.window.stride, self.window.padding
        self.size, self.output_size = (H, W), ((H - 1) * SH + FH - 2 * PH, (W - 1) * SW + FW - 2 * PW)
        if min(self.output_size) < 1:
            raise UserError(f"the padding removes the whole output for {show_shape(input_shape)}; give less padding")
        self.backward_workspace = Workspace(dtype)
        return (*self.output_size, self.filters)

    def parameter_specs(self) -> list[ParameterSpec]:
        (FH, FW), (SH, SW) = self.window.kernel, self.window.stride
        fan_in = max(1, FH * FW * self.channels // (SH * SW))  # the number of products in one output pixel
        return [
            ParameterSpec("weight", (FH, FW, self.filters, self.channels), self.initializer, fan_in=fan_in),
            ParameterSpec("bias", (self.filters,), Zeros(), fan_in=fan_in, decay=False),
        ]

    def products(self, samples: int) -> Products:
        """Return the product of pixels and weights; each gradient has as many operations."""
        (H, W), (FH, FW), C, FN = self.size, self.window.kernel, self.channels, self.filters
        rows, patch = samples * H * W, FH * FW * FN
        dx = (Product(rows, patch, C),) if self.needs_input_gradient else ()
        return Products(forward=(Product(rows, C, patch),), backward=(Product(patch, rows, C), *dx))

    def forward(self, x: Array, *, training: bool, key: Key | None) -> Array:
        self.pixels = x.reshape(-1, self.channels)
        weight = self.parameters["weight"].reshape(-1, self.channels)  # FH * FW * FN, C
        spread = self.workspace.array("spread", (len(self.pixels), len(weight)))
        np.matmul(self.pixels, weight.T, out=spread)
        sums = patches_adjoint(spread, self.output_size, self.window, self.workspace)
        return np.add(sums, self.parameters["bias"], out=self.workspace.array("y", sums.shape))

    def backward(self, dy: Array) -> Array | None:
        d = patches(dy, self.window, self.backward_workspace)  # N * H * W, FH * FW * FN
        np.matmul(d.T, self.pixels, out=self.gradients["weight"].reshape(-1, self.channels))
        sum_rows(dy.reshape(-1, self.filters), self.workspace, out=self.gradients["bias"])
        if not self.needs_input_gradient:
            return None
        dx = self.workspace.array("dx", (len(d), self.channels))
        np.matmul(d, self.parameters["weight"].reshape(-1, self.channels), out=dx)
        return dx.reshape(len(dy), *self.size, self.channels)

    def __str__(self) -> str:
        return f"ConvTranspose2d {self.filters}@{self.window}"
