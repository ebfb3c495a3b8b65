"""Compiled kernels: the same networks, computed by code that numba compiles for the CPU of the host.

The formulas alone determine the bits, not the CPU: each kernel's docstring states the order of its operations, and an
oracle in plain NumPy follows it. Sums are single chains, or chains whose number the shapes determine.

Two kinds of files:

- kernels, functions of arrays: `simd` and `integers` (vectors), `functions` and `double_functions` (exp, log, …),
  `products`, `winograd`, `updates`
- implementations, with the kernels that only they call: of layers in `convolution`, `batch_norm` and many others, of
  optimizers in `optimizers`, of losses in `losses`, of the loading of images in `images`

Arrays of kernels are C-contiguous float32; an argument that ends in ``_`` is an array, the same name without it is the
address of its first element.
"""

from collections.abc import Callable, Sequence

import numpy as np

from distdl.nn.activations import LeakyReLU, ReLU, Sigmoid, Softmax, Tanh
from distdl.nn.composites import Branches, Residual
from distdl.nn.convolution import Conv2d, ConvTranspose2d
from distdl.nn.kernels import FusedLayers, Kernels
from distdl.nn.kernels.compiled import optimizers
from distdl.nn.kernels.compiled.activations import dropout_at, leaky_relu_at, relu_at
from distdl.nn.kernels.compiled.affine import affine_at
from distdl.nn.kernels.compiled.arrays import GradientArrays
from distdl.nn.kernels.compiled.base import CompiledLayers
from distdl.nn.kernels.compiled.batch_norm import batch_norm_at
from distdl.nn.kernels.compiled.composites import branches_at, residual_at
from distdl.nn.kernels.compiled.convolution import convolution_at, transposed_convolution_at
from distdl.nn.kernels.compiled.images import row_loader
from distdl.nn.kernels.compiled.local_response_norm import local_response_norm_at
from distdl.nn.kernels.compiled.losses import compiled_loss
from distdl.nn.kernels.compiled.pooling import average_pool_at, global_average_pool_at, max_pool_at
from distdl.nn.kernels.compiled.sigmoids import sigmoid_at
from distdl.nn.kernels.compiled.upsampling import upsampling_at
from distdl.nn.layers import Affine, Array, Dropout, Layer
from distdl.nn.losses import LossFunction
from distdl.nn.normalization import BatchNorm, LocalResponseNorm
from distdl.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from distdl.nn.upsampling import Upsample2d

#: For each class of layers, the function that returns the implementation at the first of the given layers, if any.
_IMPLEMENTATIONS: dict[type[Layer], Callable[[Sequence[Layer], Sequence[str]], CompiledLayers | None]] = {
    Affine: affine_at,
    AvgPool2d: average_pool_at,
    BatchNorm: batch_norm_at,
    Branches: branches_at,
    Conv2d: convolution_at,
    ConvTranspose2d: transposed_convolution_at,
    Dropout: dropout_at,
    GlobalAvgPool2d: global_average_pool_at,
    LeakyReLU: leaky_relu_at,
    LocalResponseNorm: local_response_norm_at,
    MaxPool2d: max_pool_at,
    ReLU: relu_at,
    Residual: residual_at,
    Sigmoid: sigmoid_at,
    Softmax: sigmoid_at,
    Tanh: sigmoid_at,
    Upsample2d: upsampling_at,
}


class _Compiled(Kernels):
    name = "compiled"
    portable = True
    norm = staticmethod(optimizers.norm)
    optimizer_rule = staticmethod(optimizers.optimizer_rule)
    row_loader = staticmethod(row_loader)

    def __init__(self) -> None:
        self._gradients = GradientArrays()

    def for_network(self) -> "_Compiled":
        return _Compiled()

    def begin_backward(self) -> None:
        self._gradients.release_all()

    def release(self, gradient: Array, *in_use: Array | None) -> None:
        self._gradients.release(gradient, *in_use)

    def loss(self, loss: LossFunction) -> LossFunction:
        return compiled_loss(loss)

    def fuse(self, layers: Sequence[Layer], names: Sequence[str]) -> tuple[FusedLayers | None, int]:
        find = _IMPLEMENTATIONS.get(type(layers[0]))
        if find is None or layers[0].workspace.dtype != np.float32:
            return None, 1
        fused = find(layers, names)
        if fused is None:
            return None, 1
        fused.gradients = self._gradients
        return fused, len(fused.layers)


COMPILED = _Compiled()
