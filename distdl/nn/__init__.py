"""Neural networks in NumPy alone: layers, losses, initializers, models and a gradient check.

Nothing here knows ranks, files or configuration: arrays go in, arrays come out.
"""

from distdl.nn.convolution import Conv2d, MaxPool2d, Window, patches, patches_adjoint
from distdl.nn.gradient_check import check_layer, check_network, numerical_gradient
from distdl.nn.initializers import He, Initializer, Normal, Xavier, Zeros
from distdl.nn.layers import Affine, Dropout, Flatten, Layer, ParameterSpec, ReLU, Sigmoid, Workspace
from distdl.nn.losses import SoftmaxCrossEntropy, count_correct
from distdl.nn.models import MODELS, build_model, deep_convnet, mlp, simple_convnet
from distdl.nn.network import Sequential

__all__ = [
    "MODELS",
    "Affine",
    "Conv2d",
    "Dropout",
    "Flatten",
    "He",
    "Initializer",
    "Layer",
    "MaxPool2d",
    "Normal",
    "ParameterSpec",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "SoftmaxCrossEntropy",
    "Window",
    "Workspace",
    "Xavier",
    "Zeros",
    "build_model",
    "check_layer",
    "check_network",
    "count_correct",
    "deep_convnet",
    "mlp",
    "numerical_gradient",
    "patches",
    "patches_adjoint",
    "simple_convnet",
]
