"""Logistic regression: is a digit even or odd? One neuron, all samples at once (Ng, week 2).

    python examples/ng_logistic_regression.py --dataset mnist --data-dir FOLDER

Notation of the course: m samples are the columns of X (n, m); A = sigmoid(w' X + b) is the probability of y = 1.
"""

import time

import chapter
import numpy as np


def sigmoid(z):
    """Return 1 / (1 + exp(-z)), in a form that cannot overflow and keeps small probabilities."""
    return np.exp(np.minimum(z, 0)) / (1 + np.exp(-np.abs(z)))


def cost_and_gradient(w, b, X, Y):
    """Return the mean binary cross-entropy -(y log a + (1 - y) log(1 - a)), and its gradients dw (n,) and db."""
    m = X.shape[1]
    A = sigmoid(w @ X + b)
    small = 1e-7
    cost = -np.mean(Y * np.log(A + small) + (1 - Y) * np.log(1 - A + small))
    dZ = A - Y
    return cost, X @ dZ / m, dZ.mean()


def gradient_by_loop(w, b, X, Y):
    """Return the same dw and db, computed sample by sample."""
    dw, db, m = np.zeros_like(w), 0.0, X.shape[1]
    for i in range(m):
        dz = sigmoid(w @ X[:, i] + b) - Y[i]
        dw += X[:, i] * dz / m
        db += dz / m
    return dw, db


def main(options):
    """Compare both gradients, train with the fast one, and draw the cost and the weights."""
    data = chapter.pixels(options)
    X, Y = data.images.reshape(len(data.images), -1).T.copy(), (data.labels % 2).astype(np.float32)
    w, b = np.zeros(len(X), np.float32), 0.0

    start = time.perf_counter()
    looped, _ = gradient_by_loop(w, b, X, Y)
    middle = time.perf_counter()
    _, vectorized, _ = cost_and_gradient(w, b, X, Y)
    seconds = time.perf_counter() - middle
    options.print(f"gradient over {len(Y)} samples: {middle - start:.3f} s in a loop, {seconds:.3f} s vectorized")
    options.print(f"they differ by {np.abs(looped - vectorized).max():.1e}")

    costs = []
    for _ in range(20 if options.quick else 300):
        cost, dw, db = cost_and_gradient(w, b, X, Y)
        w, b = w - np.float32(0.5) * dw, b - 0.5 * db
        costs.append(cost)

    figure, (curve, picture) = chapter.axes(1, 2)
    curve.plot(costs)
    curve.set(xlabel="step", ylabel="cost")
    picture.imshow(w.reshape(data.images.shape[1:3]), cmap="RdBu")
    picture.set(title="weights: blue means odd", xticks=[], yticks=[])
    chapter.save(figure, options)
    test = data.test_images.reshape(len(data.test_images), -1).T
    right = np.mean((sigmoid(w @ test + b) > 0.5) == data.test_labels % 2)
    options.print(f"even or odd, test accuracy: {right:.4f} (a guess: 0.5; the course uses other data)")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
