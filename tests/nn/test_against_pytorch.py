"""Loss and gradients equal those of PyTorch's autograd on the same weights.

The PyTorch side takes our arrays as leaves and converts them to PyTorch's layouts inside the graph: images from
(N, H, W, C) to (N, C, H, W) and kernels from (FH, FW, C, FN) to (FN, C, FH, FW). So autograd returns gradients in our
layout. It computes in float64.
"""

from __future__ import annotations

import numpy as np
import pytest

from distdl.nn import (
    Affine,
    Conv2d,
    Dropout,
    Flatten,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    SoftmaxCrossEntropy,
    build_model,
)
from distdl.rng import Key

from .oracles import normal, relative_error

torch = pytest.importorskip("torch")
functional = torch.nn.functional

KEY = Key(5).of("dropout", 0)


def half_blank_images(N, shape):
    """Return images whose lower half is blank, so that poolings have ties."""
    x = normal((N, *shape))
    x[:, shape[0] // 2 :] = 0
    return x


def pytorch_loss_and_gradients(network, x, labels, training):
    leaves = {
        name: torch.tensor(view, dtype=torch.float64, requires_grad=True) for name, view in network.named_parameters()
    }
    z = torch.tensor(x, dtype=torch.float64)
    if z.ndim == 4:
        z = z.permute(0, 3, 1, 2)
    for layer, name in zip(network.layers, network.layer_names, strict=True):
        weight, bias = leaves.get(f"{name}.weight"), leaves.get(f"{name}.bias")
        if isinstance(layer, Conv2d):
            window = layer.window
            z = functional.conv2d(z, weight.permute(3, 2, 0, 1), bias, window.stride, window.padding)
        elif isinstance(layer, MaxPool2d):
            z = functional.max_pool2d(z, layer.window.kernel, layer.window.stride, layer.window.padding)
        elif isinstance(layer, Flatten):
            z = z.permute(0, 2, 3, 1).flatten(1)
        elif isinstance(layer, Affine):
            z = z @ weight + bias
        elif isinstance(layer, ReLU):
            z = functional.relu(z)
        elif isinstance(layer, Sigmoid):
            z = torch.sigmoid(z)
        elif isinstance(layer, Dropout):
            if training:
                mask = KEY.of(name).mask(z.numel(), 1 - layer.ratio).reshape(z.shape)
                z = z * torch.tensor(mask) / (1 - layer.ratio)
        else:
            pytest.fail(f"no PyTorch counterpart of {layer} is written here")
    loss = functional.cross_entropy(z, torch.tensor(labels), reduction="sum")
    loss.backward()
    return loss.item(), {name: leaf.grad.numpy() for name, leaf in leaves.items()}


def assert_equals_pytorch(network, x, labels, training, tolerance):
    expected_loss, expected = pytorch_loss_and_gradients(network, x, labels, training)
    loss = SoftmaxCrossEntropy()
    logits = network.forward(x.astype(network.dtype), training=training, key=KEY)
    assert loss.forward(logits, labels) == pytest.approx(expected_loss, rel=tolerance)
    network.backward(loss.backward())
    for name, gradient in network.named_gradients():
        assert relative_error(gradient, expected[name]) < tolerance, name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)])
@pytest.mark.parametrize("input_shape", [(28, 28, 1), (15, 18, 3)])
@pytest.mark.parametrize("model", ["logistic", "mlp", "simple_convnet", "deep_convnet"])
def test_models_have_the_loss_and_gradients_of_pytorch(model, input_shape, dtype, tolerance, training):
    network = build_model(model, input_shape, 10, dtype=dtype)
    network.initialize(Key(0))
    network.parameters += 0.02 * normal(network.parameters.shape, "noise")
    x, labels = half_blank_images(8, input_shape), np.arange(8) % 10
    x = x.astype(np.float32).astype(np.float64)  # exactly representable in both
    assert_equals_pytorch(network, x, labels, training, tolerance)


def test_half_blank_images_do_make_poolings_with_several_winners():
    """Without ties the test above could not distinguish one winner from all."""
    layers = [Conv2d(4, 3, padding=1), ReLU(), MaxPool2d(2), Flatten(), Affine(5)]
    network = Sequential(layers, (12, 12, 1), dtype=np.float64)
    network.initialize(Key(0))
    layers[0].parameters["bias"][...] = 0.5  # positive in blank areas, so that gradients pass the ReLU
    x = half_blank_images(4, (12, 12, 1))
    assert_equals_pytorch(network, x, np.arange(4), True, 1e-10)
    activation = layers[1].forward(layers[0].forward(x, training=True, key=None), training=True, key=None)
    windows = activation.reshape(4, 6, 2, 6, 2, 4).swapaxes(2, 3).reshape(4, 6, 6, 4, 4)
    maxima = windows.max(axis=3, keepdims=True)
    assert ((windows == maxima) & (maxima > 0)).sum(axis=3).max() == 4


def test_odd_geometries_have_the_gradients_of_pytorch():
    layers = [
        Conv2d(4, (3, 2), stride=(2, 1), padding=(1, 0)),
        Sigmoid(),
        MaxPool2d(3, 2, padding=1),
        Conv2d(5, (2, 3), padding=(3, 1)),
        ReLU(),
        MaxPool2d((2, 3), (1, 2)),
        Conv2d(3, 2, stride=2),
        Flatten(),
        Affine(6),
    ]
    network = Sequential(layers, (17, 14, 3), dtype=np.float64)
    network.initialize(Key(1))
    network.parameters += 0.1 * normal(network.parameters.shape, "noise")
    assert_equals_pytorch(network, half_blank_images(5, (17, 14, 3)), np.arange(5), False, 1e-10)
