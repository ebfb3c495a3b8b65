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
from distdl.nn.models.convnets import alexnet, deep_convnet, lenet, simple_convnet
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

__all__ = ["Affine", "BatchNorm", "Branches", "Conv2d", "ConvTranspose2d", "Dropout", "Flatten", "LocalResponseNorm"]
__all__ += ["AvgPool2d", "GlobalAvgPool2d", "MaxPool2d", "Residual", "Sequential", "Upsample2d"]
__all__ += ["Identity", "LeakyReLU", "ReLU", "Sigmoid", "Softmax", "Tanh"]
__all__ += ["BufferSpec", "Layer", "ParameterSpec", "Window", "Workspace", "patches", "patches_adjoint"]
__all__ += ["Constant", "He", "Initializer", "Normal", "Xavier", "Zeros"]
__all__ += ["LOSSES", "LossFunction", "MeanSquaredError", "SigmoidCrossEntropy", "SoftmaxCrossEntropy", "make_loss"]
__all__ += ["check_layer", "check_network", "count_correct", "numerical_gradient"]
__all__ += ["MODELS", "alexnet", "build_model", "deep_convnet", "googlenet", "lenet", "logistic", "mlp"]
__all__ += ["multilayer_net", "resnet18", "resnet20", "resnet50", "simple_convnet", "vgg11", "vgg16"]
