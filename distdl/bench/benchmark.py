"""From settings to tables, ``bench.json`` and ``scaling.svg``: what every rank of a benchmark does."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distdl.bench.chart import scaling_svg
from distdl.bench.communication import FEW_SIZES, SIZES, Timed, measure_agreement, measure_communication
from distdl.bench.layers import LayerTimes, measure_layers
from distdl.bench.measure import Bench, Measured, Sample, measure_scaling, setups_of, traced
from distdl.bench.projection import Check, Model, Point, Reduced, check, fit
from distdl.bench.settings import SCALINGS, Settings, sweep
from distdl.bench.tables import (
    chart_lines,
    communication_table,
    fit_lines,
    layers_table,
    predicted_speedups,
    projection_table,
    same_bits,
    scaling_table,
)
from distdl.engine.console import Console
from distdl.engine.environment import describe, numerics
from distdl.engine.storage.files import try_folder, write_durably
from distdl.engine.storage.run_folder import unused_folder
from distdl.engine.timing.trace import check_writable
from distdl.engine.timing.trace import write as write_trace
from distdl.errors import UserError
from distdl.parallel import Communicator, contiguous_shards, guard, together, world

BENCH_FORMAT = 1


@dataclass(frozen=True)
class Report:
    """All that came out, on rank 0."""

    settings: Settings
    environment: dict[str, Any]
    measured: list[Measured]
    communication: list[Timed]
    agreements: dict[int, float]
    """Median seconds, by the number of ranks."""
    layers: LayerTimes | None
    fitted: Model | None
    """Of the network that was measured."""
    checks: list[Check]
    projected: Model | None
    """The same with the network that predictions are for."""


def benchmark(settings: Settings, communicator: Communicator | None = None) -> Path | None:
    """Measure what the settings say and write it; return the folder on rank 0, None on the others. Collective.

    Raises `UserError`, on every rank, for what the user gave; any other exception on any rank ends the job.
    """
    communicator = world() if communicator is None else communicator
    speaks = communicator.rank == 0

    console = Console(live=False)

    def say(text: str) -> None:
        if speaks:
            console.line(text)

    with guard(communicator), numerics(threads=1):
        settings = together(communicator, settings.checked)
        ranks = together(communicator, lambda: sweep(settings.ranks, communicator.size))
        folder = together(communicator, lambda: _output_folder(settings) if speaks else None)
        trace = settings.trace
        together(communicator, lambda: check_writable(trace) if speaks and trace is not None else None)
        bench = Bench(settings, communicator, ranks)
        report = _measured(bench, describe(communicator), ranks, say)
        together(communicator, lambda: _write(folder, report, say) if folder is not None else None)
        if trace is not None:
            found = traced(bench)
            together(communicator, lambda: _write_trace(trace, found, say) if found is not None else None)
        return folder


def _write_trace(path: Path, trace: Mapping[str, Any], say: Callable[[str], None]) -> None:
    try:
        write_trace(path, trace)
    except OSError as error:
        raise UserError(f"--trace {path} cannot be written: {error.strerror or error}; give another file") from None
    say(f"trace: {path} (for ui.perfetto.dev)")


def _output_folder(settings: Settings) -> Path:
    """Return the folder of the results; raise `UserError` where it is in use or cannot be. Nothing is made."""
    folder = settings.out or unused_folder(f"{settings.model}-bench")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out {folder} exists and is no empty folder: give another")
        try_folder(folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}; give another") from None
    return folder


def _measured(bench: Bench, environment: dict[str, Any], ranks: Sequence[int], say: Callable[[str], None]) -> Report:
    settings = bench.settings
    environment |= {
        "cpu": _cpu(),
        "cores": sorted({len(cores) for _, cores in bench.places}),
        "load_before": round(os.getloadavg()[0], 2),
    }
    setups = setups_of(settings, ranks)
    for line in _banner(settings, bench, environment, ranks):
        say(line)
    layers = measure_layers(bench) if settings.layers else None
    sizes = SIZES if settings.communication else FEW_SIZES
    communication = measure_communication(bench, sizes) if settings.communication or setups else []
    agreements = measure_agreement(bench) if settings.communication else {}
    measured = measure_scaling(bench, setups, say)
    fitted = projected = None
    checks: list[Check] = []
    if bench.communicator.rank == 0 and setups:
        gradient_bytes = bench.network.gradients.nbytes
        points, reduced = points_of(measured), reduced_of(communication, settings.reduction)
        fitted = projected = fit(points, reduced, settings.reduction, gradient_bytes)
        checks = [] if fitted is None else check(points, reduced, fitted)
        if settings.network is not None:
            projected = fit(points, reduced, settings.reduction, gradient_bytes, settings.network)
    report = Report(settings, environment, measured, communication, agreements, layers, fitted, checks, projected)
    if bench.communicator.rank == 0:
        for line in report_lines(report):
            say(line)
    return report


def _banner(settings: Settings, bench: Bench, environment: dict[str, Any], ranks: Sequence[int]) -> list[str]:
    height, width, channels = bench.network.input_shape
    what = settings.dataset or "random pixels"
    return [
        f"distdl {environment['versions']['distdl']} benchmark · {settings.model} "
        f"({bench.network.parameter_count:,} parameters) · {what} {height}x{width}x{channels} · {settings.optimizer} · "
        f"reduction {settings.reduction}",
        f"{environment['cpu']}, {'/'.join(map(str, environment['cores']))} cores (load {environment['load_before']}) · "
        f"{environment['communicator']} · "
        f"NumPy {environment['versions']['numpy']}, {environment['kernel_families'][0].split(';')[0]} · "
        f"ranks {', '.join(map(str, ranks))}",
    ]


def points_of(measured: Sequence[Measured]) -> list[Point]:
    """Return what the projection is fitted to: medians of each setup whose ranks had cores of their own."""
    points = []
    for one in measured:
        setup = one.setup
        if one.oversubscribed:
            continue
        shards = contiguous_shards(setup.micro_batches, setup.ranks)
        full = [rank for rank, shard in enumerate(shards) if len(shard) == setup.largest_shard]
        points.append(
            Point(
                kind=setup.kind,
                ranks=setup.ranks,
                micro_batches=setup.micro_batches,
                step_seconds=one.a_step(lambda sample: sample.seconds),
                compute_seconds=one.a_step(
                    lambda sample, full=full: statistics.fmean(sample.compute_seconds[rank] for rank in full)  # type: ignore[misc]
                ),
                reduction_seconds=one.a_step(lambda sample: sample.reduction_seconds[0]),
                deviation=statistics.median(deviation_of(sample, full, one.steps) for sample in one.samples),
            )
        )
    return points


def deviation_of(sample: Sample, ranks: Sequence[int], steps: int) -> float:
    """Return the relative standard deviation of a step's compute over the steps of the given ranks."""
    means = [sample.compute_seconds[rank] / steps for rank in ranks]
    within = statistics.fmean(sample.compute_deviation[rank] ** 2 for rank in ranks)
    return math.sqrt(within + statistics.pvariance(means)) / statistics.fmean(means)


def reduced_of(communication: Sequence[Timed], reduction: str) -> list[Reduced]:
    """Return what the reduction alone took where the ranks had cores of their own."""
    return [Reduced(one.ranks, one.nbytes, one.median(reduction)) for one in communication if not one.oversubscribed]


def report_lines(report: Report) -> list[str]:
    """Return all tables, as lines."""
    settings, measured = report.settings, report.measured
    lines: list[str] = []
    for kind in SCALINGS[settings.scaling]:
        lines += ["", *scaling_table(measured, kind)]
    bits = same_bits(measured, settings.reduction)
    if bits is not None:
        lines += ["", bits]
    if report.layers is not None:
        lines += ["", *layers_table(report.layers)]
    if settings.communication:
        lines += ["", *communication_table(report.communication, report.agreements)]
    if report.fitted is not None:
        lines += ["", *fit_lines(report.fitted, report.checks)]
    if report.projected is not None:
        for kind in SCALINGS[settings.scaling]:
            lines += ["", *projection_table(batch_of(settings), report.projected, kind, projected_where(settings))]
    elif measured:
        lines += [
            "",
            "no projection: it needs a reduction measured between ranks with a core each, or --network, "
            "and at least two micro-batches in --batch-size",
        ]
    return lines


def batch_of(settings: Settings) -> tuple[int, int]:
    """Return samples and micro-batches of the batch of one rank."""
    return settings.batch_size, settings.micro_batches


def projected_where(settings: Settings) -> str:
    """Return whose network a prediction is for."""
    if settings.network is None:
        return "over the network that was measured"
    return f"over a network of {settings.network}"


def _write(folder: Path, report: Report, say: Callable[[str], None]) -> None:
    files = {"bench.json": json.dumps(to_json(report), indent=1).encode() + b"\n"}
    if report.measured:
        files["scaling.svg"] = svg_of(report).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_durably(folder / name, content)
    except OSError as error:
        raise UserError(f"cannot write the results to {folder}: {error.strerror or error}") from None
    say("")
    say(f"written: {', '.join(str(folder / name) for name in files)}")


def svg_of(report: Report) -> str:
    """Return the chart."""
    settings, environment = report.settings, report.environment
    footnotes = ["Dots: medians; whiskers: all repetitions."]
    if report.projected is not None:
        footnotes.append(f"Dashed: predicted, not measured, for one rank a core, {projected_where(settings)}.")
    return scaling_svg(
        chart_lines(report.measured, SCALINGS[settings.scaling], batch_of(settings), report.projected),
        f"distdl: {settings.model}, batch {settings.batch_size}, micro-batch {settings.micro_batch_size}",
        f"{environment['cpu']} · {environment['communicator']} · NumPy {environment['versions']['numpy']}",
        footnotes,
        sorted({one.setup.ranks for one in report.measured if one.oversubscribed}),
    )


def to_json(report: Report) -> dict[str, Any]:
    """Return the content of ``bench.json``: the machine, the settings, raw samples, and what was made of them."""
    settings = report.settings
    projection = None
    if report.projected is not None:
        projection = {
            "note": "predicted, not measured",
            "network": projected_where(settings),
            "model": asdict(report.projected),
            "model_of_what_was_measured": None if report.fitted is None else asdict(report.fitted),
            "checks": [
                {**asdict(one), "fitted_error": one.fitted_error, "left_out_error": one.left_out_error}
                for one in report.checks
            ],
            "speedups": {
                kind: predicted_speedups(batch_of(settings), report.projected, kind)
                for kind in SCALINGS[settings.scaling]
            },
        }
    return {
        "format": BENCH_FORMAT,
        "environment": report.environment,
        "settings": settings.to_json(),
        "scaling": [
            {
                **asdict(one),
                "samples_per_second": one.rates(),
                "shares": dict(zip(("compute", "reduction", "wait"), one.shares(), strict=True)),
                "slowest_rank": one.slowest(),
            }
            for one in report.measured
        ],
        "communication": [asdict(one) for one in report.communication],
        "agreements": [{"ranks": ranks, "seconds": seconds} for ranks, seconds in report.agreements.items()],
        "layers": None if report.layers is None else asdict(report.layers),
        "projection": projection,
    }


def _cpu() -> str:
    """Return the processor's name as Linux knows it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown CPU"
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
