"""The compiled BatchNorm has the bits of its formula, and the meaning of the layer."""

import numpy as np
import pytest

from distdl.nn import BatchNorm, ReLU, Sequential
from distdl.nn.kernels import PLAIN
from tests.nn.kernels.exact import assert_same_bits, numbers
from tests.nn.kernels.oracles_channels import BatchNormOracle

pytest.importorskip("numba")
from distdl.nn.kernels.compiled import COMPILED, arrays
from distdl.nn.kernels.compiled.batch_norm import CompiledBatchNorm

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")


def network(shape, *, relu, kernels):
    layers = [BatchNorm(), ReLU()] if relu else [BatchNorm()]
    built = Sequential(layers, shape, kernels=kernels)
    built.bind(needs_input_gradient=True)
    built.parameters[:] = numbers(built.parameters.shape, 5)
    built.buffers[:] = np.abs(numbers(built.buffers.shape, 6))
    return built


SHAPES = [
    *((5, 6, 7, C) for C in (1, 3, 6, 16, 24, 30, 64)),
    (1, 40),
    (1, 1, 1, 3),
    (3, 1, 1, 512),
    (70, 17),
    (2, 50, 50, 16),
    (9, 33, 31, 5),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("special", [0, 0.01])
@pytest.mark.parametrize("relu", [False, True])
def test_the_bits_are_those_of_the_formula(shape, special, relu):
    compiled = network(shape[1:], relu=relu, kernels=COMPILED)
    x, dy = numbers(shape, 1, special), numbers(shape, 2, special)
    norm = compiled.layers[0]
    oracle = BatchNormOracle(norm.parameters["gamma"], norm.parameters["beta"], relu=relu)
    assert_same_bits(compiled.forward(x, training=True), oracle.forward(x))
    assert_same_bits(compiled.backward(dy), oracle.backward(dy))
    assert_same_bits(norm.gradients["gamma"], oracle.d_gamma)
    assert_same_bits(norm.gradients["beta"], oracle.d_beta)
    np.testing.assert_array_equal(norm.statistics["mean"], [*oracle.sums, x.size // shape[-1]])
    np.testing.assert_array_equal(norm.statistics["variance"], oracle.squares)
    expected = oracle.evaluate(x, norm.buffers["mean"], norm.buffers["variance"])
    assert_same_bits(compiled.forward(x, training=False), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_output_passes_the_caches_with_the_same_bits(shape, monkeypatch):
    outputs = []
    for least_bytes in (2**60, 0):
        monkeypatch.setattr(arrays, "STREAMED_BYTES", least_bytes)
        outputs.append(network(shape[1:], relu=True, kernels=COMPILED).forward(numbers(shape, 1), training=True))
    assert_same_bits(*outputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_those_of_the_layer(shape):
    outcomes = []
    for kernels in (PLAIN, COMPILED):
        net = network(shape[1:], relu=False, kernels=kernels)
        y = net.forward(3 * numbers(shape, 1) + 2, training=True).copy()
        dx = net.backward(numbers(shape, 2)).copy()
        net.update_buffers(net.statistics)
        outcomes.append((y, dx, net.gradients, net.statistics, net.buffers))
    for plain, compiled in zip(*outcomes, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=2e-4, atol=2e-4 * max(1, abs(plain).max()))


@pytest.mark.parametrize("level", [100.0, 3000.0])
def test_the_moments_stay_accurate_far_from_zero(level):
    x = (level + numbers((8, 40, 40, 3), 1)).astype(np.float32)
    net = network((40, 40, 3), relu=False, kernels=COMPILED)
    net.forward(x, training=True)
    sums, squares = (net.layers[0].statistics[name] for name in ("mean", "variance"))
    M = sums[-1]
    mean = sums[:-1] / M
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=(0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(squares / M - mean * mean, exact.var(axis=(0, 1, 2)), rtol=1e-3)


def test_a_single_pixel_becomes_beta():
    net = network((3,), relu=False, kernels=COMPILED)
    assert_same_bits(net.forward(numbers((1, 3)), training=True)[0], net.layers[0].parameters["beta"])


def test_backward_after_an_evaluation_is_refused():
    net = network((3,), relu=True, kernels=COMPILED)
    net.backward(net.forward(numbers((4, 3)), training=True))
    y = net.forward(numbers((4, 3)), training=False)
    with pytest.raises(ValueError, match="follows a forward in evaluation"):
        net.backward(y)


def test_a_relu_that_follows_is_part_of_it():
    net = network((3,), relu=True, kernels=COMPILED)
    fused = net.stack.segments[0][3]
    assert isinstance(fused, CompiledBatchNorm)
    assert len(net.stack.segments) == 1
