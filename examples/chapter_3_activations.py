"""Step, sigmoid, ReLU, tanh and leaky ReLU with their derivatives, in one figure; softmax (sections 3.2, 3.5).

    python examples/chapter_3_activations.py

The step function is defined here, because a network cannot learn through it: its derivative is 0. The others are layers
of the library. Their `backward` of ones returns the derivative (Ng, week 3).
"""

import chapter
import numpy as np

from distdl import nn

LAYERS = {"sigmoid": nn.Sigmoid(), "ReLU": nn.ReLU(), "tanh": nn.Tanh(), "leaky ReLU": nn.LeakyReLU(0.01)}


def step_function(x):
    """Return 1 for x > 0, else 0 (section 3.2.1)."""
    return np.where(x > 0, 1, 0)


def value_and_derivative(layer, x):
    """Return the output of a layer for x (N,), and its derivative."""
    network = nn.Sequential([layer], (1,), dtype=np.float64)
    y = network.forward(x[:, None]).ravel().copy()
    return y, layer.backward(np.ones((len(x), 1))).ravel().copy()


def softmax(a):
    """Return exp(a) / Σ exp(a). The maximum is subtracted first, so that nothing overflows (section 3.5.2)."""
    exponentials = np.exp(a - a.max())
    return exponentials / exponentials.sum()


def main(options):
    """Draw the functions and their derivatives; print a few known values."""
    x = np.linspace(-5, 5, 501)
    figure, (values, derivatives) = chapter.axes(1, 2)
    values.plot(x, step_function(x), "k--", label="step")
    for name, layer in LAYERS.items():
        y, dy = value_and_derivative(layer, x)
        values.plot(x, y, label=name)
        derivatives.plot(x, dy, label=name)
    values.set(title="activations", xlabel="x", ylim=(-1.1, 2))
    derivatives.set(title="derivatives", xlabel="x")
    values.legend()
    chapter.save(figure, options)

    options.print(f"step of -1, 0, 1, 2: {step_function(np.array([-1, 0, 1, 2])).tolist()}")
    points = np.array([-1.0, 0.0, 1.0])
    for name, layer in LAYERS.items():
        y, dy = value_and_derivative(layer, points)
        options.print(f"{name} of -1, 0, 1: {np.round(y, 4).tolist()}, derivative {np.round(dy, 4).tolist()}")
    probabilities = softmax(np.array([1010.0, 1000.0, 990.0]))
    options.print(f"softmax of 1010, 1000, 990: {probabilities.tolist()}")
    options.print(f"it sums to {probabilities.sum():.12f} (the book: 1)")


if __name__ == "__main__":
    chapter.run(main, __doc__)
