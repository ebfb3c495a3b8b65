"""Run a benchmark on all ranks: from the settings to printed tables, ``bench.json`` and ``scaling.svg``."""

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distdl.bench import tables
from distdl.bench.chart import ScalingCurve, scaling_figure
from distdl.bench.communication import FEW_SIZES, SIZES, ReductionTimes, measure_agreement, measure_communication
from distdl.bench.layers import LayerTimes, measure_layers
from distdl.bench.measure import MeasuredCase, Measurement, Workbench, measure_scaling, scaling_cases
from distdl.bench.projection import CostModel, FitCheck, MeasuredStep, check, fit, predict
from distdl.bench.settings import SCALINGS, BenchSettings, rank_counts
from distdl.engine.console import Console
from distdl.engine.environment import describe, numerics
from distdl.engine.storage.files import check_output, try_folder, write_durably, write_output
from distdl.engine.storage.run_folder import unused_folder
from distdl.errors import UserError
from distdl.inference import figures
from distdl.parallel import Communicator, contiguous_shards, guard, on_rank_0, together, world

BENCH_FORMAT = 1
NO_PROJECTION = (
    "no projection: it needs at least two micro-batches in --batch-size, and either --network or a reduction measured "
    "between ranks with a core each"
)


@dataclass(frozen=True)
class BenchmarkResult:
    """All measurements and predictions of a benchmark, on rank 0."""

    settings: BenchSettings
    environment: dict[str, Any]
    measured: list[MeasuredCase]
    communication: list[ReductionTimes]
    agreements: dict[int, float]
    """Median seconds of an agreement, by the number of ranks."""
    layers: LayerTimes | None
    fitted: CostModel | None
    """Cost model of the measured interconnect."""
    checks: Sequence[FitCheck]
    projected: CostModel | None
    """Cost model of the interconnect to predict for."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The measured kinds of scaling."""
        return SCALINGS[self.settings.scaling]

    @property
    def predicted(self) -> dict[str, list[tuple[int, float]]]:
        """The predicted (ranks, speed-up), by the kind of scaling; nothing without a projection."""
        if self.projected is None:
            return {}
        model, micro_batches = self.projected, self.settings.micro_batches
        return {kind: [row[:2] for row in predict(model, kind, micro_batches)] for kind in self.kinds}

    @property
    def projected_over(self) -> str:
        """The interconnect of the predictions, in words."""
        given = self.settings.interconnect
        return "over the measured interconnect" if given is None else f"over an interconnect of {given}"

    def lines(self) -> list[str]:
        """Return all tables as lines."""
        settings = self.settings
        found = [tables.scaling_table(self.measured, kind) for kind in self.kinds]
        bits = tables.same_bits(self.measured, settings.reduction)
        if bits is not None:
            found.append([bits])
        if self.layers is not None:
            found.append(tables.layers_table(self.layers))
        if settings.communication:
            found.append(tables.communication_table(self.communication, self.agreements))
        if self.fitted is not None:
            found.append(tables.fit_lines(self.fitted, self.checks))
        if self.projected is not None:
            batch = settings.batch_size, settings.micro_batches
            found += [tables.projection_table(self.projected, kind, batch, self.projected_over) for kind in self.kinds]
        elif self.measured:
            found.append([NO_PROJECTION])
        return [line for table in found for line in ("", *table)]

    def chart(self) -> bytes:
        """Return ``scaling.svg``."""
        settings, environment = self.settings, self.environment
        curves = []
        for kind in self.kinds:
            base = tables.base_rate(self.measured, kind)
            ours = [one for one in self.measured if one.case.kind == kind]
            speedups = {one.case.ranks: [rate / base for rate in one.rates()] for one in ours}
            curves.append(ScalingCurve(kind, speedups, self.predicted.get(kind, ())))
        notes = ["Dots: medians; whiskers: all repetitions."]
        if self.projected is not None:
            notes.append(f"Dashed: predicted, not measured, for one rank per core, {self.projected_over}.")
        figure = scaling_figure(
            curves,
            f"distdl: {settings.model}, batch {settings.batch_size}, micro-batch {settings.micro_batch_size}",
            f"{environment['cpu']} · {environment['communicator']} · NumPy {environment['versions']['numpy']}",
            notes,
            sorted({one.case.ranks for one in self.measured if one.oversubscribed}),
        )
        return figures.content_of(figure, "svg")

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``bench.json``: environment, settings, raw measurements and derived numbers."""
        projection = None
        if self.projected is not None:
            projection = {
                "note": "predicted, not measured",
                "network": self.projected_over,
                "model": asdict(self.projected),
                "model_of_what_was_measured": None if self.fitted is None else asdict(self.fitted),
                "checks": [asdict(one) for one in self.checks],
                "speedups": self.predicted,
            }
        return {
            "format": BENCH_FORMAT,
            "environment": self.environment,
            "settings": self.settings.to_json(),
            "scaling": [one.to_json() for one in self.measured],
            "communication": [asdict(one) for one in self.communication],
            "agreements": [{"ranks": ranks, "seconds": seconds} for ranks, seconds in self.agreements.items()],
            "layers": None if self.layers is None else asdict(self.layers),
            "projection": projection,
        }


def benchmark(settings: BenchSettings, communicator: Communicator | None = None) -> Path | None:
    """Run a benchmark and write its files; return their folder on rank 0, None on other ranks. Collective.

    Raises `UserError` on every rank if a setting is invalid. Any other exception on any rank ends the job.
    """
    communicator = world() if communicator is None else communicator
    print_line = Console(live=False).line if communicator.rank == 0 else lambda _text: None
    with guard(communicator), numerics(threads=1):
        settings = together(communicator, settings.checked)
        ranks = together(communicator, lambda: rank_counts(settings.ranks, communicator.size))
        folder = on_rank_0(communicator, lambda: _output_folder(settings))
        trace_file = settings.trace
        if trace_file is not None:
            on_rank_0(communicator, lambda: check_output(trace_file, "--trace"))
        bench = Workbench(settings, communicator, ranks)
        result = _run(bench, describe(communicator, kernels=bench.kernels), ranks, print_line)
        on_rank_0(communicator, lambda: _report(folder, result, print_line))
        if trace_file is not None:
            recorded = bench.record_trace()
            content = json.dumps(recorded).encode()
            on_rank_0(communicator, lambda: write_output(trace_file, content, "--trace"))
            print_line(f"trace: {trace_file} (for ui.perfetto.dev)")
        return folder


def _output_folder(settings: BenchSettings) -> Path:
    """Return the folder for the results, without creating it; raise `UserError` if it is in use or not writable."""
    folder = settings.out or unused_folder(f"{settings.model}-bench")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out {folder} exists and is not an empty folder: give another folder")
        try_folder(folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}; give another folder") from None
    return folder


def _run(
    bench: Workbench, environment: dict[str, Any], ranks: Sequence[int], print_line: Callable[[str], None]
) -> BenchmarkResult:
    """Measure, and on rank 0 fit the cost model. Collective."""
    settings = bench.settings
    environment |= {
        "cpu": _cpu(),
        "cores": sorted({len(cores) for _, cores in bench.cores_of_ranks}),
        "load_before": round(os.getloadavg()[0], 2),
    }
    for line in _banner(bench, environment, ranks):
        print_line(line)
    cases = scaling_cases(settings, ranks)
    sizes = SIZES if settings.communication else FEW_SIZES
    layers = measure_layers(bench) if settings.layers else None
    communication = measure_communication(bench, sizes) if settings.communication or cases else []
    agreements = measure_agreement(bench) if settings.communication else {}
    measured = measure_scaling(bench, cases, print_line)
    fitted = projected = None
    checks: list[FitCheck] = []
    if bench.communicator.rank == 0 and cases:
        steps = measured_steps(measured)
        reductions = [
            (one.ranks, one.nbytes, one.median(settings.reduction)) for one in communication if not one.oversubscribed
        ]
        fit_to = partial(fit, steps, reductions, settings.reduction, bench.network.gradients.nbytes)
        fitted = fit_to()
        checks = [] if fitted is None else check(steps, reductions, fitted)
        projected = fitted if settings.interconnect is None else fit_to(settings.interconnect)
    return BenchmarkResult(
        settings, environment, measured, communication, agreements, layers, fitted, checks, projected
    )


def _banner(bench: Workbench, environment: Mapping[str, Any], ranks: Sequence[int]) -> list[str]:
    settings, network, versions = bench.settings, bench.network, environment["versions"]
    height, width, channels = network.input_shape
    return [
        f"distdl {versions['distdl']} benchmark · {settings.model} ({network.parameter_count:,} parameters) · "
        f"{settings.dataset or 'random pixels'} {height}x{width}x{channels} · {settings.optimizer} · "
        f"reduction {settings.reduction} · kernels {bench.kernels}",
        f"{environment['cpu']}, {'/'.join(map(str, environment['cores']))} cores (load {environment['load_before']}) · "
        f"{environment['communicator']} · "
        f"NumPy {versions['numpy']}, {environment['kernel_families'][0].split(';')[0]} · "
        f"ranks {', '.join(map(str, ranks))}",
    ]


def measured_steps(measured: Sequence[MeasuredCase]) -> list[MeasuredStep]:
    """Return the data of the fit: medians of each case whose ranks have a core each."""
    return [_measured_step(one) for one in measured if not one.oversubscribed]


def _measured_step(measured: MeasuredCase) -> MeasuredStep:
    case = measured.case
    shards = contiguous_shards(case.micro_batches, case.ranks)
    busiest = [rank for rank, shard in enumerate(shards) if len(shard) == len(max(shards, key=len))]

    def compute_seconds(one: Measurement) -> float:
        return statistics.fmean(one.compute_seconds[rank] for rank in busiest)

    def deviation(one: Measurement) -> float:
        """Relative standard deviation of a step's compute seconds, over steps and ranks."""
        means = [one.compute_seconds[rank] / measured.steps for rank in busiest]
        within = statistics.fmean(one.compute_deviation[rank] ** 2 for rank in busiest)
        return math.sqrt(within + statistics.pvariance(means)) / statistics.fmean(means)

    return MeasuredStep(
        kind=case.kind,
        ranks=case.ranks,
        micro_batches=case.micro_batches,
        step_seconds=measured.median_per_step(lambda one: one.seconds),
        compute_seconds=measured.median_per_step(compute_seconds),
        reduction_seconds=measured.median_per_step(lambda one: one.reduction_seconds[0]),
        deviation=statistics.median(map(deviation, measured.measurements)),
    )


def _report(folder: Path | None, result: BenchmarkResult, print_line: Callable[[str], None]) -> None:
    """Print the tables, and write the files."""
    assert folder is not None, "only rank 0 reports"
    for line in result.lines():
        print_line(line)
    files = {"bench.json": json.dumps(result.to_json(), indent=1).encode() + b"\n"}
    print_line("")
    if result.measured and figures.has_matplotlib():
        files["scaling.svg"] = result.chart()
    elif result.measured:
        print_line(f"no scaling.svg: {figures.NEEDS_MATPLOTLIB}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_durably(folder / name, content)
    except OSError as error:
        raise UserError(f"cannot write the results to {folder}: {error.strerror or error}") from None
    print_line(f"written: {', '.join(str(folder / name) for name in files)}")


def _cpu() -> str:
    """Return the name of the processor, as Linux reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown CPU"
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
