"""A stand-in for the part of PyTorch that an exported ``model.py`` uses, in plain NumPy, images (N, C, H, W).

With it the generated program runs where PyTorch is not installed: its modules, the names and shapes of its tensors, and
its numbers. It follows the documentation of `torch.nn`, in evaluation only.
"""

import sys
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import numpy as np
import safetensors.numpy
from numpy.lib.stride_tricks import sliding_window_view


class Tensor:
    def __init__(self, array):
        self.array = np.asarray(array)

    dtype = property(lambda self: self.array.dtype)
    shape = property(lambda self: self.array.shape)

    def reshape(self, *shape):
        return Tensor(self.array.reshape(shape))

    def permute(self, *axes):
        return Tensor(self.array.transpose(axes))

    def to(self, dtype):
        return Tensor(self.array.astype(dtype))

    def __add__(self, other):
        return Tensor(self.array + other.array)

    def __sub__(self, other):
        return Tensor(self.array - other.array)

    def __mul__(self, other):
        return Tensor(self.array * other.array)

    def __truediv__(self, other):
        return Tensor(self.array / other.array)


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


class Module:
    def __init__(self):
        self.__dict__.update(modules={}, parameters={}, parameter_shapes={})

    def __setattr__(self, name, value):
        if isinstance(value, Module):
            self.modules[name] = value
        self.__dict__[name] = value

    def add_module(self, name, module):
        self.modules[name] = module

    def register_buffer(self, name, tensor, persistent=True):
        assert not persistent, "it would belong to the state dict"
        self.__dict__[name] = tensor

    def children(self):
        return iter(self.modules.values())

    def shapes(self, prefix=""):
        """Return the shape of each tensor of the state dict by its name."""
        found = {f"{prefix}{name}": shape for name, shape in self.parameter_shapes.items()}
        for name, module in self.modules.items():
            found |= module.shapes(f"{prefix}{name}.")
        return found

    def load_state_dict(self, arrays, prefix=""):
        if not prefix:
            assert {name: array.shape for name, array in arrays.items()} == self.shapes()
        self.parameters.update({name: arrays[prefix + name] for name in self.parameter_shapes})
        for name, module in self.modules.items():
            module.load_state_dict(arrays, f"{prefix}{name}.")

    def eval(self):
        return self

    def __call__(self, x):
        return self.forward(x)


class Sequential(Module):
    def __init__(self, *modules):
        super().__init__()
        named = modules[0] if modules and isinstance(modules[0], dict) else {str(i): m for i, m in enumerate(modules)}
        for name, module in named.items():
            self.add_module(name, module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


def elementwise(function):
    class Elementwise(Module):
        def __init__(self, *settings, **named):
            super().__init__()
            self.settings = (*settings, *named.values())

        def forward(self, x):
            return Tensor(function(x.array, *self.settings).astype(x.dtype))

    return Elementwise


def softmax(x, axis):
    exponentials = np.exp(x - x.max(axis, keepdims=True))
    return exponentials / exponentials.sum(axis, keepdims=True)


class Conv2d(Module):
    def __init__(self, inputs, outputs, kernel, stride=1, padding=0, bias=True):
        super().__init__()
        self.stride, self.padding = pair(stride), pair(padding)
        self.parameter_shapes = {"weight": (outputs, inputs, *pair(kernel)), **({"bias": (outputs,)} if bias else {})}

    def forward(self, x):
        weight = self.parameters["weight"]
        found = windows(padded(x.array, self.padding, 0), weight.shape[2:], self.stride)
        y = np.einsum("nchwij,fcij->nfhw", found, weight, optimize=True)
        if "bias" in self.parameters:
            y += self.parameters["bias"].reshape(-1, 1, 1)
        return Tensor(y)


class ConvTranspose2d(Module):
    def __init__(self, inputs, outputs, kernel, stride=1, padding=0):
        super().__init__()
        self.stride, self.padding = pair(stride), pair(padding)
        self.parameter_shapes = {"weight": (inputs, outputs, *pair(kernel)), "bias": (outputs,)}

    def forward(self, x):
        (N, _, H, W), weight = x.shape, self.parameters["weight"]
        (SH, SW), (PH, PW), (_, K, FH, FW) = self.stride, self.padding, weight.shape
        y = np.zeros((N, K, (H - 1) * SH + FH, (W - 1) * SW + FW), np.float32)
        for i in range(H):
            for j in range(W):
                spread = np.einsum("nc,ckhw->nkhw", x.array[:, :, i, j], weight)
                y[:, :, i * SH : i * SH + FH, j * SW : j * SW + FW] += spread
        return Tensor(y[:, :, PH : y.shape[2] - PH, PW : y.shape[3] - PW] + self.parameters["bias"].reshape(-1, 1, 1))


class Linear(Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.parameter_shapes = {"weight": (outputs, inputs), "bias": (outputs,)}

    def forward(self, x):
        return Tensor(x.array @ self.parameters["weight"].T + self.parameters["bias"])


class BatchNorm(Module):
    def __init__(self, channels, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps = eps
        self.parameter_shapes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (channels,))

    def forward(self, x):
        assert x.array.ndim == self.ndim
        ours = [self.parameters[name] for name in self.parameter_shapes]
        weight, bias, mean, variance = (one.reshape(-1, *[1] * (self.ndim - 2)) for one in ours)
        return Tensor((x.array - mean) / np.sqrt(variance + np.float32(self.eps)) * weight + bias)


class BatchNorm1d(BatchNorm):
    ndim = 2


class BatchNorm2d(BatchNorm):
    ndim = 4


def padded(x, padding, fill):
    (PH, PW) = padding
    return np.pad(x, ((0, 0), (0, 0), (PH, PH), (PW, PW)), constant_values=fill)


def windows(x, kernel, stride):
    return sliding_window_view(x, pair(kernel), axis=(2, 3))[:, :, :: stride[0], :: stride[1]]


def pooling(combine, fill):
    class Pool2d(Module):
        def __init__(self, kernel, stride=None, padding=0):
            super().__init__()
            self.kernel, self.padding = pair(kernel), pair(padding)
            self.stride = self.kernel if stride is None else pair(stride)
            assert all(2 * margin <= size for margin, size in zip(self.padding, self.kernel, strict=True))

        def forward(self, x):
            return Tensor(combine(windows(padded(x.array, self.padding, fill), self.kernel, self.stride), (4, 5)))

    return Pool2d


class ConstantPad2d(Module):
    def __init__(self, margins, fill):
        super().__init__()
        self.margins, self.fill = margins, fill

    def forward(self, x):
        left, right, top, bottom = self.margins
        return Tensor(np.pad(x.array, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=self.fill))


class LocalResponseNorm(Module):
    def __init__(self, size, alpha=1e-4, beta=0.75, k=1.0):
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x):
        squares = np.pad(x.array**2, ((0, 0), (self.size // 2, (self.size - 1) // 2), (0, 0), (0, 0)))
        means = sliding_window_view(squares, self.size, axis=1).mean(-1)
        return Tensor(x.array / (means * self.alpha + self.k) ** self.beta)


class Upsample(Module):
    def __init__(self, scale_factor, mode):
        super().__init__()
        assert mode == "bilinear"
        self.factor = scale_factor

    def forward(self, x):
        y = x.array
        for axis in (2, 3):
            size = y.shape[axis]
            place = np.maximum((np.arange(size * self.factor) + 0.5) / self.factor - 0.5, 0)
            below = np.floor(place).astype(int)
            share = (place - below).astype(np.float32).reshape(-1, *[1] * (3 - axis))
            y = np.take(y, below, axis) * (1 - share) + np.take(y, np.minimum(below + 1, size - 1), axis) * share
        return Tensor(y)


def make_torch():
    """Return the modules `torch`, `torch.nn`, and `safetensors.torch` of the stand-in."""
    torch, nn, files = ModuleType("torch"), ModuleType("torch.nn"), ModuleType("safetensors.torch")
    torch.nn, torch.Tensor, torch.inf = nn, Tensor, np.inf
    torch.tensor = lambda values: Tensor(np.array(values, np.float32))
    torch.cat = lambda tensors, dim: Tensor(np.concatenate([one.array for one in tensors], dim))
    files.load_file = safetensors.numpy.load_file
    classes = (Module, Sequential, Conv2d, ConvTranspose2d, Linear, BatchNorm1d, BatchNorm2d, ConstantPad2d, Upsample)
    vars(nn).update({one.__name__: one for one in (*classes, LocalResponseNorm)})
    nn.MaxPool2d, nn.AvgPool2d = pooling(np.max, -np.inf), pooling(np.mean, 0)
    nn.AdaptiveAvgPool2d = elementwise(lambda x, _size: x.mean((2, 3), keepdims=True))
    nn.Identity, nn.Dropout = elementwise(lambda x: x), elementwise(lambda x, _ratio: x)
    nn.ReLU, nn.Tanh = elementwise(lambda x: np.maximum(x, 0)), elementwise(np.tanh)
    nn.LeakyReLU = elementwise(lambda x, slope: np.where(x > 0, x, slope * x))
    nn.Sigmoid, nn.Softmax = elementwise(lambda x: 1 / (1 + np.exp(-x))), elementwise(softmax)
    nn.Flatten = elementwise(lambda x: x.reshape(len(x), -1))
    return {"torch": torch, "torch.nn": nn, "safetensors.torch": files}


@contextmanager
def instead_of_torch():
    """Let ``import torch`` find the stand-in."""
    with patch.dict(sys.modules, make_torch()):
        yield
