"""The networks of *Deep Learning from Scratch*, by name.

A model is a function from an input shape (H, W, C) and a number of classes to a network. The network's outputs are
logits; the loss includes the softmax. Sizes follow from the input shape, which may be any that fits. Networks made for
images larger than 28x28 and 32x32 have two variants; the size of the images selects one (see `variants`).
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from distdl.errors import UserError, unknown_name
from distdl.nn.layers import Shape
from distdl.nn.models.convnets import alexnet, deep_convnet, lenet, simple_convnet
from distdl.nn.models.googlenet import googlenet
from distdl.nn.models.multilayer import logistic, mlp
from distdl.nn.models.resnet import resnet18, resnet20, resnet50
from distdl.nn.models.vgg import vgg11, vgg16
from distdl.nn.network import Sequential

Model: TypeAlias = Callable[..., Sequential]
"""Called as ``model(input_shape, classes)``; ours also take ``dtype``."""

MODELS: dict[str, Model] = {
    model.__name__: model
    for model in (
        *(logistic, mlp, simple_convnet, deep_convnet, lenet, alexnet),
        *(vgg11, vgg16, googlenet, resnet18, resnet20, resnet50),
    )
}


def build_model(name: str, input_shape: Shape, classes: int, /, **settings: Any) -> Sequential:
    """Return the model with this name; `settings` may give ``dtype`` (float32), and those of `mlp` and `lenet`.

    Raises `UserError` for an unknown name or setting, or, naming the layer, for a size that does not fit.

    >>> build_model("simple_convnet", (28, 28, 1), 10).parameter_count
    433890
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    if classes < 1:
        raise UserError(f"{classes} classes given, expected at least 1")
    known = set(list(inspect.signature(MODELS[name]).parameters)[2:]) - {"dtype"}
    for setting in settings.keys() - {"dtype"}:
        if not known:
            raise UserError(f"the model {name} has no settings, and {setting} is given: leave it out")
        if setting not in known:
            raise unknown_name(f"setting of the model {name}", setting, known)
    return MODELS[name](input_shape, classes, **settings)
