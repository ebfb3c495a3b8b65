"""``scaling.svg``: speed-up over ranks, drawn as SVG by hand.

Both axes are logarithmic to base 2, so that doubling the ranks is one step to the right, and the ideal is a
straight line. Whiskers span all repetitions. What was measured has dots and solid lines; predictions are
dashed and without dots; the region where ranks shared cores is shaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

WIDTH, HEIGHT = 760, 500
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 80, 100
#: Told apart by people who see few colors too (Okabe and Ito, 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
INK, FAINT, SHADE = "#222222", "#cfcfcf", "#f1e9d8"


@dataclass(frozen=True)
class ChartPoint:
    """A measured speed-up: the median, and the least and greatest of the repetitions."""

    ranks: int
    speedup: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Line:
    """What was measured of one kind of scaling, and what is predicted: (ranks, speed-up)."""

    name: str
    measured: Sequence[ChartPoint]
    predicted: Sequence[tuple[int, float]] = ()


def scaling_svg(
    lines: Sequence[Line], title: str, subtitle: str, footnotes: Sequence[str], oversubscribed: Sequence[int] = ()
) -> str:
    """Return the chart as a whole SVG document; `oversubscribed` are the numbers of ranks that shared cores."""
    ranks = [point.ranks for line in lines for point in line.measured]
    ranks += [count for line in lines for count, _ in line.predicted]
    heights = [value for line in lines for point in line.measured for value in (point.least, point.greatest)]
    heights += [value for line in lines for _, value in line.predicted]
    last = _ceil2(max([2, *ranks]))
    # The ideal reaches the corner; below, half a step of room is enough.
    low, high = 2.0 ** (math.floor(2 * math.log2(min([1.0, *heights]))) / 2), _ceil2(max([last, *heights]))

    def x(count: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log2(count) / math.log2(last)

    def y(speedup: float) -> float:
        height = HEIGHT - TOP - BOTTOM
        return HEIGHT - BOTTOM - height * (math.log2(speedup) - math.log2(low)) / (math.log2(high) - math.log2(low))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" role="img" aria-label={quoteattr(title)}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 26, title, size=16, weight="bold"),
        _text(LEFT, 44, subtitle, color="#555555"),
    ]
    if oversubscribed:
        least = max([count for count in ranks if count < min(oversubscribed)], default=1)
        start, end = x(math.sqrt(least * min(oversubscribed))), min(x(max(oversubscribed) * 1.2), WIDTH - RIGHT)
        parts.append(
            f'<rect class="oversubscribed" x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}" fill="{SHADE}"/>'
        )
        middle = (start + end) / 2 + 4
        parts.append(
            f'<text x="{middle:.1f}" y="{TOP + 8}" text-anchor="end" fill="#8a7440" '
            f'transform="rotate(-90 {middle:.1f} {TOP + 8})">more ranks than cores</text>'
        )
    parts += _grid(x, y, last, low, high)
    parts.append(_path("ideal", [(x(1), y(1)), (x(last), y(last))], "#777777", "2 3"))
    for line, color in zip(lines, _cycle(len(lines)), strict=True):
        parts += _line(line, color, x, y)
    parts += _legend(lines)
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 38, "ranks", anchor="middle"))
    parts.append(
        f'<text x="20" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" fill="{INK}" '
        f'transform="rotate(-90 20 {(TOP + HEIGHT - BOTTOM) / 2})">speed-up over 1 rank</text>'
    )
    for number, footnote in enumerate(footnotes):
        parts.append(_text(LEFT, HEIGHT - 32 + 16 * number, footnote, size=11, color="#555555"))
    return "\n".join([*parts, "</svg>", ""])


def _grid(x: Callable[[float], float], y: Callable[[float], float], last: float, low: float, high: float) -> list[str]:
    parts = []
    count = 1
    while count <= last:
        parts.append(_segment(x(count), TOP, x(count), HEIGHT - BOTTOM, FAINT, 0.6))
        parts.append(_text(x(count), HEIGHT - BOTTOM + 18, f"{count:,}", anchor="middle"))
        count *= 2
    level = _ceil2(low)
    while level <= high:
        parts.append(_segment(LEFT, y(level), WIDTH - RIGHT, y(level), FAINT, 0.6))
        parts.append(_text(LEFT - 8, y(level) + 4, f"{level:,g}", anchor="end"))
        level *= 2
    parts.append(_segment(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, INK, 1))
    parts.append(_segment(LEFT, TOP, LEFT, HEIGHT - BOTTOM, INK, 1))
    return parts


def _line(line: Line, color: str, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    parts = []
    if line.predicted:
        parts.append(_path("projection", [(x(count), y(value)) for count, value in line.predicted], color, "7 5"))
    parts.append(_path("measured", [(x(point.ranks), y(point.speedup)) for point in line.measured], color))
    for point in line.measured:
        at, low, high = x(point.ranks), y(point.least), y(point.greatest)
        parts.append('<g class="whisker">')
        ends = ((at, low, at, high), (at - 4, low, at + 4, low), (at - 4, high, at + 4, high))
        parts += [_segment(*corners, color, 1.4) for corners in ends]
        parts.append("</g>")
        parts.append(
            f'<circle class="point" cx="{at:.1f}" cy="{y(point.speedup):.1f}" r="4" fill="{color}">'
            f"<title>{escape(line.name)}, {point.ranks} ranks: {point.speedup:.2f}</title></circle>"
        )
    return parts


def _legend(lines: Sequence[Line]) -> list[str]:
    entries = [("ideal", "#777777", "2 3")]
    for line, color in zip(lines, _cycle(len(lines)), strict=True):
        entries.append((f"{line.name}, measured", color, ""))
        if line.predicted:
            entries.append((f"{line.name}, predicted", color, "7 5"))
    parts, at = [], float(LEFT)
    for name, color, dashes in entries:
        parts.append(_path("legend", [(at, 61), (at + 24, 61)], color, dashes))
        parts.append(_text(at + 30, 65, name))
        at += 50 + 6.4 * len(name)
    return parts


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", color: str = INK, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _segment(x1: float, y1: float, x2: float, y2: float, color: str, width: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width}"/>'


def _path(kind: str, points: Sequence[tuple[float, float]], color: str, dashes: str = "") -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline class="{kind}" points="{places}" fill="none" stroke="{color}" stroke-width="2"{dashed}/>'


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _ceil2(value: float) -> float:
    return 2.0 ** math.ceil(math.log2(value))
