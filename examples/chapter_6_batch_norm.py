"""Training with and without batch normalization, at 16 scales of the initial weights (section 6.3.2).

    python examples/chapter_6_batch_norm.py
    mpirun -n 2 python examples/chapter_6_batch_norm.py --dataset mnist --data-dir FOLDER

1,000 samples, five hidden layers of 100 with ReLU, SGD with learning rate 0.01, batches of 100, 20 epochs. The moments
are those of a micro-batch of 50. So two ranks can share a batch and normalize in the same way.
"""

import chapter
import numpy as np

from distdl import nn
from distdl.optim import SGD

SCALES = np.logspace(0, -4, num=16)
GUESSING = 0.2
"""Twice the accuracy of a guess; a network below it has not learned."""


def accuracies(options, data, scale, epochs, *, batch_norm):
    """Return the accuracy on the training samples after each epoch."""
    network = chapter.multi_layer_net(data, [100] * 5, nn.Normal(scale), batch_norm=batch_norm)
    training = chapter.Training(options, network, SGD, 0.01, micro_batch_size=50)
    curve = []
    for step, (images, labels) in enumerate(chapter.batches(data, 100, epochs, options.key), start=1):
        training.step(images, labels)
        if step % 10 == 0:
            curve.append(chapter.accuracy(network, data.images, data.labels))
    return curve


def main(options):
    """Draw both curves for each scale, and count the scales."""
    data = chapter.pixels(options)
    scales, epochs = (SCALES[5:11:5], 7) if options.quick else (SCALES, 20)
    data.images, data.labels = data.images[:1000], data.labels[:1000]
    figure, axes = chapter.axes(4, 4, sharex=True, sharey=True)
    figure.set_size_inches(12, 9)
    ends = []
    for ax, scale in zip(axes, scales, strict=False):
        curves = [accuracies(options, data, scale, epochs, batch_norm=with_it) for with_it in (True, False)]
        ends.append([curve[-1] for curve in curves])
        ax.plot(curves[0], label="batch normalization")
        ax.plot(curves[1], "--", label="none")
        ax.set(title=f"std {scale:.2g}", ylim=(0, 1))
        options.print(f"std {scale:.5f}: {curves[0][-1]:.3f} with, {curves[1][-1]:.3f} without")
    axes[0].legend()
    chapter.save(figure, options)
    with_it, without = np.transpose(ends)
    options.print(f"scales that do not learn: {sum(with_it < GUESSING)} with, {sum(without < GUESSING)} without")
    options.print(f"ahead with it: at {sum(with_it > without)} of {len(ends)} scales (the book: nearly everywhere)")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
