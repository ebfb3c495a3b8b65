"""Networks of a few layers for tests of compiled kernels."""

import numpy as np

from distdl.nn import Sequential
from distdl.nn.kernels import PLAIN
from distdl.nn.kernels.compiled import COMPILED
from distdl.rng import Key
from tests.nn.kernels.exact import numbers


def network(layers, shape, kernels):
    """Return a network whose parameters are normal random numbers; its backward returns the input gradient."""
    built = Sequential(layers, shape, kernels=kernels)
    built.bind(needs_input_gradient=True)
    if kernels is COMPILED:  # a released gradient becomes NaN
        built.stack.kernels._gradients.poison = True
    built.parameters[:] = numbers(built.parameters.shape, 5)
    return built


def compiled_outcome(layers, x, dy=None, *, training=True):
    """Return y and dx; assert that the kernels are compiled and all layers run together."""
    built = network(layers, x.shape[1:], COMPILED)
    ((*_, fused),) = built.stack.segments
    assert fused is not None
    return _outcome(built, x, dy, training=training)


def plain_outcome(layers, x, dy=None, *, training=True):
    return _outcome(network(layers, x.shape[1:], PLAIN), x, dy, training=training)


def _outcome(built, x, dy, *, training):
    y = built.forward(x, training=training, key=Key(1)).copy()
    return y, built.backward(numbers(y.shape, 2) if dy is None else dy).copy()


def assert_close(actual, expected, tolerance=1e-5):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max(initial=1))
