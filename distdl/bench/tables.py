"""The tables that a benchmark prints, as lines of text. Pure functions."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby

from distdl.bench.communication import ReductionTimes
from distdl.bench.layers import LayerTimes, TimedPass
from distdl.bench.measure import MeasuredCase
from distdl.bench.projection import CostModel, FitCheck, predict
from distdl.engine.table import table

INDENT = "  "
MARK = "*"
#: A model with a larger relative error is of little use.
POOR_FIT = 0.25
FOOTNOTE = f"{MARK} more ranks than cores: the ranks share cores, so this shows the cost of sharing, not the scaling"


def base_rate(measured: Sequence[MeasuredCase], kind: str) -> float:
    """Return the median samples per second of one rank; speed-ups are relative to it."""
    one = next(one for one in measured if one.case.kind == kind and one.case.ranks == 1)
    return statistics.median(one.rates())


def scaling_table(measured: Sequence[MeasuredCase], kind: str) -> list[str]:
    """Return the table of one kind of scaling."""
    ours = [one for one in measured if one.case.kind == kind]
    base = base_rate(measured, kind)
    rows = []
    for one in ours:
        rates, ranks = one.rates(), one.case.ranks
        speedup = statistics.median(rates) / base
        rows.append(
            [
                f"{ranks}{MARK if one.oversubscribed else ' '}",
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f} .. {max(rates):,.0f}",
                f"{speedup:.2f}",
                f"{speedup / ranks:.0%}",
                *(f"{share:.1%}" for share in one.spent.shares()),
                f"rank {one.spent.slowest}" if ranks > 1 else "",
            ]
        )
    head = ["ranks ", "samples/s", "spread", "speed-up", "efficiency", "compute", "reduction", "wait", "slowest"]
    first = ours[0].case
    batch = f"batch {first.batch_size}" + (" per rank" if kind == "weak" else "")
    lines = [f"{kind} scaling, {batch}", *table([head, *rows], indent=INDENT)]
    return [*lines, f"  {FOOTNOTE}"] if any(one.oversubscribed for one in ours) else lines


def same_bits(measured: Sequence[MeasuredCase], reduction: str) -> str | None:
    """Return a line that says whether strong scaling ended with the same weights; None if nothing is promised."""
    ours = [one for one in measured if one.case.kind == "strong"]
    if len(ours) < 2 or reduction != "tree":
        return None
    receipts = {run.weights_sha256 for one in ours for run in one.measurements}
    ranks = ", ".join(str(one.case.ranks) for one in ours)
    if len(receipts) == 1:
        return f"same bits: strong scaling ended with the same weights on {ranks} ranks, sha256 {receipts.pop()[:16]}"
    return f"DIFFERENT BITS: strong scaling ended with {len(receipts)} different weights on {ranks} ranks"


def layers_table(times: LayerTimes) -> list[str]:
    """Return the table of the parts of the network, forward and backward."""

    def share(seconds: float) -> list[str]:
        return [_milliseconds(seconds), f"{seconds / times.seconds:.1%}"]

    rows = []
    for part in times.parts:
        passes = (part.forward, part.backward)
        cells = (cell for one in passes for cell in [*share(one.seconds), *_rates(one)])
        rows.append([part.name, part.description, *cells])
    forward = sum(part.forward.seconds for part in times.parts)
    backward = sum(part.backward.seconds for part in times.parts)
    rows.append(["network", "all parts", *share(forward), "", "", *share(backward), "", ""])
    columns = ["ms", "share", "GFLOP/s", "sgemm"]
    rest = {
        "loss": times.loss_seconds,
        "partial sums and images": times.outside_seconds,
        "its part of the update": times.update_seconds,
    }
    return [
        f"layers: one micro-batch of {times.samples} on one rank, {_milliseconds(times.seconds)} ms in total; "
        "forward, then backward",
        *table([["part", "", *columns, *columns], *rows], "<<", indent=INDENT),
        "  also: " + " · ".join("{} {} ms ({})".format(name, *share(seconds)) for name, seconds in rest.items()),
        "  sgemm: the same matrix products alone, in GFLOP/s",
    ]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _rates(one: TimedPass) -> list[str]:
    """Return GFLOP/s of a pass, and of its matrix products alone; two empty cells without products."""
    if not (one.seconds and one.operations):
        return ["", ""]
    return [f"{one.operations / seconds / 1e9:.1f}" for seconds in (one.seconds, one.product_seconds)]


def communication_table(times: Sequence[ReductionTimes], agreements: Mapping[int, float]) -> list[str]:
    """Return a table of the reductions by size for each number of ranks, and the seconds of an agreement by ranks."""
    lines = [] if times else ["reduction of a vector: not measured, because there is only one rank"]
    for ranks, group in groupby(times, lambda one: one.ranks):
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
        lines += [f"reduction of a vector over {ranks}{mark} ranks", *table([head, *rows], indent=INDENT)]
    if any(one.oversubscribed for one in times):
        lines.append(f"  {FOOTNOTE}")
    return lines + [
        f"agreement of {ranks} ranks, one per step: {seconds * 1e6:,.1f} us" for ranks, seconds in agreements.items()
    ]


def fit_lines(model: CostModel, checks: Sequence[FitCheck]) -> list[str]:
    """Return the fitted numbers and the errors of the fit."""
    head = ["scaling", "ranks", "measured ms", "fitted ms", "error", "left out ms", "error"]
    bandwidth = f"{1 / model.byte_seconds / 1e9:.2f} GB/s" if model.byte_seconds else "unlimited"

    def predicted(seconds: float | None, error: float | None) -> list[str]:
        return ["", ""] if seconds is None or error is None else [_milliseconds(seconds), f"{error:+.1%}"]

    rows = []
    for one in checks:
        measured = [one.point.kind, str(one.point.ranks), _milliseconds(one.point.step_seconds)]
        by_the_rest = predicted(one.left_out_seconds, one.left_out_error)
        rows.append([*measured, *predicted(one.fitted_seconds, one.fitted_error), *by_the_rest])
    lines = [
        f"model: {model.once_seconds * 1e3:.3f} ms + {model.micro_batch_seconds * 1e3:.3f} ms per micro-batch · "
        f"latency {model.latency_seconds * 1e6:.1f} us · bandwidth {bandwidth} · "
        f"deviation of compute {model.deviation:.1%}",
        *table([head, *rows], "<", indent=INDENT),
    ]
    errors = [abs(one.fitted_error) for one in checks]
    left_out = [abs(one.left_out_error) for one in checks if one.left_out_error is not None]
    for what, found in (("the fit", errors), ("a fit without the predicted point", left_out)):
        if found:
            lines.append(f"  error of {what}: {statistics.median(found):.1%} (median), {max(found):.1%} (largest)")
    if max([*errors, *left_out], default=0.0) > POOR_FIT:
        lines.append(
            "  THE FIT IS POOR: do not rely on the predictions below; other work on the cores is a usual cause"
        )
    return lines


def projection_table(model: CostModel, kind: str, batch: tuple[int, int], projected_over: str) -> list[str]:
    """Return the predictions for one kind of scaling; `batch` is (samples, micro-batches) of one rank."""
    samples, micro_batches = batch
    rows = [["ranks", "samples/s", "speed-up", "efficiency", "compute", "reduction", "wait"]]
    for ranks, speedup, step in predict(model, kind, micro_batches):
        rows.append(
            [
                f"{ranks:,}",
                f"{samples * (ranks if kind == 'weak' else 1) / step.seconds:,.0f}",
                f"{speedup:,.2f}",
                f"{speedup / ranks:.0%}",
                *(f"{part / step.seconds:.1%}" for part in (step.compute, step.reduction, step.waiting)),
            ]
        )
    heading = f"{kind} scaling, PREDICTED, not measured: one rank per core, {projected_over}"
    return [heading, *table(rows, indent=INDENT)]
