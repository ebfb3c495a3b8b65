"""Write your own layer, check its gradients, build a network with it, and train it on any number of ranks.

    python examples/own_network.py
    mpirun -n 3 python examples/own_network.py

The layer knows nothing of ranks. Any number of ranks gives the same receipt, because `forward` and `backward` are pure
functions of their arguments and of the parameters.
"""
# ruff: noqa: ARG001, ARG002  every forward and every initializer takes the same arguments, needed or not

import sys

import numpy as np

from distdl import cli, nn
from distdl.config import TrainConfig
from distdl.engine import train
from distdl.errors import UserError
from distdl.parallel import together, world
from distdl.rng import Key


class PReLU(nn.Layer):
    """``y = x`` for x > 0, otherwise ``y = slope x``, with a learned slope for each channel.

    x, y (N, ..., C); slope (C,). Source: He et al. 2015; every slope starts at 0.25.
    """

    def build(self, input_shape, dtype):
        """Accept any input shape (without N), and return the same shape for the output."""
        self.channels = input_shape[-1]
        return super().build(input_shape, dtype)

    def parameter_specs(self):
        """Declare one parameter: its name, shape and initializer. Slopes have no weight decay."""
        return [nn.ParameterSpec("slope", (self.channels,), a_quarter, fan_in=1, decay=False)]

    def forward(self, x, *, training, key):
        """Return y, and keep x for `backward`."""
        self.x = x
        return np.where(x > 0, x, self.parameters["slope"] * x)

    def backward(self, dy):
        """Write ``dslope = Σ dy x``, summed over all x < 0 of a channel, into `gradients`; return dx."""
        d_slope = (dy * np.minimum(self.x, 0)).reshape(-1, self.channels)
        np.sum(d_slope, axis=0, out=self.gradients["slope"])
        return np.where(self.x > 0, dy, self.parameters["slope"] * dy)


def a_quarter(key, shape, fan_in):
    """Return the initial slopes. An initializer with random numbers would draw them from `key`."""
    return np.full(shape, 0.25)


def own_network(input_shape, classes, dtype=np.float32):
    """Return a network for images (H, W, C); its output is one logit per class, and the loss contains the softmax."""
    layers = [
        nn.Conv2d(16, 3, padding=1),
        PReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 3, padding=1),
        PReLU(),
        nn.Flatten(),
        nn.Affine(classes),
    ]
    return nn.Sequential(layers, input_shape, dtype=dtype)


def largest_gradient_error():
    """Compare each `backward` with central differences in float64; return the largest relative error."""
    network = own_network((8, 8, 1), 10, dtype=np.float64)
    network.initialize(Key(0))
    images, labels = Key(1).normal(5 * 8 * 8).reshape(5, 8, 8, 1), np.arange(5)
    error = max(nn.check_layer(PReLU(), (4, 4, 3)), nn.check_network(network, images, labels))
    if error > 1e-6:
        raise UserError(f"the gradients are wrong by {error:.1e} of the largest: fix the layer's backward")
    return error


def main(_arguments):
    """Check the gradients, train, print the results, and return the exit code."""
    communicator = world()
    error = together(communicator, largest_gradient_error)  # an error on one rank is raised on all
    if communicator.rank == 0:
        print(f"gradient check: the largest relative error is {error:.1e}")

    config = TrainConfig(epochs=10, batch_size=64, lr=0.002)
    summary = train(config, communicator, build_network=own_network)
    if communicator.rank == 0:
        print(f"{summary.test_accuracy:.1%} of the test images are correct")
        print(f"the receipt of {summary.ranks} rank(s) is {summary.weights_sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=True))
