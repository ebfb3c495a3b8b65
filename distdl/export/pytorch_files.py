"""A trained network for PyTorch: a state dict in a safetensors file, and ``model.py``, which needs no distdl.

``model.py`` writes each layer as a module of `torch.nn` under its name in distdl. So the tensors of the state dict have
distdl's names too, except for those of `distdl.nn.pytorch_layouts`. Texts of the user, such as the names of the
classes, enter the program as literals alone: no name can become code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import Template
from typing import TypeAlias

import safetensors.numpy

from distdl.export.facts import activation_of, facts_of
from distdl.export.operations import Operation, all_arrays, operations_of
from distdl.inference.load import Trained
from distdl.nn.activations import LeakyReLU, ReLU, Sigmoid, Softmax, Tanh
from distdl.nn.composites import Branches, Residual
from distdl.nn.convolution import Conv2d, ConvTranspose2d
from distdl.nn.layers import Affine, Dropout, Flatten, Layer
from distdl.nn.normalization import BatchNorm, LocalResponseNorm
from distdl.nn.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from distdl.nn.upsampling import Upsample2d
from distdl.nn.windows import Pair

PROGRAM, WEIGHTS = "model.py", "model.safetensors"
INDENT = "    "


def pytorch_files(trained: Trained) -> dict[str, bytes]:
    """Return the content of each file by its name; raise `UserError` if the network has no form in PyTorch."""
    operations = operations_of(trained.network, FORMS, "PyTorch")
    weights = safetensors.numpy.save(dict(all_arrays(operations)), metadata={"format": "pt"})
    return {WEIGHTS: weights, PROGRAM: _program(trained, operations).encode()}


def _program(trained: Trained, operations: Sequence[Operation]) -> str:
    """Return the text of ``model.py``."""
    layers = _stack(operations, depth=4)
    has_targets = trained.signature.target_normalization is not None
    return TEXT.substitute(
        outputs=OUTPUTS[activation_of(trained), trained.signature.task],
        pixels=PIXELS[trained.signature.pixels],
        constants=_constants(trained),
        modules="".join(text for name, text in MODULES.items() if f"{name}(" in layers),
        layers=layers,
        buffers=TARGET_BUFFERS if has_targets else "",
        units=" * self.target_deviation + self.target_mean" if has_targets else "",
    )


def _constants(trained: Trained) -> str:
    """Return the facts as assignments of literals, on lines of their own."""
    H, W, C = trained.signature.image_shape
    facts = {**facts_of(trained), "image_shape": (C, H, W)}
    return "\n".join(f"{name.upper()} = {value!r}" for name, value in facts.items() if value is not None)


def _stack(operations: Sequence[Operation], depth: int) -> str:
    """Return operations as arguments, each on a line of its own: ``conv2d_1=nn.Conv2d(1, 30, 5),``."""
    return "".join(f"{INDENT * depth}{one.name}={FORMS[type(one.layer)](one, depth)},\n" for one in operations)


Form: TypeAlias = Callable[[Operation, int], str]
"""Returns the expression of an operation; one of several lines is indented to the depth."""


def _call(name: str, *values: object, **settings: tuple[object, object]) -> str:
    """Return a call as text. Each setting is a value and its default in PyTorch, which is left out."""
    named = [f"{key}={value!r}" for key, (value, default) in settings.items() if value != default]
    return f"{name}({', '.join([*map(repr, values), *named])})"


def _fixed(text: str) -> Form:
    return lambda _operation, _depth: text


def _size(pair: Pair) -> int | Pair:
    return pair[0] if pair[0] == pair[1] else pair


def _convolution(name: str) -> Form:
    def form(operation: Operation, _depth: int) -> str:
        layer, window = operation.layer, operation.layer.window
        settings = {"stride": (_size(window.stride), 1), "padding": (_size(window.padding), 0)}
        settings |= {"bias": ("bias" in operation.arrays, True)}
        return _call(name, layer.channels, layer.filters, _size(window.kernel), **settings)

    return form


def _affine(operation: Operation, _depth: int) -> str:
    return _call("nn.Linear", operation.layer.inputs, operation.layer.outputs)


def _batch_norm(operation: Operation, _depth: int) -> str:
    layer = operation.layer
    kind = "nn.BatchNorm2d" if len(layer.input_shape) == 3 else "nn.BatchNorm1d"
    return _call(kind, layer.channels, eps=(float(layer.epsilon), 1e-5), momentum=(float(layer.momentum), 0.1))


def _pooling(name: str, fill: str) -> Form:
    """Return the form of a pooling. In PyTorch its padding is at most half of the window; a wider one is a layer."""

    def form(operation: Operation, _depth: int) -> str:
        window = operation.layer.window
        (PH, PW), (FH, FW) = window.padding, window.kernel
        is_wide = 2 * PH > FH or 2 * PW > FW
        settings = {"stride": (_size(window.stride), _size(window.kernel))}
        settings |= {"padding": (0 if is_wide else _size(window.padding), 0)}
        pooling = _call(name, _size(window.kernel), **settings)
        return f"nn.Sequential(nn.ConstantPad2d({(PW, PW, PH, PH)}, {fill}), {pooling})" if is_wide else pooling

    return form


def _flatten(operation: Operation, _depth: int) -> str:
    return "nn.Sequential(ChannelsLast(), nn.Flatten())" if operation.channels_last else "nn.Flatten()"


def _local_response_norm(operation: Operation, _depth: int) -> str:
    layer = operation.layer
    settings = {"alpha": (float(layer.alpha), 1e-4), "beta": (float(layer.beta), 0.75), "k": (float(layer.k), 1.0)}
    return _call("nn.LocalResponseNorm", layer.size, **settings)


def _composite(name: str) -> Form:
    def form(operation: Operation, depth: int) -> str:
        inner = INDENT * (depth + 1)
        branches = [
            f"{inner}{branch}=stack(\n{_stack(inside, depth + 2)}{inner}),\n"
            if inside
            else f"{inner}{branch}=stack(),\n"
            for branch, inside in operation.branches
        ]
        return f"{name}(\n{''.join(branches)}{INDENT * depth})"

    return form


FORMS: dict[type[Layer], Form] = {
    Layer: _fixed("nn.Identity()"),
    Affine: _affine,
    AvgPool2d: _pooling("nn.AvgPool2d", "0.0"),
    BatchNorm: _batch_norm,
    Branches: _composite("Branches"),
    Conv2d: _convolution("nn.Conv2d"),
    ConvTranspose2d: _convolution("nn.ConvTranspose2d"),
    Dropout: lambda operation, _depth: _call("nn.Dropout", float(operation.layer.ratio)),
    Flatten: _flatten,
    GlobalAvgPool2d: _fixed("nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())"),
    LeakyReLU: lambda operation, _depth: _call("nn.LeakyReLU", float(operation.layer.slope)),
    LocalResponseNorm: _local_response_norm,
    MaxPool2d: _pooling("nn.MaxPool2d", "-torch.inf"),
    ReLU: _fixed("nn.ReLU()"),
    Residual: _composite("Residual"),
    Sigmoid: _fixed("nn.Sigmoid()"),
    Softmax: _fixed("nn.Softmax(dim=1)"),
    Tanh: _fixed("nn.Tanh()"),
    Upsample2d: lambda operation, _depth: f'nn.Upsample(scale_factor={operation.layer.factor}, mode="bilinear")',
}

#: The outputs, by activation and task.
OUTPUTS = {
    ("softmax", "classification"): "logits (N, K) of the classes in NAMES; `logits.softmax(1)` are probabilities",
    ("sigmoid", "classification"): "the logit (N, 1) of the second class in NAMES; `logit.sigmoid()` is a probability",
    ("softmax", "segmentation"): "logits (N, K, H, W) of the classes in NAMES; `logits.softmax(1)` are probabilities",
    (None, "regression"): "the numbers (N, K) in NAMES, in the units of the labels",
}
PIXELS = {
    "uint8": "Pixels are whole numbers from 0 to 255 as in the training, in uint8 or as floats",
    "float32": "Pixels are floats as in the training",
}
TEXT = Template("""\
\"\"\"A network that distdl has trained. It takes pixels (N, C, H, W), where (C, H, W) is IMAGE_SHAPE.

It returns $outputs.

    network = load()
    outputs = network(pixels)

$pixels; the network normalizes them itself.
\"\"\"

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

$constants

$modules
class Network(nn.Sequential):
    \"\"\"The layers, after the normalization of the pixels.\"\"\"

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
$layers            )
        )
        self.register_buffer("mean", torch.tensor(MEAN).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).reshape(-1, 1, 1), persistent=False)
$buffers
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if tuple(pixels.shape[1:]) != IMAGE_SHAPE:
            raise ValueError(f"pixels are {tuple(pixels.shape)}; expected (N, *{IMAGE_SHAPE})")
        normalized = (pixels.to(self.mean.dtype) - self.mean) / self.deviation
        return super().forward(normalized)$units


def load(weights: str | Path | None = None) -> Network:
    \"\"\"Return the trained network, ready for evaluation; by default with the weights next to this file.\"\"\"
    network = Network()
    network.load_state_dict(load_file(weights or Path(__file__).with_name("model.safetensors")))
    return network.eval()
""")
TARGET_BUFFERS = """\
        self.register_buffer("target_mean", torch.tensor(TARGET_MEAN), persistent=False)
        self.register_buffer("target_deviation", torch.tensor(TARGET_DEVIATION), persistent=False)
"""
#: The modules that `TEXT` needs if the network has them.
MODULES = {
    "stack": """
def stack(**layers: nn.Module) -> nn.Sequential:
    \"\"\"Return layers that run one after another; without layers, the input passes through.\"\"\"
    return nn.Sequential(OrderedDict(layers))

""",
    "Residual": """
class Residual(nn.Module):
    \"\"\"The sum of two branches.\"\"\"

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shortcut(x)

""",
    "Branches": """
class Branches(nn.Module):
    \"\"\"The outputs of several branches, concatenated along the channels.\"\"\"

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)

""",
    "ChannelsLast": """
class ChannelsLast(nn.Module):
    \"\"\"An image (N, C, H, W) as (N, H, W, C): the next layers need its numbers in this order.\"\"\"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)

""",
}
