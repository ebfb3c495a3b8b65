"""Convolution and pooling with the numbers of the book, and what a filter finds in an image (sections 7.2 to 7.6).

    python examples/chapter_7_convolution.py

A convolution is a matrix product once each patch is a row of a matrix: im2col. Images are (N, H, W, C) here, and
(N, C, H, W) in the book, so a row has the same numbers in another order.
"""

import chapter
import numpy as np

from distdl import nn
from distdl.data import sources
from distdl.nn.windows import Window, patches

IMAGE = [[1, 2, 3, 0], [0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1]]
FILTER = [[2, 0, 1], [0, 1, 2], [1, 0, 2]]
POOLED = [[1, 2, 1, 0], [0, 1, 2, 3], [3, 0, 1, 2], [2, 4, 0, 1]]
#: The size of the input, the filter's, padding, stride, and the size that the book works out (section 7.2.4).
SIZES = [((4, 4), 3, 1, 1, (4, 4)), ((7, 7), 3, 0, 2, (3, 3)), ((28, 31), 5, 2, 3, (10, 11))]
#: Found where it is bright on the right, and where it is bright below: the edges of section 7.6.1.
EDGES = {"vertical edges": [[-1, 0, 1]] * 3, "horizontal edges": [[-1] * 3, [0] * 3, [1] * 3]}


def convolve(image, weights, bias=0.0, padding=0):
    """Return what a filter (FH, FW) makes of an image (H, W)."""
    image, weights = np.array(image, float), np.array(weights, float)
    network = nn.Sequential([nn.Conv2d(1, weights.shape, padding=padding)], (*image.shape, 1), dtype=np.float64)
    views = dict(network.named_parameters())
    views["conv2d_1.weight"][..., 0, 0], views["conv2d_1.bias"][:] = weights, bias
    return network.forward(image[np.newaxis, ..., np.newaxis])[0, ..., 0]


def max_pool(image, size):
    """Return the largest number of each window of an image (H, W)."""
    image = np.array(image, float)
    network = nn.Sequential([nn.MaxPool2d(size)], (*image.shape, 1), dtype=np.float64)
    return network.forward(image[np.newaxis, ..., np.newaxis])[0, ..., 0]


def im2col_shape(samples):
    """Return the shape of the matrix that 5x5 filters multiply, for images of 7x7x3 (section 7.4.3)."""
    return patches(np.zeros((samples, 7, 7, 3)), Window((5, 5))).shape


def main(options):
    """Print the book's small cases, and draw what two filters find in a digit."""
    for (height, width), kernel, padding, stride, book in SIZES:
        size = Window((kernel,) * 2, (stride,) * 2, (padding,) * 2).output_size((height, width))
        options.say(
            f"{height}x{width}, filter {kernel}x{kernel}, padding {padding}, stride {stride}: {size} (the book: {book})"
        )
    options.say(f"pooling 2x2: {max_pool(POOLED, 2).tolist()} (the book: [[2, 3], [4, 2]])")
    options.say(f"im2col: {im2col_shape(1)}, {im2col_shape(10)} (the book: (9, 75), (90, 75))")

    digit = sources.load("digits", None).images[0, :, :, 0]
    figure, axes = chapter.axes(1, 1 + len(EDGES))
    found = {"a digit": digit, **{name: convolve(digit, weights, padding=1) for name, weights in EDGES.items()}}
    for ax, (name, image) in zip(axes, found.items(), strict=True):
        ax.imshow(image, cmap="gray")
        ax.set(title=name, xticks=[], yticks=[])
    chapter.save(figure, options)
    ours = convolve(IMAGE, FILTER), convolve(IMAGE, FILTER, bias=3)
    options.say(
        f"convolution: {ours[0].tolist()}, with bias {ours[1].tolist()} "
        "(the book: [[15, 16], [6, 15]], [[18, 19], [9, 18]])"
    )


if __name__ == "__main__":
    chapter.run(main, __doc__)
