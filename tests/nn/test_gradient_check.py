"""Every backward agrees with central differences, and the check finds a wrong backward."""

from __future__ import annotations

import numpy as np
import pytest

from distdl.errors import UserError
from distdl.nn import (
    Affine,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    MaxPool2d,
    MeanSquaredError,
    ParameterSpec,
    ReLU,
    Sigmoid,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    Zeros,
    build_model,
    check_layer,
    check_network,
    numerical_gradient,
)
from distdl.rng import Key

from .oracles import normal

LAYERS = {
    "affine": (Affine(3), (5,)),
    "flatten": (Flatten(), (3, 2, 2)),
    "relu": (ReLU(), (4, 4, 2)),
    "sigmoid": (Sigmoid(), (4, 4, 2)),
    "dropout": (Dropout(0.4), (20,)),
    "convolution": (Conv2d(3, 3, padding=1), (5, 5, 2)),
    "convolution, padding beyond the kernel": (Conv2d(2, 2, padding=3), (3, 4, 2)),
    "convolution without bias": (Conv2d(3, 3, padding=1, bias=False), (5, 5, 2)),
    "convolution, stride 2": (Conv2d(3, (3, 2), stride=2, padding=1), (6, 5, 2)),
    "pooling": (MaxPool2d(2), (5, 6, 2)),
    "pooling, overlapping": (MaxPool2d(3, 2, padding=1), (6, 6, 2)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_each_layer_agrees_with_central_differences(case, training):
    assert check_layer(*LAYERS[case], training=training) < 1e-7


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", ["logistic", "mlp", "simple_convnet", "deep_convnet"])
def test_whole_models_agree_with_central_differences(model, training):
    network = build_model(model, (8, 8, 1), 5, dtype=np.float64)
    network.initialize(Key(0))
    network.parameters += 0.02 * normal(network.parameters.shape, "noise")
    before = network.parameters.copy()
    x, labels = normal((3, 8, 8, 1)), np.array([4, 0, 2])
    assert check_network(network, x, labels, elements=10, training=training, key=Key(1)) < 1e-6
    assert (network.parameters == before).all(), "the check restores the parameters"


class Scale(Layer):
    """``y = a x`` with one parameter per element; its gradients can be wrong on purpose."""

    def __init__(self, dx_error=0.0, da_error=0.0):
        self.dx_error, self.da_error = dx_error, da_error

    def build(self, input_shape, dtype):
        self.shape = super().build(input_shape, dtype)
        return self.shape

    def parameter_specs(self):
        return [ParameterSpec("a", self.shape, Zeros(), fan_in=1)]

    def forward(self, x, *, training, key):
        self.x = x
        return self.parameters["a"] * x

    def backward(self, dy):
        self.gradients["a"][...] = (dy * self.x).sum(axis=0) * (1 + self.da_error)
        return dy * self.parameters["a"] * (1 + self.dx_error)


def test_a_users_own_layer_can_be_checked():
    assert check_layer(Scale(), (4, 4, 2)) < 1e-7


@pytest.mark.parametrize("error", [{"dx_error": 1e-3}, {"da_error": 1e-3}])
def test_a_wrong_gradient_is_found(error):
    assert check_layer(Scale(**error), (4, 4, 2)) > 5e-4


def test_a_wrong_gradient_is_found_in_a_network():
    network = build_model("mlp", (4, 4, 1), 3, dtype=np.float64)
    network.initialize(Key(0))
    correct = network.layers[2].backward
    network.layers[2].backward = lambda dy: 1.01 * correct(dy)
    assert check_network(network, normal((2, 4, 4, 1)), np.array([0, 2])) > 5e-3


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (None, 3, np.array([0, 2])),
        (SoftmaxCrossEntropy(), 3, np.array([0, 2])),
        (SigmoidCrossEntropy(), 1, np.array([0, 1])),
        (MeanSquaredError(), 2, np.array([[0.5, -1.0], [3.0, 0.0]])),
    ],
    ids=["none", "softmax", "sigmoid", "squares"],
)
def test_a_network_can_be_checked_with_any_loss(loss, outputs, targets):
    network = build_model("mlp", (4, 4, 1), outputs, dtype=np.float64)
    network.initialize(Key(0))
    x = normal((2, 4, 4, 1))
    assert check_network(network, x, targets, loss) < 1e-6
    if loss is not None:
        correct = loss.backward
        loss.backward = lambda: 1.01 * correct()
        assert check_network(network, x, targets, loss) > 5e-3


def test_a_backward_without_a_gradient_is_named():
    class Silent(Layer):
        def backward(self, dy):
            return None

    with pytest.raises(UserError, match="Silent: backward returned no array"):
        check_layer(Silent(), (3,))


def test_the_numerical_gradient_of_the_book():
    """Section 4.4: the gradient of x0**2 + x1**2 at (3, 4) is (6, 8)."""
    x = np.array([3.0, 4.0])
    assert numerical_gradient(lambda: float((x**2).sum()), x) == pytest.approx([6, 8], rel=1e-9)
    assert numerical_gradient(lambda: float((x**2).sum()), x, np.array([1])) == pytest.approx([8], rel=1e-9)
    assert x.tolist() == [3, 4]
    with pytest.raises(UserError, match="float64"):
        numerical_gradient(lambda: 0.0, x.astype(np.float32))
