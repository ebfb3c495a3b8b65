"""The paths of six optimizers through a long valley, f(x, y) = x²/20 + y² (sections 6.1.2 to 6.1.7).

    python examples/chapter_6_paths.py

The gradient points across the valley, hardly along it. SGD zigzags. Momentum keeps its velocity. AdaGrad, RMSProp and
Adam scale each direction separately.
"""

import chapter
import numpy as np

from distdl.optim import SGD, AdaGrad, Adam, Momentum, Nesterov, RMSProp

#: The learning rates of the first four are the book's.
OPTIMIZERS = {SGD: 0.95, Momentum: 0.1, AdaGrad: 1.5, Adam: 0.3, Nesterov: 0.1, RMSProp: 0.1}
STEPS = 30


def f(x, y):
    """Return the height of the valley at (x, y)."""
    return x**2 / 20 + y**2


def gradient(place):
    """Return the gradient of f at `place` (2,)."""
    x, y = place
    return np.array([x / 10, 2 * y])


def path(optimizer_class, learning_rate):
    """Return the path from (-7, 2), of shape (STEPS + 1, 2)."""
    optimizer, place = optimizer_class(2, dtype=np.float64), np.array([-7.0, 2.0])
    places = [place.copy()]
    for step in range(1, STEPS + 1):
        optimizer.update(place, gradient(place), learning_rate, step)
        places.append(place.copy())
    return np.array(places)


def main(options):
    """Draw the six paths, and print their ends."""
    figure, axes = chapter.axes(2, 3)
    x, y = np.meshgrid(np.linspace(-10, 10, 200), np.linspace(-5, 5, 200))
    ends = {}
    for ax, (optimizer, rate) in zip(axes, OPTIMIZERS.items(), strict=True):
        places = path(optimizer, rate)
        ends[optimizer.__name__] = places[-1]
        ax.contour(x, y, f(x, y), levels=[0.1, 0.5, 1, 2, 4, 7], colors="lightgray")
        ax.plot(*places.T, "o-", markersize=3)
        ax.set(title=f"{optimizer.__name__}, learning rate {rate}", xlabel="x", ylabel="y")
    chapter.save(figure, options)
    for name, (x_end, y_end) in ends.items():
        options.print(f"{name} ends at ({x_end:.4f}, {y_end:.4f}), height {f(x_end, y_end):.5f}")
    options.print(
        f"paths that end below a twentieth of the start: {sum(f(*end) < f(-7, 2) / 20 for end in ends.values())}"
    )


if __name__ == "__main__":
    chapter.run(main, __doc__)
