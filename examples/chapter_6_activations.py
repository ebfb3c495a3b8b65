"""What initial values make of the activations: five layers of 100, 1,000 inputs (sections 6.2.2 and 6.2.3).

    python examples/chapter_6_activations.py

Weights too large: sigmoids sit at 0 and 1, where they have no gradient. Too small: all activations are alike. Xavier's
values keep the spread through sigmoid and tanh, He's through ReLU.
"""

import common
import numpy as np

from distdl import nn

LAYERS, UNITS, SAMPLES = 5, 100, 1000
BOOK = (0.0396, 0.0029, 1.97e-4, 1.32e-5, 9.46e-7)
CASES = [
    ("sigmoid, std 1", nn.Sigmoid, nn.Normal(1)),
    ("sigmoid, std 0.01", nn.Sigmoid, nn.Normal(0.01)),
    ("sigmoid, Xavier", nn.Sigmoid, nn.Xavier()),
    ("tanh, Xavier", nn.Tanh, nn.Xavier()),
    ("ReLU, std 0.01", nn.ReLU, nn.Normal(0.01)),
    ("ReLU, Xavier", nn.ReLU, nn.Xavier()),
    ("ReLU, He", nn.ReLU, nn.He()),
]


def activations(activation, initializer, key):
    """Return what comes out of each of the layers, (SAMPLES, UNITS) each, for normal inputs."""
    layers = [layer for _ in range(LAYERS) for layer in (nn.Affine(UNITS, initializer), activation())]
    network = nn.Sequential(layers, (UNITS,), dtype=np.float64)
    network.initialize(key.of("initialization"))
    x = key.of("inputs").normal(SAMPLES * UNITS).reshape(SAMPLES, UNITS)
    found = []
    for layer in network.layers:
        x = layer.forward(x, training=False, key=None)
        if isinstance(layer, activation):
            found.append(x)
    return found


def main(options):
    """Draw a row of histograms for each case, and print the mean and spread of each layer."""
    cases = CASES[4:5] if options.quick else CASES
    figure, axes = common.axes(len(cases), LAYERS)
    figure.set_size_inches(11, 1.6 * len(cases))
    means = {}
    for row, (name, activation, initializer) in enumerate(cases):
        of_layers = activations(activation, initializer, options.key)
        means[name] = [z.mean() for z in of_layers]
        options.say(f"{name}: deviation of each layer " + ", ".join(f"{z.std():.3g}" for z in of_layers))
        for number, z in enumerate(of_layers):
            ax = axes[row * LAYERS + number]
            ax.hist(z.ravel(), bins=30, range=(-1, 1) if activation is nn.Tanh else (0, 1))
            ax.set_title(f"{name}: layer {number + 1}", fontsize=8)
            ax.set(yticks=[], ylim=(0, 7000) if activation is nn.ReLU else None)
    common.save(figure, options)
    ours = ", ".join(f"{mean:.3g}" for mean in means["ReLU, std 0.01"])
    options.say(f"layer means, ReLU, std 0.01: {ours} (the book: {', '.join(f'{mean:.3g}' for mean in BOOK)})")


if __name__ == "__main__":
    common.run(main, __doc__)
