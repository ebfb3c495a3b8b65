"""How initial values affect the activations: five layers of 100 units, 1,000 inputs (sections 6.2.2 and 6.2.3).

    python examples/chapter_6_activations.py

If the weights are too large, sigmoids saturate at 0 and 1, where they have no gradient. If they are too small, all
activations are nearly equal. Xavier's values keep the spread with sigmoid and tanh, He's with ReLU.
"""

import chapter
import numpy as np

from distdl import nn
from distdl.inference import figures
from distdl.nn import network_copies

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
    """Return the outputs of each layer, (SAMPLES, UNITS) each, for normal inputs."""
    layers = [layer for _ in range(LAYERS) for layer in (nn.Affine(UNITS, initializer), activation())]
    network = nn.Sequential(layers, (UNITS,), dtype=np.float64)
    network.initialize(key.of("initialization"))
    x = key.of("inputs").normal(SAMPLES * UNITS).reshape(SAMPLES, UNITS)
    of_layers = list(network_copies.layer_outputs(network, x).values())[1::2]
    return {f"layer {number}": z for number, z in enumerate(of_layers, start=1)}


def main(options):
    """Draw a row of histograms for each case, and print the spread of each layer."""
    cases = CASES[4:5] if options.quick else CASES
    found = {name: activations(activation, initializer, options.key) for name, activation, initializer in cases}
    for name, of_layers in found.items():
        options.print(
            f"{name}: standard deviation of each layer " + ", ".join(f"{z.std():.3g}" for z in of_layers.values())
        )
    chapter.save(figures.activation_histograms(found, limits=(-1, 1)), options)
    ours = ", ".join(f"{z.mean():.3g}" for z in found["ReLU, std 0.01"].values())
    options.print(f"layer means, ReLU, std 0.01: {ours} (the book: {', '.join(f'{mean:.3g}' for mean in BOOK)})")


if __name__ == "__main__":
    chapter.run(main, __doc__)
