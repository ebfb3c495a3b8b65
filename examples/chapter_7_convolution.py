"""Convolution and pooling with the numbers of the book, and filters that find edges (sections 7.2 to 7.6).

    python examples/chapter_7_convolution.py

With im2col each patch becomes a row of a matrix, and a convolution becomes a matrix product. Images are (N, H, W, C)
here, and (N, C, H, W) in the book. So a row has the same numbers in another order.
"""

import chapter
import numpy as np

from distdl import nn
from distdl.data import sources
from distdl.nn.windows import Window, patches

IMAGE = [[1, 2, 3, 0], [0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1]]
FILTER = [[2, 0, 1], [0, 1, 2], [1, 0, 2]]
POOLED = [[1, 2, 1, 0], [0, 1, 2, 3], [3, 0, 1, 2], [2, 4, 0, 1]]
#: Size of the input, filter, padding, stride, and the output size in the book (section 7.2.4).
SIZES = [((4, 4), 3, 1, 1, (4, 4)), ((7, 7), 3, 0, 2, (3, 3)), ((28, 31), 5, 2, 3, (10, 11))]
#: The filters of section 7.6.1; they respond to brighter pixels on the right, and below.
EDGES = {"vertical edges": [[-1, 0, 1]] * 3, "horizontal edges": [[-1] * 3, [0] * 3, [1] * 3]}


def convolve(image, weights, bias=0.0, padding=0):
    """Return the convolution of an image (H, W) with a filter (FH, FW)."""
    image, weights = np.array(image, float), np.array(weights, float)
    network = nn.Sequential([nn.Conv2d(1, weights.shape, padding=padding)], (*image.shape, 1), dtype=np.float64)
    views = dict(network.named_parameters())
    views["conv2d_1.weight"][..., 0, 0], views["conv2d_1.bias"][:] = weights, bias
    return network.forward(image[np.newaxis, ..., np.newaxis])[0, ..., 0]


def max_pool(image, size):
    """Return the maximum of each window of an image (H, W)."""
    image = np.array(image, float)
    network = nn.Sequential([nn.MaxPool2d(size)], (*image.shape, 1), dtype=np.float64)
    return network.forward(image[np.newaxis, ..., np.newaxis])[0, ..., 0]


def im2col_shape(samples):
    """Return the shape of the im2col matrix of 7x7x3 images for 5x5 filters (section 7.4.3)."""
    return patches(np.zeros((samples, 7, 7, 3)), Window((5, 5))).shape


def main(options):
    """Print the book's small cases, and draw the edges that two filters find in a digit."""
    for (height, width), kernel, padding, stride, book in SIZES:
        size = Window((kernel,) * 2, (stride,) * 2, (padding,) * 2).output_size((height, width))
        options.print(
            f"{height}x{width}, filter {kernel}x{kernel}, padding {padding}, stride {stride}: {size} (the book: {book})"
        )
    options.print(f"pooling 2x2: {max_pool(POOLED, 2).tolist()} (the book: [[2, 3], [4, 2]])")
    options.print(f"im2col: {im2col_shape(1)}, {im2col_shape(10)} (the book: (9, 75), (90, 75))")

    digit = sources.load("digits", None).images[0, :, :, 0]
    figure, axes = chapter.axes(1, 1 + len(EDGES))
    found = {"a digit": digit, **{name: convolve(digit, weights, padding=1) for name, weights in EDGES.items()}}
    for ax, (name, image) in zip(axes, found.items(), strict=True):
        ax.imshow(image, cmap="gray")
        ax.set(title=name, xticks=[], yticks=[])
    chapter.save(figure, options)
    ours = convolve(IMAGE, FILTER), convolve(IMAGE, FILTER, bias=3)
    options.print(
        f"convolution: {ours[0].tolist()}, with bias {ours[1].tolist()} "
        "(the book: [[15, 16], [6, 15]], [[18, 19], [9, 18]])"
    )


if __name__ == "__main__":
    chapter.run(main, __doc__)
