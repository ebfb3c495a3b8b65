"""Softmax with cross-entropy as a computation graph (section 5.6.3, appendix A).

    python examples/chapter_5_softmax_with_loss.py

Forward through exp, sum, divide, log, multiply; backward through the same nodes. The gradient at the logits is y - t.
"""

import chapter
import numpy as np

from distdl import nn


def forward_and_backward(a, t):
    """Return probabilities, the loss, and its derivatives with respect to the logits `a` (K,); t (K,) is one-hot.

    Forward: e = exp(a), S = Σ e, r = 1 / S, y = e r, L = -Σ t log y. If a value is used twice, its derivative is the
    sum of both derivatives.
    """
    e = np.exp(a - a.max())
    S = e.sum()
    r = 1 / S
    y = e * r
    loss = -(t * np.log(y)).sum()

    d_log = -t  # minus, sum and multiply by t
    d_y = d_log / y  # log
    d_e_by_y = d_y * r  # multiply: through y
    d_r = (d_y * e).sum()  # multiply: every y uses r, so the derivatives add up
    d_S = -d_r / S**2  # divide
    d_e = d_e_by_y + d_S  # y and the sum use e; the sum passes its derivative to each
    d_a = d_e * e  # exp
    return y, loss, d_a


def main(options):
    """Compare the gradient of the graph with y - t, and with that of the library's layer."""
    a, label = np.array([0.3, 2.9, 4.0]), 1
    t = np.eye(3)[label]
    y, loss, d_a = forward_and_backward(a, t)
    library = nn.SoftmaxCrossEntropy()
    library_loss = library.forward(a[None], np.array([label]))

    figure, (ax,) = chapter.axes(1, 1)
    for place, (name, values) in enumerate({"probability y": y, "label t": t, "gradient": d_a}.items()):
        ax.bar(np.arange(3) + 0.25 * (place - 1), values, 0.25, label=name)
    ax.axhline(0, color="black", linewidth=0.5)
    ax.set(xlabel="class", xticks=range(3))
    ax.legend()
    chapter.save(figure, options)
    options.print(f"y = {y.round(8).tolist()}, loss {loss:.8f}, gradient {d_a.round(8).tolist()}")
    difference = max(abs(loss - library_loss), np.abs(d_a - library.backward()[0]).max())
    options.print(f"the library's loss and gradient differ by {difference:.1e}")
    options.print(f"the gradient and y - t differ by {np.abs(d_a - (y - t)).max():.1e} (the book: they are equal)")


if __name__ == "__main__":
    chapter.run(main, __doc__)
