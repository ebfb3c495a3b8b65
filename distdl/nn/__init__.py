"""Neural networks in NumPy alone: layers, losses, initializers, models and a gradient check.

Nothing here knows ranks, files or configuration: arrays go in, arrays come out.
"""

from distdl.nn.activations import Identity, LeakyReLU, ReLU, Sigmoid, Softmax, Tanh
from distdl.nn.composites import Branches, Residual
from distdl.nn.convolution import Conv2d, ConvTranspose2d
from distdl.nn.gradient_check import check_layer, check_network, numerical_gradient
from distdl.nn.initializers import Constant, He, Initializer, Normal, Xavier, Zeros
from distdl.nn.layers import Affine, BufferSpec, Dropout, Flatten, Layer, ParameterSpec, Workspace
from distdl.nn.losses import (
    LOSSES,
    LossFunction,
    MeanSquaredError,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    count_correct,
    make_loss,
)
from distdl.nn.models import MODELS, build_model, deep_convnet, mlp, simple_convnet
from distdl.nn.network import Sequential
from distdl.nn.normalization import BatchNorm, LocalResponseNorm
from distdl.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from distdl.nn.upsampling import Upsample2d
from distdl.nn.windows import Window, patches, patches_adjoint

__all__ = [
    "LOSSES",
    "MODELS",
    "Affine",
    "AvgPool2d",
    "BatchNorm",
    "Branches",
    "BufferSpec",
    "Constant",
    "Conv2d",
    "ConvTranspose2d",
    "Dropout",
    "Flatten",
    "GlobalAvgPool2d",
    "He",
    "Identity",
    "Initializer",
    "Layer",
    "LeakyReLU",
    "LocalResponseNorm",
    "LossFunction",
    "MaxPool2d",
    "MeanSquaredError",
    "Normal",
    "ParameterSpec",
    "ReLU",
    "Residual",
    "Sequential",
    "Sigmoid",
    "SigmoidCrossEntropy",
    "Softmax",
    "SoftmaxCrossEntropy",
    "Tanh",
    "Upsample2d",
    "Window",
    "Workspace",
    "Xavier",
    "Zeros",
    "build_model",
    "check_layer",
    "check_network",
    "count_correct",
    "deep_convnet",
    "make_loss",
    "mlp",
    "numerical_gradient",
    "patches",
    "patches_adjoint",
    "simple_convnet",
]
