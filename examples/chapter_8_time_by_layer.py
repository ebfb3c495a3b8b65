"""Time of each layer of AlexNet; the convolutions take most of it (section 8.3.1).

    python examples/chapter_8_time_by_layer.py
    python examples/chapter_8_time_by_layer.py --original

AlexNet for 28x28x1, or in its original form for 224x224x3, computes a batch of noise a few times, forward and backward.
The result is the median of each layer. If ReLU is fused with a convolution, its time is part of the convolution's. The
seconds are those of one rank with one thread. They differ from run to run.
"""

from dataclasses import dataclass

import chapter
import numpy as np

from distdl import nn
from distdl.bench.layers import Stopwatch

SAMPLES = 32
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class Options(chapter.Options):
    """The flags of this example."""

    original: bool = False
    """Time AlexNet in its original form, for 224x224x3 and 1,000 classes: half a minute, 2 GB of memory."""


def seconds_by_layer(network, passes, key):
    """Return the seconds of each layer in each direction, {direction: {layer: seconds}}, for one batch."""
    network.initialize(key.of("initialization"))
    shape = (SAMPLES, *network.input_shape)
    images = key.of("images").normal(np.prod(shape)).reshape(shape).astype(np.float32)
    labels, loss = np.arange(SAMPLES) % network.output_shape[0], nn.SoftmaxCrossEntropy()
    watch = Stopwatch()
    for number in range(1 + passes):  # the first pass allocates the buffers, and does not count
        network.watch = watch if number else None
        watch.new_step()
        loss.forward(network.forward(images, training=True, key=key.of("training", number)), labels)
        network.backward(loss.backward())
    names = [name for name, *_ in network.parts(SAMPLES)]
    return {direction: {name: watch.median(direction, name) for name in names} for direction in DIRECTIONS}


def share_of_convolutions(seconds):
    """Return the share of the convolutions in the seconds of all layers, {layer: seconds}."""
    return sum(seconds[name] for name in seconds if name.startswith("conv2d")) / sum(seconds.values())


def main(options):
    """Time each layer on rank 0, and draw the shares."""
    if options.communicator.rank != 0:
        return
    shape, classes = ((224, 224, 3), 1000) if options.original else ((28, 28, 1), 10)
    found = seconds_by_layer(nn.alexnet(shape, classes), 1 if options.quick else 9, options.key)
    figure, axes = chapter.axes(1, 2, sharey=True)
    figure.set_size_inches(9, 5)
    for ax, (direction, seconds) in zip(axes, found.items(), strict=True):
        total = sum(seconds.values())
        colors = ["C1" if name.startswith("conv2d") else "C0" for name in seconds]
        ax.barh(list(seconds), [100 * one / total for one in seconds.values()], color=colors)
        ax.set(title=f"{direction}: {1000 * total:.0f} ms for {SAMPLES} images", xlabel="% of the time")
    axes[0].invert_yaxis()  # first layer at the top
    for name, forward in found["forward"].items():
        options.print(f"{name:20} forward {1000 * forward:8.2f} ms, backward {1000 * found['backward'][name]:8.2f} ms")
    chapter.save(figure, options)
    forward, backward = (share_of_convolutions(found[direction]) for direction in DIRECTIONS)
    options.print(
        f"convolutions, of the time of AlexNet for {shape[0]}x{shape[1]}: forward {forward:.0%}, backward "
        f"{backward:.0%} (the book, forward: 89% on a CPU, 95% on a GPU)"
    )


if __name__ == "__main__":
    chapter.run(main, __doc__, options=Options)
