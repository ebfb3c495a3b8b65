"""The 3-layer network, forward only: 2-3-2-2, sigmoid between the layers, identity at the end (section 3.4).

    python examples/chapter_3_network.py

It consists of three matrix products. A network of the library with the same weights gives the same output.
"""

import chapter
import numpy as np

from distdl import nn

W1, B1 = np.array([[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]]), np.array([0.1, 0.2, 0.3])
W2, B2 = np.array([[0.1, 0.4], [0.2, 0.5], [0.3, 0.6]]), np.array([0.1, 0.2])
W3, B3 = np.array([[0.1, 0.3], [0.2, 0.4]]), np.array([0.1, 0.2])
X = np.array([1.0, 0.5])


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def forward(x):
    """Return the values of each layer: x (2,), Z1 (3,), Z2 (2,), y (2,)."""
    Z1 = sigmoid(x @ W1 + B1)
    Z2 = sigmoid(Z1 @ W2 + B2)
    return [x, Z1, Z2, Z2 @ W3 + B3]


def library_network():
    """Return the same network, made of the library's layers."""
    layers = [nn.Affine(3), nn.Sigmoid(), nn.Affine(2), nn.Sigmoid(), nn.Affine(2), nn.Identity()]
    network = nn.Sequential(layers, (2,), dtype=np.float64)
    for (_, parameter), value in zip(network.named_parameters(), [W1, B1, W2, B2, W3, B3], strict=True):
        parameter[...] = value
    return network


def main(options):
    """Print the values of each layer, and draw the network with them."""
    neurons = forward(X)
    figure, (ax,) = chapter.axes(1, 1)
    places = [[(layer, (len(held) - 1) / 2 - i) for i in range(len(held))] for layer, held in enumerate(neurons)]
    for weights, left, right in zip((W1, W2, W3), places[:-1], places[1:], strict=True):
        for i, start in enumerate(left):
            for j, end in enumerate(right):
                ax.plot(*zip(start, end, strict=True), color="gray", linewidth=4 * weights[i, j], zorder=1)
    for held, at in zip(neurons, places, strict=True):
        for value, place in zip(held, at, strict=True):
            ax.text(*place, f"{value:.3f}", ha="center", bbox={"boxstyle": "circle", "facecolor": "white"}, fontsize=8)
    ax.set(xlim=(-0.5, 3.5), ylim=(-1.7, 1.7), xticks=range(4), xticklabels=["x", "Z1", "Z2", "y"], yticks=[])
    chapter.save(figure, options)

    y = library_network().forward(X[None])[0]
    options.print(f"Z2 = {neurons[2].round(8).tolist()}, y = {neurons[3].round(8).tolist()}")
    options.print(f"the library's network differs by {np.abs(y - neurons[3]).max():.1e}")
    options.print(f"A1 = {(X @ W1 + B1).round(8).tolist()} (the book: 0.3, 0.7, 1.1)")
    options.print(f"Z1 = {neurons[1].round(8).tolist()} (the book: 0.57444252, 0.66818777, 0.75026011)")


if __name__ == "__main__":
    chapter.run(main, __doc__)
