"""What a person reads of a benchmark: tables as lines of text, and the data of the chart. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from distdl.bench.chart import ChartPoint, Line
from distdl.bench.communication import Timed
from distdl.bench.layers import LayerTimes, TimedPass
from distdl.bench.measure import Measured
from distdl.bench.projection import Check, Model, projected_ranks

MARK = "*"
#: A model that is off by more than this is of little use.
POOR_FIT = 0.25
FOOTNOTE = f"{MARK} more ranks than cores: they share cores, so this shows what that costs and not how it scales"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 0) -> list[str]:
    """Return lines with columns as wide as need be, set to the right but for the first `left` ones.

    >>> table(["name", "n"], [["a", "10"], ["bcd", "9"]], left=1)
    ['  name   n', '  a     10', '  bcd    9']
    """
    everything = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in everything) for column in range(len(head))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in everything
    ]


def base_rate(measured: Sequence[Measured], kind: str) -> float:
    """Return the median samples a second of one rank, which speed-ups are relative to."""
    one = next(one for one in measured if one.setup.kind == kind and one.setup.ranks == 1)
    return statistics.median(one.rates())


def scaling_table(measured: Sequence[Measured], kind: str) -> list[str]:
    """Return the table of one kind of scaling."""
    ours = [one for one in measured if one.setup.kind == kind]
    base = base_rate(measured, kind)
    rows = []
    for one in ours:
        rates, ranks = one.rates(), one.setup.ranks
        speedup = statistics.median(rates) / base
        rows.append(
            [
                f"{ranks}{MARK if one.oversubscribed else ' '}",
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f} .. {max(rates):,.0f}",
                f"{speedup:.2f}",
                f"{speedup / ranks:.0%}",
                *(f"{share:.1%}" for share in one.shares()),
                f"rank {one.slowest()}" if ranks > 1 else "",
            ]
        )
    head = ["ranks ", "samples/s", "spread", "speed-up", "efficiency", "compute", "reduction", "wait", "slowest"]
    first = ours[0].setup
    batch = f"batch {first.batch_size}" + (" a rank" if kind == "weak" else "")
    lines = [f"{kind} scaling, {batch}", *table(head, rows)]
    return [*lines, f"  {FOOTNOTE}"] if any(one.oversubscribed for one in ours) else lines


def same_bits(measured: Sequence[Measured], reduction: str) -> str | None:
    """Return a line that says whether strong scaling ended with the same weights on all ranks; None if it is moot."""
    ours = [one for one in measured if one.setup.kind == "strong"]
    if len(ours) < 2 or reduction != "tree":
        return None
    receipts = {sample.weights_sha256 for one in ours for sample in one.samples}
    ranks = ", ".join(str(one.setup.ranks) for one in ours)
    if len(receipts) == 1:
        return f"same bits: strong scaling ended with the same weights on {ranks} ranks, sha256 {receipts.pop()[:16]}"
    return f"DIFFERENT BITS: strong scaling ended with {len(receipts)} different weights on {ranks} ranks"


def layers_table(times: LayerTimes) -> list[str]:
    """Return the table of parts of the network, forward and backward."""
    rows = []
    for part in times.parts:
        cells = [part.name, part.description]
        for one in (part.forward, part.backward):
            cells += [_milliseconds(one.seconds), f"{one.seconds / times.seconds:.1%}", *_rates(one)]
        rows.append(cells)
    forward = sum(part.forward.seconds for part in times.parts)
    backward = sum(part.backward.seconds for part in times.parts)
    rows.append(
        [
            "network",
            "all of it",
            *(
                cell
                for one in (forward, backward)
                for cell in (_milliseconds(one), f"{one / times.seconds:.1%}", "", "")
            ),
        ]
    )
    columns = ["ms", "share", "GFLOP/s", "sgemm"]
    return [
        f"layers: one micro-batch of {times.samples} on one rank, {_milliseconds(times.seconds)} ms in all; "
        "forward, then backward",
        *table(["part", "", *columns, *columns], rows, left=2),
        "  besides: "
        + " · ".join(
            f"{what} {_milliseconds(seconds)} ms ({seconds / times.seconds:.1%})"
            for what, seconds in (
                ("loss", times.loss_seconds),
                ("partial sums and pictures", times.outside_seconds),
                ("its part of the update", times.update_seconds),
            )
        ),
        "  sgemm: the same matrix products alone, in GFLOP/s",
    ]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _rates(one: TimedPass) -> list[str]:
    rates = (one.rate, one.product_rate) if one.seconds else (None, None)
    return ["" if rate is None else f"{rate / 1e9:.1f}" for rate in rates]


def communication_table(timed: Sequence[Timed], agreements: Mapping[int, float]) -> list[str]:
    """Return a table of the reductions by size for each number of ranks, and the seconds of an agreement by ranks."""
    lines = []
    for ranks, group in groupby(timed, lambda one: one.ranks):
        rows = []
        ours = list(group)
        names = list(ours[0].seconds)
        for one in ours:
            cells = [f"{one.nbytes:,}"]
            for name in names:
                seconds = one.median(name)
                cells += [f"{seconds * 1e6:,.1f}", f"{one.nbytes / seconds / 1e9:.3f}"]
            cells.append(f"{one.median(names[0]) / one.median('allreduce'):.2f}")
            rows.append(cells)
        mark = MARK if ours[0].oversubscribed else ""
        head = ["bytes", *(cell for name in names for cell in (f"{name} us", "GB/s")), f"{names[0]} / allreduce"]
        lines += [f"reduction of a vector over {ranks}{mark} ranks", *table(head, rows)]
    if not timed:
        lines.append("reduction of a vector: there is but one rank")
    if any(one.oversubscribed for one in timed):
        lines.append(f"  {FOOTNOTE}")
    lines += [
        f"agreement of {ranks} ranks, one a step: {seconds * 1e6:,.1f} us" for ranks, seconds in agreements.items()
    ]
    return lines


def fit_lines(model: Model, checks: Sequence[Check]) -> list[str]:
    """Return what was fitted, and how well it fits."""
    bandwidth = f"{1 / model.byte_seconds / 1e9:.2f} GB/s" if model.byte_seconds else "unlimited"
    lines = [
        f"model: {model.once_seconds * 1e3:.3f} ms + {model.micro_batch_seconds * 1e3:.3f} ms a micro-batch · "
        f"latency {model.latency_seconds * 1e6:.1f} us · bandwidth {bandwidth} · "
        f"deviation of compute {model.deviation:.1%}"
    ]
    rows = [
        [
            one.point.kind,
            str(one.point.ranks),
            _milliseconds(one.point.step_seconds),
            _milliseconds(one.fitted_seconds),
            f"{one.fitted_error:+.1%}",
            "" if one.left_out_seconds is None else _milliseconds(one.left_out_seconds),
            "" if one.left_out_error is None else f"{one.left_out_error:+.1%}",
        ]
        for one in checks
    ]
    lines += table(["scaling", "ranks", "measured ms", "fitted ms", "off", "left out ms", "off"], rows, left=1)
    errors = [abs(one.fitted_error) for one in checks]
    left_out = [abs(one.left_out_error) for one in checks if one.left_out_error is not None]
    for what, found in (("the fit", errors), ("a fit that has not seen the point", left_out)):
        if found:
            lines.append(f"  {what} is off by {statistics.median(found):.1%} (median), {max(found):.1%} at worst")
    if max([*errors, *left_out], default=0.0) > POOR_FIT:
        lines.append("  THE FIT IS POOR: rely on no prediction below; other work on the cores is the usual reason")
    return lines


def projection_table(batch: tuple[int, int], model: Model, kind: str, where: str) -> list[str]:
    """Return what the model predicts of one kind of scaling; it says so in its heading."""
    samples, micro_batches = batch
    rows = []
    for ranks, speedup in predicted_speedups(batch, model, kind):
        factor = ranks if kind == "weak" else 1
        step = model.step(ranks, micro_batches * factor)
        rows.append(
            [
                f"{ranks:,}",
                f"{samples * factor / step.seconds:,.0f}",
                f"{speedup:,.2f}",
                f"{speedup / ranks:.0%}",
                *(f"{part / step.seconds:.1%}" for part in (step.compute, step.reduction, step.waiting)),
            ]
        )
    head = ["ranks", "samples/s", "speed-up", "efficiency", "compute", "reduction", "wait"]
    return [f"{kind} scaling, PREDICTED, not measured: one rank a core, {where}", *table(head, rows)]


def predicted_speedups(batch: tuple[int, int], model: Model, kind: str) -> list[tuple[int, float]]:
    """Return (ranks, speed-up over one rank), both as the model has it; `batch` is (samples, micro-batches)."""
    micro_batches = batch[1]
    one = model.step(1, micro_batches).seconds
    found = []
    for ranks in projected_ranks(kind, micro_batches):
        factor = ranks if kind == "weak" else 1
        found.append((ranks, factor * one / model.step(ranks, micro_batches * factor).seconds))
    return found


def chart_lines(
    measured: Sequence[Measured], kinds: Sequence[str], batch: tuple[int, int], model: Model | None
) -> list[Line]:
    """Return the lines of the chart."""
    lines = []
    for kind in kinds:
        base = base_rate(measured, kind)
        points = []
        for one in measured:
            if one.setup.kind == kind:
                speedups = [rate / base for rate in one.rates()]
                points.append(ChartPoint(one.setup.ranks, statistics.median(speedups), min(speedups), max(speedups)))
        lines.append(Line(kind, points, () if model is None else predicted_speedups(batch, model, kind)))
    return lines
