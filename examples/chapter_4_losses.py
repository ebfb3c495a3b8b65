"""Mean squared error and cross-entropy of a sample and of a batch; labels as integers or one-hot (section 4.2).

    python examples/chapter_4_losses.py

y are probabilities (K,) or (N, K). t is one-hot, in the shape of y, or for cross-entropy the class numbers.
"""

import chapter
import numpy as np

from distdl import nn

SMALL = 1e-7  # avoids the logarithm of 0
IS_A_2 = np.array([0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
OUTPUT_2 = np.array([0.1, 0.05, 0.6, 0.0, 0.05, 0.1, 0.0, 0.1, 0.0, 0.0])
OUTPUT_7 = np.array([0.1, 0.05, 0.1, 0.0, 0.05, 0.1, 0.0, 0.6, 0.0, 0.0])


def mean_squared_error(y, t):
    """Return ½ Σ (y - t)² (section 4.2.1)."""
    return 0.5 * np.sum((y - t) ** 2)


def cross_entropy_error(y, t):
    """Return -Σ t log y, the mean over the samples of a batch (sections 4.2.2 and 4.2.4)."""
    y, t = np.atleast_2d(y), np.atleast_1d(t)
    if t.size == y.size:  # one-hot
        t = t.reshape(y.shape).argmax(axis=1)
    return -np.mean(np.log(y[np.arange(len(y)), t] + SMALL))


def main(options):
    """Print the losses of a good and a bad output; draw cross-entropy as a function of the probability."""
    batch = np.stack([OUTPUT_2, OUTPUT_7])
    one_hot, integers = cross_entropy_error(batch, np.stack([IS_A_2, IS_A_2])), cross_entropy_error(batch, [2, 2])
    options.print(f"a batch of both, one-hot {one_hot:.6f}, integers {integers:.6f}")
    loss = nn.SoftmaxCrossEntropy().forward(np.log(batch + SMALL), np.array([2, 2])) / len(batch)
    options.print(f"the library's loss of the same probabilities, as logits: {loss:.6f}")

    figure, (ax, curve) = chapter.axes(1, 2)
    ax.bar(np.arange(10) - 0.2, OUTPUT_2, 0.4, label="output 2")
    ax.bar(np.arange(10) + 0.2, OUTPUT_7, 0.4, label="output 7")
    ax.set(title="two outputs for a 2", xlabel="class", ylabel="probability", xticks=range(10))
    ax.legend()
    probability = np.linspace(0.005, 1, 200)
    curve.plot(probability, -np.log(probability))
    curve.set(title="cross-entropy", xlabel="probability of the true class", ylabel="loss")
    chapter.save(figure, options)
    for name, y, reported in (("output 2", OUTPUT_2, "0.0975, 0.5108"), ("output 7", OUTPUT_7, "0.5975, 2.3026")):
        squared, entropy = mean_squared_error(y, IS_A_2), cross_entropy_error(y, IS_A_2)
        options.print(f"{name}: squared error {squared:.4f}, cross-entropy {entropy:.4f} (the book: {reported})")


if __name__ == "__main__":
    chapter.run(main, __doc__)
