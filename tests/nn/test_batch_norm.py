"""Batch normalization: its formula, its gradient, and the same running moments for any split into micro-batches."""

import numpy as np
import pytest

from distdl.errors import UserError
from distdl.nn import Affine, BatchNorm, Conv2d, Flatten, ReLU, Sequential, check_layer
from distdl.rng import Key

from .oracles import built, normal, relative_error


@pytest.mark.parametrize("shape", [(5,), (1,), (3, 2, 4)])
def test_the_gradient_equals_central_differences(shape):
    assert check_layer(BatchNorm(), shape, samples=7, training=True) < 1e-6


@pytest.mark.parametrize("shape", [(5,), (3, 2, 4)])
def test_training_gives_each_channel_mean_0_and_variance_1_before_gamma_and_beta(shape):
    layer = built(BatchNorm(epsilon=1e-12), shape)
    layer.parameters["gamma"][...], layer.parameters["beta"][...] = 1, 0
    y = layer.forward(3 + 5 * normal((9, *shape)), training=True, key=None).reshape(-1, shape[-1])
    assert y.mean(axis=0) == pytest.approx(np.zeros(shape[-1]), abs=1e-12)
    assert y.var(axis=0) == pytest.approx(np.ones(shape[-1]))


def test_a_constant_channel_becomes_beta_not_nan():
    layer = built(BatchNorm(), (2,), np.float32)
    y = layer.forward(np.full((4, 2), 1e6, np.float32), training=True, key=None)
    assert y == pytest.approx(np.broadcast_to(layer.parameters["beta"], (4, 2)))
    assert np.isfinite(layer.backward(np.ones((4, 2), np.float32))).all()


def test_evaluation_uses_the_running_moments_alone():
    layer = built(BatchNorm(), (3,))
    x = normal((4, 3))
    assert layer.forward(x, training=False, key=None) == pytest.approx(
        layer.parameters["gamma"] * x / np.sqrt(1 + 1e-5) + layer.parameters["beta"]
    ), "mean 0 and variance 1 before the first step"
    layer.buffers["mean"][...], layer.buffers["variance"][...] = [1, 2, 3], [4, 9, 16]
    expected = (x - [1, 2, 3]) / np.sqrt(np.array([4, 9, 16]) + 1e-5)
    assert layer.forward(x, training=False, key=None) == pytest.approx(
        layer.parameters["gamma"] * expected + layer.parameters["beta"]
    )
    one_by_one = [layer.forward(x[i : i + 1], training=False, key=None).copy() for i in range(4)]
    assert np.concatenate(one_by_one) == pytest.approx(layer.forward(x, training=False, key=None))


def test_a_backward_after_an_evaluation_is_refused():
    layer = built(BatchNorm(), (3,))
    layer.forward(normal((4, 3)), training=True, key=None)
    layer.forward(normal((4, 3)), training=False, key=None)
    with pytest.raises(ValueError, match="call forward with training=True"):
        layer.backward(normal((4, 3), "dy"))


def network_of():
    layers = [Conv2d(4, 3, padding=1), BatchNorm(), ReLU(), Flatten(), Affine(5), BatchNorm()]
    network = Sequential(layers, (4, 5, 2), dtype=np.float64)
    network.initialize(Key(1))
    return network


def test_sums_of_micro_batches_give_the_running_moments_of_the_batch():
    network = network_of()
    x = 2 + 3 * normal((12, 4, 5, 2))
    assert [name for name, _ in network.named_buffers()] == [
        "batchnorm_1.mean",
        "batchnorm_1.variance",
        "batchnorm_2.mean",
        "batchnorm_2.variance",
    ]
    sums = np.zeros(network.statistics.shape)
    for start, stop in ((0, 5), (5, 6), (6, 12)):  # unequal on purpose
        network.forward(x[start:stop], training=True)
        sums += network.statistics
    network.update_buffers(sums)
    first = Sequential([Conv2d(4, 3, padding=1)], (4, 5, 2), dtype=np.float64)
    first.parameters[...] = network.parameters[: first.parameters.size]
    rows = first.forward(x).reshape(-1, 4)
    buffers = dict(network.named_buffers())
    assert buffers["batchnorm_1.mean"] == pytest.approx(0.1 * rows.mean(axis=0))
    assert buffers["batchnorm_1.variance"] == pytest.approx(0.9 + 0.1 * rows.var(axis=0, ddof=1))


def test_with_a_share_the_moments_move_only_so_far():
    moved, whole = network_of(), network_of()
    for network, share in ((moved, 0.25), (whole, 1.0)):
        network.forward(2 + 3 * normal((5, 4, 5, 2)), training=True)
        network.update_buffers(network.statistics.copy(), share=share)
    before = network_of().buffers
    assert moved.buffers == pytest.approx(before + 0.25 * (whole.buffers - before), rel=1e-12)
    assert (moved.buffers != before).any()


@pytest.mark.parametrize("shape", [(3,), (1, 1, 3)])
def test_a_single_number_becomes_beta_and_does_not_change_the_running_moments(shape):
    layer = built(BatchNorm(), shape)
    x = normal((1, *shape))
    y = layer.forward(x, training=True, key=None)
    assert y.reshape(-1).tolist() == layer.parameters["beta"].tolist()
    before = {name: array.copy() for name, array in layer.buffers.items()}
    layer.update_buffers()
    assert all(np.array_equal(layer.buffers[name], before[name]) for name in before)


def test_gamma_and_beta_do_not_decay_and_the_parameters_keep_their_names():
    network = network_of()
    decayed = {
        name
        for name, view in network.named_parameters()
        for where in network.decay_slices
        if np.shares_memory(view, network.parameters[where])
    }
    assert decayed == {"conv2d_1.weight", "affine_1.weight"}
    views = dict(network.named_parameters())
    assert views["batchnorm_1.gamma"].tolist() == [1] * 4
    assert views["batchnorm_1.beta"].tolist() == [0] * 4


@pytest.mark.parametrize("shape", [(6,), (4, 3, 5)])
def test_batch_norm_equals_pytorchs(shape):
    torch = pytest.importorskip("torch")
    x, C = 1 + 2 * normal((8, *shape)), shape[-1]
    ours = Sequential([BatchNorm()], shape, dtype=np.float64)
    layer = ours.layers[0]
    layer.needs_input_gradient = True
    ours.initialize(Key(0))
    for name in ("gamma", "beta"):
        layer.parameters[name][...] = normal((C,), name)
    theirs = (torch.nn.BatchNorm1d if len(shape) == 1 else torch.nn.BatchNorm2d)(C, dtype=torch.float64)
    axes = (0, 3, 1, 2) if len(shape) == 3 else (0, 1)
    back = (0, 2, 3, 1) if len(shape) == 3 else (0, 1)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(layer.parameters["gamma"]))
        theirs.bias.copy_(torch.tensor(layer.parameters["beta"]))
    for step in range(3):
        t = torch.tensor((x + step).transpose(axes).copy(), requires_grad=True)
        expected = theirs(t)
        y = ours.forward(x + step, training=True)
        assert relative_error(y, expected.detach().numpy().transpose(back)) < 1e-10
        dy = normal(y.shape, "dy")
        theirs.zero_grad()
        expected.backward(torch.tensor(dy.transpose(axes).copy()))
        assert relative_error(layer.backward(dy), t.grad.numpy().transpose(back)) < 1e-10
        assert relative_error(layer.gradients["gamma"], theirs.weight.grad.numpy()) < 1e-10
        assert relative_error(layer.gradients["beta"], theirs.bias.grad.numpy()) < 1e-10
        ours.update_buffers(ours.statistics.copy())
    assert relative_error(layer.buffers["mean"], theirs.running_mean.numpy()) < 1e-10
    assert relative_error(layer.buffers["variance"], theirs.running_var.numpy()) < 1e-10
    theirs.eval()
    y = ours.forward(x)
    assert relative_error(y, theirs(torch.tensor(x.transpose(axes).copy())).detach().numpy().transpose(back)) < 1e-10


@pytest.mark.parametrize("settings", [{"momentum": 0.0}, {"momentum": 1.5}, {"epsilon": 0.0}])
def test_invalid_settings_are_one_line(settings):
    with pytest.raises(UserError, match="expected a momentum above 0 and at most 1"):
        BatchNorm(**settings)
