"""A trained network as an ONNX file: pixels in, logits or numbers out.

The input ``pixels`` is (N, H, W, C), as `distdl.predict` reads an array of images. The graph normalizes them. Inside it
images are (N, C, H, W). The output is (N, K) or, with a class for each pixel, (N, H, W, K).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.errors import UserError
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
from distdl.nn.windows import Window

#: The versions of the operations and of the file, of 2022: newer runtimes read them too.
OPSET, IR_VERSION = 17, 8
#: A file has less than two gigabytes, and some of them are not weights.
MOST_BYTES = 2**31 - 2**24


def import_onnx() -> Any:
    """Return the package onnx; raise `UserError` if it is not installed."""
    try:
        return importlib.import_module("onnx")
    except ImportError:
        raise UserError("--to onnx needs onnx, which is not installed: pip install 'distdl-mpi[onnx]'") from None


def onnx_file(trained: Trained) -> bytes:
    """Return the network as the content of an ONNX file; raise `UserError` if it has no form in ONNX."""
    onnx = import_onnx()
    signature, output_shape = trained.signature, trained.network.output_shape
    operations = operations_of(trained.network, FORMS, "ONNX")
    if (size := sum(array.nbytes for _, array in all_arrays(operations))) > MOST_BYTES:
        raise UserError(f"the weights have {size:,} bytes, and an ONNX file holds less than 2³¹: give --to pytorch")
    graph = _Graph(onnx)
    x = _normalized(graph, trained)
    x = _stack(graph, operations, x)
    x = _finished(graph, trained, x)
    types = onnx.TensorProto
    pixels = {"uint8": types.UINT8, "float32": types.FLOAT}[signature.pixels]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "distdl",
            [onnx.helper.make_tensor_value_info("pixels", pixels, ["N", *signature.image_shape])],
            [onnx.helper.make_tensor_value_info(x, types.FLOAT, ["N", *output_shape])],
            graph.initializers,
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="distdl",
    )
    onnx.helper.set_model_props(model, metadata_of(trained))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def metadata_of(trained: Trained) -> dict[str, str]:
    """Return the facts about the network as texts: a text as it is, any other value as JSON."""
    facts = {name: value for name, value in facts_of(trained).items() if value is not None}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def output_name(trained: Trained) -> str:
    """Return the name of the output."""
    return "numbers" if activation_of(trained) is None else "logits"


class _Graph:
    """The nodes and constants of a graph under construction."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self.float32 = onnx.TensorProto.FLOAT
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with the name of its output; return the name."""
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Add an array; return its name."""
        self.initializers.append(self._onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name


def _normalized(graph: _Graph, trained: Trained) -> str:
    """Add the normalization; return the name of the images (N, C, H, W)."""
    normalization = trained.signature.normalization
    x = graph.node("Cast", ["pixels"], "pixels.float32", to=graph.float32)
    x = graph.node("Sub", [x, graph.constant("pixels.mean", normalization.mean)], "pixels.centred")
    x = graph.node("Div", [x, graph.constant("pixels.deviation", normalization.deviation)], "pixels.normalized")
    return graph.node("Transpose", [x], "pixels.channels_first", perm=[0, 3, 1, 2])


def _finished(graph: _Graph, trained: Trained, x: str) -> str:
    """Add the units of a regression, and put the channels of an image last again; return the name of the output."""
    name = output_name(trained)
    if len(trained.network.output_shape) == 3:
        return graph.node("Transpose", [x], name, perm=[0, 2, 3, 1])
    targets = trained.signature.target_normalization
    if targets is None:
        return graph.node("Identity", [x], name)
    x = graph.node("Mul", [x, graph.constant("targets.deviation", targets.deviation)], "targets.scaled")
    return graph.node("Add", [x, graph.constant("targets.mean", targets.mean)], name)


def _stack(graph: _Graph, operations: Sequence[Operation], x: str, prefix: str = "") -> str:
    """Add operations that run one after another; return the name of the last output."""
    for operation in operations:
        x = FORMS[type(operation.layer)](graph, operation, x, prefix + operation.name)
    return x


Form = Callable[[_Graph, Operation, str, str], str]
"""Adds an operation on `x` under a name; returns the name of its output."""


def _elementwise(kind: str, **attributes: Any) -> Form:
    def form(graph: _Graph, _operation: Operation, x: str, name: str) -> str:
        return graph.node(kind, [x], name, **attributes)

    return form


def _absent(_graph: _Graph, _operation: Operation, x: str, _name: str) -> str:
    """Return the input: in evaluation, dropout passes it on."""
    return x


def _with_arrays(graph: _Graph, operation: Operation, x: str, name: str) -> list[str]:
    """Add the arrays of an operation; return the names of all inputs."""
    return [x, *(graph.constant(f"{name}.{own}", array) for own, array in operation.arrays.items())]


def _geometry(window: Window) -> dict[str, Any]:
    return {"kernel_shape": window.kernel, "strides": window.stride, "pads": [*window.padding, *window.padding]}


def _convolution(kind: str) -> Form:
    def form(graph: _Graph, operation: Operation, x: str, name: str) -> str:
        inputs = _with_arrays(graph, operation, x, name)
        return graph.node(kind, inputs, name, **_geometry(operation.layer.window))

    return form


def _affine(graph: _Graph, operation: Operation, x: str, name: str) -> str:
    return graph.node("Gemm", _with_arrays(graph, operation, x, name), name, transB=1)


def _batch_norm(graph: _Graph, operation: Operation, x: str, name: str) -> str:
    inputs = _with_arrays(graph, operation, x, name)
    return graph.node("BatchNormalization", inputs, name, epsilon=float(operation.layer.epsilon))


def _leaky_relu(graph: _Graph, operation: Operation, x: str, name: str) -> str:
    return graph.node("LeakyRelu", [x], name, alpha=float(operation.layer.slope))


def _local_response_norm(graph: _Graph, operation: Operation, x: str, name: str) -> str:
    layer = operation.layer
    if layer.size % 2 == 0:
        raise UserError(
            f"{name} ({layer}) has an even window, which has no form in ONNX runtimes: give --to pytorch or --to npz"
        )
    settings = {"alpha": float(layer.alpha), "beta": float(layer.beta), "bias": float(layer.k)}
    return graph.node("LRN", [x], name, size=layer.size, **settings)


def _pooling(kind: str, **attributes: Any) -> Form:
    def form(graph: _Graph, operation: Operation, x: str, name: str) -> str:
        layer, window = operation.layer, operation.layer.window
        if any(margin >= size for margin, size in zip(window.padding, window.kernel, strict=True)):
            raise UserError(
                f"{name} ({layer}) has a padding as large as its window, which has no form in ONNX: give --to pytorch "
                "or --to npz"
            )
        return graph.node(kind, [x], name, **_geometry(window), **attributes)

    return form


def _global_mean(graph: _Graph, _operation: Operation, x: str, name: str) -> str:
    x = graph.node("GlobalAveragePool", [x], f"{name}.means")
    return graph.node("Flatten", [x], name, axis=1)


def _flatten(graph: _Graph, operation: Operation, x: str, name: str) -> str:
    if operation.channels_last:
        x = graph.node("Transpose", [x], f"{name}.channels_last", perm=[0, 2, 3, 1])
    return graph.node("Flatten", [x], name, axis=1)


def _upsampling(graph: _Graph, operation: Operation, x: str, name: str) -> str:
    factor = operation.layer.factor
    scales = graph.constant(f"{name}.scales", np.array([1, 1, factor, factor], np.float32))
    return graph.node("Resize", [x, "", scales], name, mode="linear", coordinate_transformation_mode="half_pixel")


def _composite(kind: str, **attributes: Any) -> Form:
    def form(graph: _Graph, operation: Operation, x: str, name: str) -> str:
        outputs = [_stack(graph, inside, x, f"{name}.{branch}.") for branch, inside in operation.branches]
        return graph.node(kind, outputs, name, **attributes)

    return form


FORMS: dict[type[Layer], Form] = {
    Layer: _absent,
    Affine: _affine,
    AvgPool2d: _pooling("AveragePool", count_include_pad=1),
    BatchNorm: _batch_norm,
    Branches: _composite("Concat", axis=1),
    Conv2d: _convolution("Conv"),
    ConvTranspose2d: _convolution("ConvTranspose"),
    Dropout: _absent,
    Flatten: _flatten,
    GlobalAvgPool2d: _global_mean,
    LeakyReLU: _leaky_relu,
    LocalResponseNorm: _local_response_norm,
    MaxPool2d: _pooling("MaxPool"),
    ReLU: _elementwise("Relu"),
    Residual: _composite("Add"),
    Sigmoid: _elementwise("Sigmoid"),
    Softmax: _elementwise("Softmax", axis=1),
    Tanh: _elementwise("Tanh"),
    Upsample2d: _upsampling,
}
