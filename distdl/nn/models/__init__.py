"""The networks of *Deep Learning from Scratch*, by name.

A model is a function from an input shape (H, W, C) and a number of classes to a network; its output is the
logits, the softmax being part of the loss. Sizes follow from the input shape, which may be any that fits. Networks
made for larger images than 28x28 and 32x32 have two forms, and the image's size decides (see `forms`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from distdl.errors import UserError, unknown_name
from distdl.nn.layers import Shape
from distdl.nn.models.alexnet import alexnet
from distdl.nn.models.convnets import deep_convnet, lenet, simple_convnet
from distdl.nn.models.googlenet import googlenet
from distdl.nn.models.multilayer import logistic, mlp, multilayer_net
from distdl.nn.models.resnet import resnet18, resnet20, resnet50
from distdl.nn.models.vgg import vgg11, vgg16
from distdl.nn.network import Sequential

__all__ = [
    "MODELS",
    "Model",
    "alexnet",
    "build_model",
    "deep_convnet",
    "googlenet",
    "lenet",
    "logistic",
    "mlp",
    "multilayer_net",
    "resnet18",
    "resnet20",
    "resnet50",
    "simple_convnet",
    "vgg11",
    "vgg16",
]

Model: TypeAlias = Callable[..., Sequential]
"""Called as ``model(input_shape, classes)``; ours take ``dtype`` besides."""

MODELS: dict[str, Model] = {
    "logistic": logistic,
    "mlp": mlp,
    "simple_convnet": simple_convnet,
    "deep_convnet": deep_convnet,
    "lenet": lenet,
    "alexnet": alexnet,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "googlenet": googlenet,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
}


def build_model(name: str, input_shape: Shape, classes: int, /, **settings: Any) -> Sequential:
    """Return the model of this name; `settings` may give ``dtype`` (float32), and those of `mlp` and `lenet`.

    Raises `UserError` for an unknown name or setting, or a size that does not fit, naming the layer.

    >>> build_model("simple_convnet", (28, 28, 1), 10).parameter_count
    433890
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    if classes < 1:
        raise UserError(f"{classes} classes given, expected at least 1")
    known = list(inspect.signature(MODELS[name]).parameters)[2:]
    for setting in settings:
        if setting not in known:
            raise unknown_name(f"setting of the model {name}", setting, [one for one in known if one != "dtype"])
    return MODELS[name](input_shape, classes, **settings)
