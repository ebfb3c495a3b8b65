"""An L-layer network in plain NumPy that checks the shape of every array (Ng, week 4).

    python examples/ng_deep_network.py --dataset mnist --data-dir FOLDER

Notation of the course: n[l] units in layer l, m samples as columns. W[l] (n[l], n[l-1]), b[l] (n[l], 1), Z[l] and A[l]
(n[l], m). A gradient has the shape of its array. Parameters W and b are learned; hyperparameters (layers, units,
learning rate, steps) are chosen. Hidden layers have ReLU. One sigmoid at the end gives the probability of an odd digit.
"""

import chapter
import numpy as np


def has_shape(array, *shape):
    """Return the array; its shape must be `shape`."""
    assert array.shape == shape, f"{array.shape} is not {shape}"
    return array


def sigmoid(Z):
    """Return 1 / (1 + exp(-Z)), in a form that cannot overflow and keeps small probabilities."""
    return np.exp(np.minimum(Z, 0)) / (1 + np.exp(-np.abs(Z)))


def initialize(n, key):
    """Return W[l] and b[l] for the layers l = 1 .. L; n[0] is the number of inputs."""
    W, b = [], []
    for layer in range(1, len(n)):
        normal = key.of("W", layer).normal(n[layer] * n[layer - 1]).reshape(n[layer], n[layer - 1])
        W.append((normal * np.sqrt(2 / n[layer - 1])).astype(np.float32))  # He's values
        b.append(np.zeros((n[layer], 1), np.float32))
    return W, b


def forward(W, b, X):
    """Return A[0] = X, A[1], …, A[L]; the last is the probability of y = 1."""
    A, m = [X], X.shape[1]
    for layer, (w, offset) in enumerate(zip(W, b, strict=True), start=1):
        Z = has_shape(w @ A[-1] + offset, len(w), m)
        A.append(np.maximum(Z, 0) if layer < len(W) else sigmoid(Z))
    return A


def backward(W, b, A, Y):
    """Return dW[l] and db[l]: dZ[L] = A[L] - Y, dW = dZ A[l-1]' / m, db = mean of dZ, dA[l-1] = W' dZ."""
    m, dW, db = Y.shape[1], [], []
    dZ = A[-1] - Y
    for layer in reversed(range(len(W))):
        dW.insert(0, has_shape(dZ @ A[layer].T / m, *W[layer].shape))
        db.insert(0, has_shape(dZ.mean(axis=1, keepdims=True), *b[layer].shape))
        if layer:
            dZ = has_shape(W[layer].T @ dZ, *A[layer].shape) * (A[layer] > 0)
    return dW, db


def train(n, X, Y, key, steps, learning_rate=0.1, batch_size=500):
    """Return W and b after `steps` steps, each on the next `batch_size` samples."""
    W, b = initialize(n, key)
    for step in range(steps):
        columns = np.arange(step * batch_size, (step + 1) * batch_size) % X.shape[1]
        dW, db = backward(W, b, forward(W, b, X[:, columns]), Y[:, columns])
        for layer in range(len(W)):
            W[layer] -= learning_rate * dW[layer]
            b[layer] -= learning_rate * db[layer]
    return W, b


def main(options):
    """Train with 1 to 4 layers, print the table of shapes, and draw the accuracies."""
    data = chapter.pixels(options)
    X, Y = data.images.reshape(len(data.images), -1).T.copy(), (data.labels % 2).astype(np.float32)[None]
    test = data.test_images.reshape(len(data.test_images), -1).T
    accuracies = {}
    for hidden in ((), (20,), (20, 7), (20, 7, 5)):
        n = (len(X), *hidden, 1)
        W, b = train(n, X, Y, options.key, 20 if options.quick else 2000)
        accuracies[len(W)] = np.mean((forward(W, b, test)[-1][0] > 0.5) == data.test_labels % 2)
    for layer, (w, offset) in enumerate(zip(W, b, strict=True), start=1):
        options.print(f"layer {layer}: W {w.shape}, b {offset.shape}, Z and A ({len(w)}, m)")
    parameters = sum(array.size for array in (*W, *b))
    options.print(f"parameters of the last: {parameters}; hyperparameters: layers, units {n[1:]}, learning rate, steps")

    figure, (ax,) = chapter.axes(1, 1)
    ax.plot(list(accuracies), list(accuracies.values()), "o-")
    ax.set(xlabel="layers L", ylabel="test accuracy, even or odd", xticks=list(accuracies))
    chapter.save(figure, options)
    ours = ", ".join(f"L = {layers} {accuracy:.4f}" for layers, accuracy in accuracies.items())
    options.print(f"even or odd, test accuracy: {ours} (the course uses other data)")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
