"""Layers made of others: gradients, names, both forms, and branches that do not fit together."""

import numpy as np
import pytest

from distdl.errors import UserError
from distdl.nn import (
    Affine,
    BatchNorm,
    Branches,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Tanh,
    check_layer,
)
from distdl.nn.kernels import NUMPY, PLAIN
from distdl.rng import Key

from .oracles import normal, relative_error

COMPOSITES = {
    "a shortcut": lambda: Residual([Conv2d(3, 3, padding=1), Tanh(), BatchNorm(), Conv2d(3, 3, padding=1)]),
    "a shortcut with a smaller image": lambda: Residual(
        [Conv2d(4, 3, stride=2, padding=1), Tanh(), Conv2d(4, 3, padding=1)], [Conv2d(4, 1, stride=2)]
    ),
    "three branches": lambda: Branches(
        [Conv2d(2, 1)],
        [Conv2d(2, 1), Tanh(), Conv2d(4, 3, padding=1)],
        [MaxPool2d(3, stride=1, padding=1), Conv2d(1, 1)],
    ),
    "a single branch": lambda: Branches([Conv2d(2, 3, padding=1), Tanh()]),
    "a branch that is the input": lambda: Branches([], [Conv2d(2, 3, padding=1)]),
    "one in another": lambda: Residual([Branches([Conv2d(1, 1)], [Residual([Tanh()]), Conv2d(2, 1)])]),
    "with dropout": lambda: Residual([Dropout(0.5), Conv2d(3, 1)]),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_gradient_equals_central_differences(name):
    assert check_layer(COMPOSITES[name](), (6, 6, 3), training=True, key=Key(4)) < 1e-6


@pytest.mark.parametrize("name", COMPOSITES)
def test_both_forms_of_a_network_with_a_composite_agree(name):
    def layers():
        return [Conv2d(3, 3, padding=1), ReLU(), COMPOSITES[name](), ReLU(), GlobalAvgPool2d(), Affine(4)]

    fast, plain = (Sequential(layers(), (6, 6, 2), dtype=np.float64, kernels=kernels) for kernels in (NUMPY, PLAIN))
    fast.initialize(Key(2))
    x, dy = normal((5, 6, 6, 2)), normal((5, 4), "dy")
    plain.parameters[...] = fast.parameters
    for changed in (True, False, True):
        fast.parameters += 0.01 * changed  # a chain inside must see it
        plain.parameters[...] = fast.parameters
        for network in (fast, plain):
            with network.constant_parameters():
                for _ in range(2):
                    network.y = network.forward(x, training=True, key=Key(3)).copy()
                    network.backward(dy)
        assert relative_error(fast.y, plain.y) < 1e-10
        assert relative_error(fast.gradients, plain.gradients) < 1e-10


def test_a_composite_in_front_needs_no_input_gradient_and_its_layers_neither():
    network = Sequential(
        [Residual([Conv2d(2, 3, padding=1), ReLU(), Conv2d(2, 3, padding=1)]), Flatten(), Affine(3)], (5, 5, 2)
    )
    residual = network.layers[0]
    assert not residual.needs_input_gradient
    (_, body), _ = residual.members
    assert [layer.needs_input_gradient for layer in body.layers] == [False, True, True]
    network.initialize(Key(0))
    network.forward(normal((2, 5, 5, 2), dtype=np.float32))
    network.backward(normal((2, 3), "dy", np.float32))
    assert all(np.abs(gradient).max() > 0 for _, gradient in network.named_gradients())


def test_parameters_and_buffers_are_named_after_the_branch_and_the_layer():
    network = Sequential(
        [
            Residual([Conv2d(2, 1), BatchNorm()], [Conv2d(2, 1)]),
            Branches([Conv2d(1, 1)], [Conv2d(1, 1), BatchNorm()]),
        ],
        (4, 4, 2),
    )
    names = [name for name, _ in network.named_parameters()]
    assert "residual_1.body.conv2d_1.weight" in names
    assert "residual_1.shortcut.conv2d_1.bias" in names
    assert "branches_1.branch_2.batchnorm_1.gamma" in names
    assert len(set(names)) == len(names) == 12
    assert [name for name, _ in network.named_buffers()] == [
        "residual_1.body.batchnorm_1.mean",
        "residual_1.body.batchnorm_1.variance",
        "branches_1.branch_2.batchnorm_1.mean",
        "branches_1.branch_2.batchnorm_1.variance",
    ]
    network.initialize(Key(0))
    network.forward(normal((3, 4, 4, 2), dtype=np.float32), training=True)
    network.update_buffers(network.statistics.copy())
    assert all((view != (name.endswith("variance"))).any() for name, view in network.named_buffers())


@pytest.mark.parametrize("kernels", [NUMPY, PLAIN])
def test_a_single_branch_gives_the_bits_of_its_layers(kernels):
    def layers():
        return [Conv2d(2, 3, padding=1), Tanh()]

    alone, inside = (Sequential(given, (4, 5, 3), kernels=kernels) for given in (layers(), [Branches(layers())]))
    alone.initialize(Key(0))
    inside.parameters[...] = alone.parameters
    x, dy = normal((3, 4, 5, 3), dtype=np.float32), normal((3, 4, 5, 2), "dy", np.float32)
    results = []
    for network in (alone, inside):
        network.bind(needs_input_gradient=True)
        results.append((network.forward(x).tobytes(), network.backward(dy).tobytes(), network.gradients.tobytes()))
    assert results[0] == results[1]


def test_dropout_masks_of_different_branches_differ():
    network = Sequential([Branches([Dropout(0.5)], [Dropout(0.5)])], (100,))
    y = network.forward(np.ones((1, 100), np.float32), training=True, key=Key(0))
    assert (y[:, :100] != y[:, 100:]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Residual([Conv2d(4, 1)]),
            "residual_1 .*the body's output is 4x4x4, the shortcut's 4x4x2: expected the same",
        ),
        (lambda: Branches([Conv2d(1, 3)], [Conv2d(1, 1)]), "the outputs of the branches are 2x2x1, 4x4x1"),
        (lambda: Residual([Affine(3)]), "affine_1 .*is not flat"),
        (lambda: Residual([]), "expected at least one in the body"),
        (Branches, "expected at least one list"),
    ],
)
def test_branches_that_do_not_fit_together_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        Sequential([make()], (4, 4, 2))
