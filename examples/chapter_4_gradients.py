"""Numerical differentiation, the gradient, and gradient descent on a function (sections 4.3 and 4.4).

python examples/chapter_4_gradients.py
"""

import chapter
import numpy as np


def numerical_diff(f, x):
    """Return the central difference (f(x + h) - f(x - h)) / 2h, whose error is of order h² (section 4.3.1)."""
    h = 1e-4
    return (f(x + h) - f(x - h)) / (2 * h)


def numerical_gradient(f, x):
    """Return the gradient of f at the array x: one partial derivative per element (section 4.4)."""
    gradient = np.zeros_like(x)
    for i in range(x.size):

        def along(value, i=i):
            moved = x.copy()
            moved.flat[i] = value
            return f(moved)

        gradient.flat[i] = numerical_diff(along, x.flat[i])
    return gradient


def gradient_descent(f, x, learning_rate, steps=100):
    """Return x and the result of each step x - η grad f(x) (section 4.4.1)."""
    path = [x]
    for _ in range(steps):
        path.append(path[-1] - learning_rate * numerical_gradient(f, path[-1]))
    return np.array(path)


def parabola(x):
    """Return 0.01 x² + 0.1 x (section 4.3.2)."""
    return 0.01 * x**2 + 0.1 * x


def bowl(x):
    """Return x0² + x1² (section 4.3.3)."""
    return np.sum(x**2)


def main(options):
    """Print the book's derivatives and descents; draw the gradient and the path of the descent."""
    options.print(
        f"derivative of 0.01 x² + 0.1 x at 5 and 10: {numerical_diff(parabola, 5):.6f} "
        f"{numerical_diff(parabola, 10):.6f} (exact: 0.2, 0.3)"
    )
    start = np.array([-3.0, 4.0])
    path = gradient_descent(bowl, start, learning_rate=0.1)

    figure, (field, descent) = chapter.axes(1, 2)
    places = [np.array([x0, x1]) for x0 in np.arange(-2, 2.1, 0.5) for x1 in np.arange(-2, 2.1, 0.5)]
    arrows = [-numerical_gradient(bowl, place) for place in places]
    field.quiver(*np.transpose(places), *np.transpose(arrows))
    field.set(title="minus the gradient of x0² + x1²", xlabel="x0", ylabel="x1")
    descent.plot(*path.T, "o-", markersize=3)
    descent.set(
        title="gradient descent, learning rate 0.1", xlabel="x0", ylabel="x1", xlim=(-4.5, 4.5), ylim=(-4.5, 4.5)
    )
    chapter.save(figure, options)

    too_large, too_small = (gradient_descent(bowl, start, rate)[-1] for rate in (10.0, 1e-10))
    options.print(f"learning rate 10 diverges to {too_large}, 1e-10 stays at {too_small}")
    options.print(
        "gradient at (3, 4): ({:.6f}, {:.6f}) (the book: 6, 8)".format(*numerical_gradient(bowl, np.array([3.0, 4.0])))
    )
    options.print("descent from (-3, 4) ends at ({:.1e}, {:.1e}) (the book: -6.1e-10, 8.1e-10)".format(*path[-1]))


if __name__ == "__main__":
    chapter.run(main, __doc__)
