"""Perceptrons as logic gates: one each for AND, NAND and OR; XOR needs two layers (sections 2.2 to 2.5).

    python examples/chapter_2_gates.py

A perceptron returns 1 if w1 x1 + w2 x2 + b > 0, else 0. So it separates the plane by a straight line. No line separates
the corners of XOR. NAND and OR draw two lines, and AND selects the region between them.
"""

import chapter
import numpy as np

CORNERS = [(0, 0), (1, 0), (0, 1), (1, 1)]


def perceptron(w, b):
    """Return the gate with weights w (2,) and bias b; it takes numbers or arrays."""
    return lambda x1, x2: np.where(w[0] * x1 + w[1] * x2 + b > 0, 1, 0)


AND = perceptron(w=(0.5, 0.5), b=-0.7)
NAND = perceptron(w=(-0.5, -0.5), b=0.7)
OR = perceptron(w=(0.5, 0.5), b=-0.2)


def XOR(x1, x2):  # noqa: N802  the name of the gate
    """Return the AND (second layer) of NAND and OR (first layer)."""
    return AND(NAND(x1, x2), OR(x1, x2))


GATES = {
    "AND": (AND, (0, 0, 0, 1)),
    "NAND": (NAND, (1, 1, 1, 0)),
    "OR": (OR, (0, 1, 1, 1)),
    "XOR": (XOR, (0, 1, 1, 0)),
}


def main(options):
    """Print the truth tables, and draw the region in which each gate returns 1."""
    figure, axes = chapter.axes(1, 4)
    x1, x2 = np.meshgrid(np.linspace(-0.5, 1.5, 200), np.linspace(-0.5, 1.5, 200))
    options.print("x1 x2   " + "  ".join(f"{name:>4}" for name in GATES))
    for corner in CORNERS:
        options.print("{:2} {:2}   ".format(*corner) + "  ".join(f"{gate(*corner):4}" for gate, _ in GATES.values()))
    for (name, (gate, table)), ax in zip(GATES.items(), axes, strict=True):
        ax.contourf(x1, x2, gate(x1, x2), levels=[-0.5, 0.5, 1.5], colors=["white", "lightblue"])
        for corner, expected in zip(CORNERS, table, strict=True):
            ax.plot(*corner, "k^" if expected else "ko")
        ax.set(title=name, xlabel="x1", ylabel="x2")
    chapter.save(figure, options)
    right = sum(tuple(int(gate(*corner)) for corner in CORNERS) == table for gate, table in GATES.values())
    options.print(f"{right} of {len(GATES)} truth tables equal those of the book")


if __name__ == "__main__":
    chapter.run(main, __doc__)
