"""Perceptrons as logic gates: AND, NAND and OR are one each, XOR needs two layers (sections 2.2 to 2.5).

    python examples/chapter_2_gates.py

A perceptron says 1 where w1 x1 + w2 x2 + b > 0, else 0. One draws a straight line; no line has the two corners of XOR
on one side, but NAND and OR draw two, and AND keeps what lies between them.
"""

import chapter
import numpy as np

CORNERS = [(0, 0), (1, 0), (0, 1), (1, 1)]


def perceptron(w, b):
    """Return the gate with weights w (2,) and bias b, which takes numbers or arrays."""
    return lambda x1, x2: np.where(w[0] * x1 + w[1] * x2 + b > 0, 1, 0)


AND = perceptron(w=(0.5, 0.5), b=-0.7)
NAND = perceptron(w=(-0.5, -0.5), b=0.7)
OR = perceptron(w=(0.5, 0.5), b=-0.2)


def XOR(x1, x2):  # noqa: N802  the name of the gate
    """The second layer's AND of what the first layer's NAND and OR say."""
    return AND(NAND(x1, x2), OR(x1, x2))


GATES = {
    "AND": (AND, (0, 0, 0, 1)),
    "NAND": (NAND, (1, 1, 1, 0)),
    "OR": (OR, (0, 1, 1, 1)),
    "XOR": (XOR, (0, 1, 1, 0)),
}


def main(options):
    """Print the truth tables, and draw where each gate says 1."""
    figure, axes = chapter.axes(1, 4)
    x1, x2 = np.meshgrid(np.linspace(-0.5, 1.5, 200), np.linspace(-0.5, 1.5, 200))
    options.say("x1 x2   " + "  ".join(f"{name:>4}" for name in GATES))
    for corner in CORNERS:
        options.say("{:2} {:2}   ".format(*corner) + "  ".join(f"{gate(*corner):4}" for gate, _ in GATES.values()))
    for (name, (gate, table)), ax in zip(GATES.items(), axes, strict=True):
        ax.contourf(x1, x2, gate(x1, x2), levels=[-0.5, 0.5, 1.5], colors=["white", "lightblue"])
        for corner, expected in zip(CORNERS, table, strict=True):
            ax.plot(*corner, "k^" if expected else "ko")
        ax.set(title=name, xlabel="x1", ylabel="x2")
    chapter.save(figure, options)
    right = sum(tuple(int(gate(*corner)) for corner in CORNERS) == table for gate, table in GATES.values())
    options.say(f"{right} of {len(GATES)} truth tables are those of the book")


if __name__ == "__main__":
    chapter.run(main, __doc__)
