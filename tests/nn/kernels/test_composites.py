"""Compiled residual blocks and branches have the bits of their parts and of the sums between them."""

import functools
import operator

import numpy as np
import pytest

from distdl.nn import Affine, AvgPool2d, BatchNorm, Branches, Flatten, LeakyReLU, MaxPool2d, ReLU, Residual, Sequential

pytest.importorskip("numba")
from distdl.nn.kernels import PLAIN
from distdl.nn.kernels.compiled import COMPILED, arrays
from tests.nn.kernels.error_of_kernels import errors_of_resnet
from tests.nn.kernels.exact import assert_same_bits, numbers
from tests.nn.kernels.oracles_channels import BatchNormOracle
from tests.nn.kernels.single_layers import assert_close, compiled_outcome, network, plain_outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
f4 = np.float32
SHAPES = [(3, 5, 7, C) for C in (1, 3, 16, 24)] + [(1, 1), (40, 130)]


def leaky(x):
    return np.where(x > 0, x, x * f4(0.01))


def leaky_gradient(x, dy):
    return np.where(x > 0, dy, dy * f4(0.01))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
def test_a_batch_norm_at_the_end_of_the_body_takes_the_sum_and_the_relu(shape, relu, shortcut):
    body, beside = [LeakyReLU(), BatchNorm()], [BatchNorm()] if shortcut else []
    x, dy = numbers(shape, 1), numbers(shape, 2)
    net = network([Residual(body, beside), *([ReLU()] if relu else [])], shape[1:], COMPILED)
    (residual, *_), segments = net.layers, net.stack.segments
    assert len(segments) == 1
    y = net.forward(x, training=True).copy()
    dx = net.backward(dy)

    def oracle(norm, **keywords):
        return BatchNormOracle(norm.parameters["gamma"], norm.parameters["beta"], **keywords)

    last, other = oracle(body[-1], relu=relu), oracle(beside[0]) if shortcut else None
    addend = other.forward(x) if shortcut else x
    assert_same_bits(y, last.forward(leaky(x), addend))
    d_body = leaky_gradient(x, last.backward(dy))
    assert_same_bits(dx, d_body + (other.backward(last.masked) if shortcut else last.masked))
    assert_same_bits(body[-1].gradients["gamma"], last.d_gamma)
    if shortcut:
        assert_same_bits(beside[0].gradients["beta"], other.d_beta)
    assert_close((y, dx), plain_outcome([residual, *net.layers[1:]], x, dy), 2e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("special", [0, 0.2])
@pytest.mark.parametrize("relu", [False, True])
def test_any_body_is_added_to_its_shortcut(shape, special, relu):
    x, dy = numbers(shape, 1, special), numbers(shape, 2, special)
    y, dx = compiled_outcome([Residual([LeakyReLU()]), *([ReLU()] if relu else [])], x, dy)
    total = leaky(x) + x
    masked = np.where(total > 0, dy, f4(0)) if relu else dy
    assert_same_bits(y, np.maximum(total, f4(0)) if relu else total)
    assert_same_bits(dx, leaky_gradient(x, masked) + masked)


BRANCHES = [
    [[]],
    [[LeakyReLU()], []],
    [[BatchNorm()], [LeakyReLU()], [BatchNorm(), ReLU()]],
    [[], [], [LeakyReLU()], [BatchNorm()]],
    [[LeakyReLU(0.1 * k)] for k in range(1, 9)],
]


@pytest.mark.parametrize("branches", BRANCHES, ids=len)
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (2, 4, 4, 24), (5, 6), (2, 3, 3, 32)])
@pytest.mark.parametrize("streamed_bytes", [0, 2**20])
def test_branches_are_concatenated_and_their_gradients_added_in_order(branches, shape, streamed_bytes, monkeypatch):
    monkeypatch.setattr(arrays, "STREAMED_BYTES", streamed_bytes)
    x, dy = numbers(shape, 1), numbers((*shape[:-1], len(branches) * shape[-1]), 2)
    net = network([Branches(*branches)], shape[1:], COMPILED)
    net.parameters[:] = 1
    y, dx = net.forward(x, training=True).copy(), net.backward(dy)
    parts = []
    for branch, d in zip(branches, np.split(dy, len(branches), axis=-1), strict=True):
        if branch:
            alone = network(branch, shape[1:], COMPILED)
            alone.parameters[:] = 1
            parts.append((alone.forward(x, training=True).copy(), alone.backward(np.ascontiguousarray(d)).copy()))
        else:
            parts.append((x, d))
    outputs, gradients = zip(*parts, strict=True)
    assert_same_bits(y, np.concatenate(outputs, axis=-1))
    assert_same_bits(dx, functools.reduce(operator.add, gradients))


NETWORKS = {
    "residual": lambda: [
        BatchNorm(),
        ReLU(),
        Residual([LeakyReLU(), BatchNorm(), ReLU(), AvgPool2d(3, 1, 1), BatchNorm()]),
        ReLU(),
        Residual([MaxPool2d(3, 2, 1), BatchNorm()], [AvgPool2d(2), LeakyReLU(0.5)]),
        ReLU(),
    ],
    "branches": lambda: [
        BatchNorm(),
        Branches([LeakyReLU()], [BatchNorm(), ReLU(), BatchNorm()], [MaxPool2d(3, 1, 1)]),
        Residual([Branches([Residual([BatchNorm()]), ReLU()]), BatchNorm()]),
    ],
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("needed", [False, True])
def test_networks_with_composites_compute_the_same(name, needed):
    compiled, plain = (
        all_gradients(network(NETWORKS[name](), (10, 8, 3), kernels), needed=needed) for kernels in (COMPILED, PLAIN)
    )
    assert_close(compiled, plain, 1e-3)


def all_gradients(net, *, needed):
    net.bind(needs_input_gradient=needed)
    x = numbers((4, 10, 8, 3), 1)
    y = net.forward(x, training=True).copy()
    dx = net.backward(numbers(y.shape, 2))
    assert (dx is not None) == needed
    evaluated = net.forward(x, training=False).copy()
    return [y, net.gradients.copy(), evaluated, *([dx] if needed else [])]


@pytest.mark.parametrize("composite", [Residual([Flatten()], [Flatten()]), Branches([Flatten()], [])], ids=str)
def test_the_output_gradient_stays_as_it_is(composite):
    """A stack of shapes alone returns its own argument; a composite must not add to it."""
    net = network([composite], (6,), COMPILED)
    y = net.forward(numbers((3, 6), 1), training=True)
    dy = numbers(y.shape, 2)
    before = dy.copy()
    dx = net.backward(dy)
    assert_same_bits(dy, before)
    assert_same_bits(dx, before + before if isinstance(composite, Residual) else before[:, :6] + before[:, 6:])


def test_a_composite_without_need_of_an_input_gradient_returns_none():
    net = Sequential([Residual([Affine(3)]), ReLU(), Branches([Affine(2)])], (3,), kernels=COMPILED)
    y = net.forward(numbers((4, 3), 1), training=True)
    assert net.backward(numbers(y.shape, 2)) is None


def test_the_gradient_of_a_deep_network_is_exact_up_to_rounding_if_the_relus_pass_the_same_elements():
    """An input of a ReLU near 0 may have another sign in float64; then the gradients differ much more."""
    _, _, without = errors_of_resnet(COMPILED, seed=1, samples=16, shape=(16, 16, 1))
    assert without < 2e-5
