"""Tables as lines of text."""

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str]], align: str = "", *, indent: str = "") -> list[str]:
    """Return the rows as lines, with columns as wide as their longest cell and two spaces between them.

    `align` has one character for each of the first columns: "<" for left, ">" for right. The others are aligned right.

    >>> table([["name", "n"], ["a", "10"], ["bcd", "9"]], "<", indent="  ")
    ['  name   n', '  a     10', '  bcd    9']
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), ">")
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    )
    return [f"{indent}{line}".rstrip() for line in lines]


def shortened(text: str, width: int) -> str:
    """Return the text, or its beginning and an ellipsis if it is longer than `width`.

    >>> shortened("cormorant", 9), shortened("cormorant", 5)
    ('cormorant', 'corm…')
    """
    return text if len(text) <= width else text[: width - 1] + "…"
