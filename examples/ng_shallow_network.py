"""A shallow network with a tanh hidden layer and a sigmoid output separates a flower (Ng, week 3).

    python examples/ng_shallow_network.py

The points are petals of alternating colors, which no straight line separates. Without a hidden layer the network is
logistic regression.
"""

import chapter
import numpy as np

from distdl import nn
from distdl.optim import SGD

PETALS, POINTS = 6, 600


def flower(key):
    """Return points (POINTS, 2) on the petals of r = 4 |sin 3θ|, with some noise, and their colors (POINTS,)."""
    angle = 2 * np.pi * key.of("angle").uniform(POINTS)
    radius = 4 * np.abs(np.sin(PETALS / 2 * angle)) + 0.2 * key.of("radius").normal(POINTS)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points, (angle // (2 * np.pi / PETALS)).astype(int) % 2


def network_with(hidden):
    """Return a network with `hidden` units, 0 for logistic regression; its output is one logit."""
    layers = [nn.Affine(hidden, nn.Normal(0.5)), nn.Tanh()] if hidden else []
    return nn.Sequential([*layers, nn.Affine(1, nn.Normal(0.5))], (2,), dtype=np.float64)


def sigmoid(z):
    """Return 1 / (1 + exp(-z)), in a form that cannot overflow and keeps small probabilities."""
    return np.exp(np.minimum(z, 0)) / (1 + np.exp(-np.abs(z)))


def train(network, x, y, key, steps, learning_rate=1.0):
    """Train on all points at once. The gradient of the binary cross-entropy at the logit z is sigmoid(z) - y."""
    network.initialize(key.of("initialization"))
    optimizer = SGD(network.parameters.size, dtype=np.float64)
    for step in range(1, steps + 1):
        probability = sigmoid(network.forward(x, training=True))
        network.backward((probability - y[:, None]) / len(y))
        optimizer.update(network.parameters, network.gradients, learning_rate, step)


def main(options):
    """Train with 0, 2, 4 and 12 hidden units, and draw the region in which each predicts 1."""
    x, y = flower(options.key)
    grid = np.stack(np.meshgrid(np.linspace(-5, 5, 150), np.linspace(-5, 5, 150)), axis=-1)
    figure, axes = chapter.axes(1, 4, sharey=True)
    accuracies = {}
    for ax, hidden in zip(axes, (0, 2, 4, 12), strict=True):
        network = network_with(hidden)
        train(network, x, y, options.key, 50 if options.quick else 5000)
        accuracies[hidden] = np.mean((network.forward(x)[:, 0] > 0) == y)
        predicts_1 = network.forward(grid.reshape(-1, 2)).reshape(150, 150) > 0
        ax.contourf(grid[..., 0], grid[..., 1], predicts_1, levels=[-0.5, 0.5, 1.5], colors=["mistyrose", "lightblue"])
        ax.scatter(*x.T, c=y, s=4, cmap="RdBu")
        ax.set(title=f"{hidden} hidden units: {accuracies[hidden]:.1%}", aspect="equal")
    chapter.save(figure, options)
    ours = ", ".join(f"{hidden} hidden units {accuracy:.3f}" for hidden, accuracy in accuracies.items())
    options.print(f"accuracy on the {POINTS} points: {ours} (the course uses other points)")


if __name__ == "__main__":
    chapter.run(main, __doc__)
