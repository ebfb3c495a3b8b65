"""Inference with a trained network, one image at a time and in batches of 100 (section 3.6).

    python examples/chapter_3_inference.py --dataset mnist --data-dir FOLDER

The book loads the weights of a network 784-50-100-10 with sigmoid. This example trains it first. A batch gives the same
predictions with fewer and larger matrix products, in a fraction of the time.
"""

import time

import chapter
import numpy as np

from distdl import nn
from distdl.optim import Adam


def trained(options, data):
    """Return the network after some epochs of Adam."""
    layers = [nn.Flatten(), nn.Affine(50, nn.Xavier()), nn.Sigmoid(), nn.Affine(100, nn.Xavier()), nn.Sigmoid()]
    network = nn.Sequential([*layers, nn.Affine(10, nn.Xavier())], data.images.shape[1:])
    training = chapter.Training(options, network, Adam, 0.002)
    # Two epochs of MNIST reach about the book's accuracy; the digits are 40 times fewer.
    for images, labels in chapter.batches(data, 100, 2 if len(data.labels) > 10_000 else 30, options.key):
        training.step(images, labels)
    return network


def predict(network, images, batch_size):
    """Return the predicted digit of each image, and the seconds."""
    start = time.perf_counter()
    found = [network.forward(images[i : i + batch_size]).argmax(axis=1) for i in range(0, len(images), batch_size)]
    return np.concatenate(found), time.perf_counter() - start


def main(options):
    """Train, predict in both ways, and draw images with their predicted digits."""
    data = chapter.pixels(options)
    network = trained(options, data)
    one_by_one, seconds = predict(network, data.test_images, 1)
    in_batches, seconds_of_batches = predict(network, data.test_images, 100)
    options.print(
        f"{len(one_by_one)} images one by one in {seconds:.2f} s, in batches of 100 {seconds_of_batches:.2f} s"
    )
    options.print(f"predictions that differ: {np.count_nonzero(one_by_one != in_batches)}")

    figure, axes = chapter.axes(2, 5)
    for ax, image, label, prediction in zip(axes, data.test_images, data.test_labels, in_batches, strict=False):
        ax.imshow(image[..., 0], cmap="gray_r")
        ax.set(title=f"{label}, predicted {prediction}", xticks=[], yticks=[])
    chapter.save(figure, options)
    options.print(f"accuracy: {np.mean(in_batches == data.test_labels):.4f} (the book, on MNIST: 0.9352)")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
