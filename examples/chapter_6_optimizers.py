"""SGD, Momentum, AdaGrad and Adam on the same network (section 6.1.8).

    python examples/chapter_6_optimizers.py
    mpirun -n 2 python examples/chapter_6_optimizers.py --dataset mnist --data-dir FOLDER

Four hidden layers of 100 with ReLU, He's initial values, batches of 128, 2,000 steps. All optimizers start from the
same weights and get the same batches.
"""

from itertools import islice

import chapter
import numpy as np

from distdl import nn
from distdl.optim import SGD, AdaGrad, Adam, Momentum

#: The learning rates are the defaults of the book's classes.
OPTIMIZERS = {SGD: 0.01, Momentum: 0.01, AdaGrad: 0.01, Adam: 0.001}


def losses(options, data, optimizer, learning_rate, steps):
    """Return the loss of each step's batch, before the step."""
    network = chapter.multi_layer_net(data, [100] * 4, nn.He())
    training = chapter.Training(options, network, optimizer, learning_rate)
    endless = chapter.batches(data, 128, steps, options.key)
    return [training.step(images, labels) for images, labels in islice(endless, steps)]


def main(options):
    """Draw the four curves, and print the mean losses."""
    data, steps = chapter.pixels(options), 60 if options.quick else 2000
    figure, (ax,) = chapter.axes(1, 1)
    means = {}
    for optimizer, rate in OPTIMIZERS.items():
        curve = losses(options, data, optimizer, rate, steps)
        means[optimizer.__name__] = np.mean(curve)
        smooth = np.convolve(curve, np.ones(20) / 20, mode="valid")
        ax.plot(smooth, label=optimizer.__name__)
        last = np.mean(curve[-steps // 10 :])
        options.print(f"{optimizer.__name__}: mean loss {means[optimizer.__name__]:.4f}, of the last tenth {last:.6f}")
    ax.set(xlabel="step", ylabel="loss, mean of 20 batches", yscale="log")
    ax.legend()
    chapter.save(figure, options)
    order = " > ".join(sorted(means, key=means.get, reverse=True))
    options.print(f"by mean loss over all steps: {order} (the book: SGD slowest, AdaGrad slightly ahead)")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
