"""Draw ``scaling.svg``: speed-up over the number of ranks, measured and predicted.

Both axes are logarithmic to base 2, so the ideal speed-up is a straight line. Whiskers span all repetitions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Distinct for readers with color blindness (Okabe and Ito, 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


@dataclass(frozen=True)
class ScalingCurve:
    """One kind of scaling: the speed-ups of all repetitions by number of ranks, and predicted (ranks, speed-up)."""

    kind: str
    measured: Mapping[int, Sequence[float]]
    predicted: Sequence[tuple[int, float]] = ()


def scaling_figure(
    curves: Sequence[ScalingCurve], title: str, subtitle: str, notes: Sequence[str], oversubscribed: Sequence[int] = ()
) -> Figure:
    """Return the chart; `oversubscribed` lists the numbers of ranks that share cores."""
    from matplotlib.figure import Figure  # noqa: PLC0415  slow to load, and not installed everywhere

    ranks = {2, *(n for curve in curves for n in (*curve.measured, *dict(curve.predicted)))}
    last = 2 ** (max(ranks) - 1).bit_length()
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    figure.suptitle(title, parse_math=False)
    figure.supxlabel("\n".join(notes), fontsize="small", parse_math=False)
    axes = figure.subplots()
    axes.set_title(subtitle, fontsize="small", parse_math=False)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([2**k for k in range(last.bit_length())])
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(visible=True, alpha=0.3)
    axes.set(xlabel="ranks", ylabel="speed-up over 1 rank", xlim=(2**-0.25, last * 2**0.25))
    if oversubscribed:
        unshared = max((n for n in ranks if n < oversubscribed[0]), default=1)
        start, end = math.sqrt(unshared * oversubscribed[0]), oversubscribed[-1] * 1.2
        axes.axvspan(start, end, color="#f1e9d8", gid="oversubscribed")
        top = axes.get_xaxis_transform()
        axes.text(start, 0.98, " more ranks than cores", rotation=90, va="top", fontsize="small", transform=top)
    axes.plot([1, last], [1, last], ":", color="0.5", label="ideal", gid="ideal")
    for number, curve in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        speedups = [(min(found), statistics.median(found), max(found)) for found in curve.measured.values()]
        low, median, high = np.array(speedups).T
        counts, whiskers = list(curve.measured), np.stack([median - low, high - median])
        axes.errorbar(counts, median, whiskers, fmt="none", capsize=4, ecolor=color)
        label = f"{curve.kind}, measured"
        axes.plot(counts, median, "o-", color=color, label=label, gid=f"measured-{curve.kind}")
        if curve.predicted:
            label = f"{curve.kind}, predicted"
            axes.plot(
                *zip(*curve.predicted, strict=True), "--", color=color, label=label, gid=f"predicted-{curve.kind}"
            )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure
