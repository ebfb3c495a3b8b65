"""A computation graph: apples, oranges and the sales tax, forward and backward (sections 5.1 to 5.4).

    python examples/chapter_5_graph.py

Each node knows only its own derivative. The chain rule multiplies the derivative from the right by the local
derivative, and passes the product to the left.
"""

import chapter


class Multiply:
    """out = x y; backward multiplies d_out by the other input (section 5.4.1)."""

    def forward(self, x, y):
        """Return x y."""
        self.x, self.y = x, y
        return x * y

    def backward(self, d_out):
        """Return the derivatives with respect to x and y."""
        return d_out * self.y, d_out * self.x


class Add:
    """out = x + y; backward passes d_out to both inputs (section 5.4.2)."""

    def forward(self, x, y):
        """Return x + y."""
        return x + y

    def backward(self, d_out):
        """Return the derivatives with respect to x and y."""
        return d_out, d_out


def apples(price, count, tax):
    """Return the total for apples, and its derivatives with respect to price, count and tax (section 5.4.1)."""
    of_apples, with_tax = Multiply(), Multiply()
    total = with_tax.forward(of_apples.forward(price, count), tax)
    d_apples, d_tax = with_tax.backward(1)
    return total, (*of_apples.backward(d_apples), d_tax)


def apples_and_oranges(apple, apple_count, orange, orange_count, tax):
    """Return the value on each line of the graph, and the derivative of the total with respect to it (5.4.2)."""
    of_apples, of_oranges, sum_of_both, with_tax = Multiply(), Multiply(), Add(), Multiply()
    apples = of_apples.forward(apple, apple_count)
    oranges = of_oranges.forward(orange, orange_count)
    both = sum_of_both.forward(apples, oranges)
    total = with_tax.forward(both, tax)

    d_both, d_tax = with_tax.backward(1)
    d_apples, d_oranges = sum_of_both.backward(d_both)
    d_apple, d_apple_count = of_apples.backward(d_apples)
    d_orange, d_orange_count = of_oranges.backward(d_oranges)
    return {
        "apple": (apple, d_apple),
        "apples": (apple_count, d_apple_count),
        "orange": (orange, d_orange),
        "oranges": (orange_count, d_orange_count),
        "tax": (tax, d_tax),
        "of apples": (apples, d_apples),
        "of oranges": (oranges, d_oranges),
        "both": (both, d_both),
        "total": (total, 1),
    }


NODES = {"×a": (1, 3), "×o": (1, 1), "+": (2, 2), "×t": (3, 2)}
LINES = {
    "apple": ((0, 3.3), "×a"),
    "apples": ((0, 2.7), "×a"),
    "orange": ((0, 1.3), "×o"),
    "oranges": ((0, 0.7), "×o"),
    "tax": ((1, 0), "×t"),
    "of apples": ("×a", "+"),
    "of oranges": ("×o", "+"),
    "both": ("+", "×t"),
    "total": ("×t", (4, 2)),
}


def main(options):
    """Print totals and derivatives, and draw the graph with both."""
    lines = apples_and_oranges(apple=100, apple_count=2, orange=150, orange_count=3, tax=1.1)
    figure, (ax,) = chapter.axes(1, 1)
    figure.set_size_inches(10, 5)
    for name, ends in LINES.items():
        (x0, y0), (x1, y1) = (NODES.get(end, end) for end in ends)
        ax.plot((x0, x1), (y0, y1), color="gray", zorder=1)
        value, derivative = lines[name]
        text, white = f"{name} {value:g}\n← {derivative:g}", {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.text((x0 + x1) / 2, (y0 + y1) / 2, text, ha="center", va="center", fontsize=8, bbox=white)
    for name, place in NODES.items():
        ax.text(
            *place, name[0], ha="center", va="center", fontsize=14, bbox={"boxstyle": "circle", "facecolor": "white"}
        )
    ax.axis("off")
    chapter.save(figure, options)

    total, (d_price, d_count, d_tax) = apples(price=100, count=2, tax=1.1)
    for name, (value, derivative) in lines.items():
        options.print(f"{name}: {value:g}, derivative {derivative:g}")
    options.print(f"2 apples: {total:g} (the book: 220), and 3 oranges: {lines['total'][0]:g} (the book: 715)")
    options.print(f"derivatives by price, count and tax: {d_price:g}, {d_count:g}, {d_tax:g} (the book: 2.2, 110, 200)")


if __name__ == "__main__":
    chapter.run(main, __doc__)
