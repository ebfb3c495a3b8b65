"""Stacked small filters see as much as one large filter, with fewer weights (section 8.1.3).

    python examples/chapter_8_small_filters.py

The inputs are images with a single bright pixel. If the middle output is not 0, it sees that pixel.
"""

import chapter
import numpy as np

from distdl import nn

SIZE = 15
#: The stacks to compare, and their weights in the book, for one channel and without biases.
STACKS = {"one 5x5": ([5], 25), "two 3x3": ([3, 3], 18), "one 7x7": ([7], 49), "three 3x3": ([3, 3, 3], 27)}


def seen(kernels):
    """Return the influence of each pixel on the middle output of stacked convolutions, and the number of weights."""
    layers = [nn.Conv2d(1, kernel, padding=kernel // 2, bias=False) for kernel in kernels]
    network = nn.Sequential(layers, (SIZE, SIZE, 1), dtype=np.float64)
    network.parameters[:] = 1
    one_pixel_each = np.eye(SIZE * SIZE).reshape(-1, SIZE, SIZE, 1)
    middle = network.forward(one_pixel_each)[:, SIZE // 2, SIZE // 2, 0]
    return middle.reshape(SIZE, SIZE), network.parameter_count


def main(options):
    """Print and draw the pixels that each stack sees, and print its number of weights."""
    figure, axes = chapter.axes(1, len(STACKS))
    counts = []
    for ax, (name, (kernels, book)) in zip(axes, STACKS.items(), strict=True):
        influence, weights = seen(kernels)
        rows, columns = (int(np.any(influence, axis=axis).sum()) for axis in (1, 0))
        counts.append((name, weights, book))
        options.print(f"{name}: sees {rows}x{columns} pixels, {weights} weights")
        ax.imshow(influence, cmap="gray")
        ax.set(title=f"{name}: {weights} weights", xticks=[], yticks=[])
    chapter.save(figure, options)
    ours = ", ".join(f"{name} {weights}" for name, weights, _ in counts)
    options.print(f"weights: {ours} (the book: {', '.join(str(book) for *_, book in counts)})")


if __name__ == "__main__":
    chapter.run(main, __doc__)
