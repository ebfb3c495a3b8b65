"""Softmax with cross-entropy, taken apart into the nodes of its computation graph (section 5.6.3, appendix A).

    python examples/chapter_5_softmax_with_loss.py

Forward through exp, sum, divide, log, multiply; backward through the same nodes. What arrives at the logits is y - t.
"""

import chapter
import numpy as np

from distdl import nn


def forward_and_backward(a, t):
    """Return probabilities, the loss, and the derivatives of the loss by logits `a` (K,); t (K,) is one-hot.

    Forward: e = exp(a), S = Σ e, r = 1 / S, y = e r, L = -Σ t log y. A value that goes two ways is given back the sum
    of what both ways give back.
    """
    e = np.exp(a - a.max())
    S = e.sum()
    r = 1 / S
    y = e * r
    loss = -(t * np.log(y)).sum()

    d_log = -t  # minus, sum and multiply by t
    d_y = d_log / y  # log
    d_e_by_y = d_y * r  # multiply: the way over y
    d_r = (d_y * e).sum()  # multiply: r has gone to every y, so their derivatives add up
    d_S = -d_r / S**2  # divide
    d_e = d_e_by_y + d_S  # e has gone to y and to the sum, which hands its derivative to each
    d_a = d_e * e  # exp
    return y, loss, d_a


def main(options):
    """Hold the graph's gradient against y - t, and against the library's layer."""
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
    options.say(f"y = {y.round(8).tolist()}, loss {loss:.8f}, gradient {d_a.round(8).tolist()}")
    difference = max(abs(loss - library_loss), np.abs(d_a - library.backward()[0]).max())
    options.say(f"the library's loss and gradient differ by {difference:.1e}")
    options.say(f"the gradient and y - t differ by {np.abs(d_a - (y - t)).max():.1e} (the book: they are equal)")


if __name__ == "__main__":
    chapter.run(main, __doc__)
