"""Training with initial values of zero, standard deviation 0.01, Xavier and He (sections 6.2.1 and 6.2.4).

    python examples/chapter_6_initial_values.py
    mpirun -n 2 python examples/chapter_6_initial_values.py --dataset mnist --data-dir FOLDER

Four hidden layers of 100 with ReLU, SGD with learning rate 0.01, batches of 128, 2,000 steps. Zeros never work: hidden
units with equal weights get equal gradients, so they stay equal.
"""

from itertools import islice

import chapter
import numpy as np

from distdl import nn
from distdl.optim import SGD

INITIALIZERS = {"zeros": nn.Zeros(), "std 0.01": nn.Normal(0.01), "Xavier": nn.Xavier(), "He": nn.He()}


def losses(options, data, network, learning_rate, steps):
    """Train the network, and return the loss of each step's batch."""
    training = chapter.Training(options, network, SGD, learning_rate)
    endless = chapter.batches(data, 128, steps, options.key)
    return [training.step(images, labels) for images, labels in islice(endless, steps)]


def hidden_weights(options, data, initializer, steps):
    """Return the weights (inputs, 64) of the hidden units of a network with sigmoid, after a short training."""
    layers = [nn.Flatten(), nn.Affine(64, initializer), nn.Sigmoid(), nn.Affine(10, initializer)]
    network = nn.Sequential(layers, data.images.shape[1:])
    losses(options, data, network, 0.5, steps)
    return network.layers[1].parameters["weight"]


def main(options):
    """Draw the four curves and the units of both networks; print the final losses."""
    data, steps = chapter.pixels(options), 60 if options.quick else 2000
    figure, (ax, alike, different) = chapter.axes(1, 3)
    last = {}
    for name, initializer in INITIALIZERS.items():
        curve = losses(options, data, chapter.multi_layer_net(data, [100] * 4, initializer), 0.01, steps)
        last[name] = np.mean(curve[-steps // 20 :])
        ax.plot(np.convolve(curve, np.ones(20) / 20, mode="valid"), label=name)
    ax.set(xlabel="step", ylabel="loss, mean of 20 batches", ylim=(0, 2.5))
    ax.legend()
    for place, name in ((alike, "zeros"), (different, "Xavier")):
        weights = hidden_weights(options, data, INITIALIZERS[name], steps=100)
        between = np.ptp(weights, axis=1).max()
        options.print(f"hidden units from {name}: weights to {np.abs(weights).max():.3f}, they differ by {between:.1e}")
        middle = len(weights) // 2  # the images are not blank there
        place.imshow(weights[middle - 25 : middle + 25], cmap="gray", aspect="auto")
        place.set(title=f"weights learned from {name}", xlabel="hidden unit", ylabel="input")
    chapter.save(figure, options)
    ours = ", ".join(f"{name} {loss:.4f}" for name, loss in last.items())
    options.print(f"loss at the end: {ours}; of guessing: {np.log(10):.4f} (the book: std 0.01 does not learn)")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
