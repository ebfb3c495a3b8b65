"""Neural networks in NumPy: layers, losses, initializers, models and a gradient check.

This package works on arrays and knows no ranks, files or configuration.
"""

from distdl.nn.activations import LeakyReLU, ReLU, Sigmoid, Softmax, Tanh
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
from distdl.nn.models import MODELS, build_model
from distdl.nn.models.alexnet import alexnet
from distdl.nn.models.convnets import deep_convnet, lenet, simple_convnet
from distdl.nn.models.googlenet import googlenet
from distdl.nn.models.multilayer import logistic, mlp, multilayer_net
from distdl.nn.models.resnet import resnet18, resnet20, resnet50
from distdl.nn.models.vgg import vgg11, vgg16
from distdl.nn.network import Sequential
from distdl.nn.normalization import BatchNorm, LocalResponseNorm
from distdl.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from distdl.nn.upsampling import Upsample2d
from distdl.nn.windows import Window, patches, patches_adjoint

#: The output of regression (section 3.5) under its usual name; the base class of all layers is the identity.
Identity = Layer

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
    "alexnet",
    "build_model",
    "check_layer",
    "check_network",
    "count_correct",
    "deep_convnet",
    "googlenet",
    "lenet",
    "logistic",
    "make_loss",
    "mlp",
    "multilayer_net",
    "numerical_gradient",
    "patches",
    "patches_adjoint",
    "resnet18",
    "resnet20",
    "resnet50",
    "simple_convnet",
    "vgg11",
    "vgg16",
]
