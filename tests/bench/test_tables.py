"""Tables show medians, speed-ups, shares, the slowest rank, and the rows whose ranks shared cores."""

import re

from distdl.bench.benchmark import measured_steps
from distdl.bench.communication import ReductionTimes
from distdl.bench.layers import LayerTimes, PartTime, TimedPass
from distdl.bench.measure import MeasuredCase, Measurement, ScalingCase, oversubscribed, scaling_cases
from distdl.bench.projection import CostModel, FitCheck, MeasuredStep
from distdl.bench.settings import BenchSettings
from distdl.bench.tables import (
    MARK,
    communication_table,
    fit_lines,
    layers_table,
    projection_table,
    same_bits,
    scaling_table,
)


def measurement(seconds, ranks, weights="w"):
    each = [seconds * 0.7] * (ranks - 1) + [seconds * 0.8]
    return Measurement(
        seconds, [seconds / 10] * 10, each, [seconds * 0.1] * ranks, [0.0] * ranks, [0.01] * ranks, weights
    )


def measured(kind, ranks, seconds, *, shared_cores=False, weights="w"):
    batch = 128 * (ranks if kind == "weak" else 1)
    measurements = [measurement(one, ranks, weights) for one in seconds]
    return MeasuredCase(ScalingCase(kind, ranks, batch, batch // 16), shared_cores, 10, measurements)


SWEEP = [
    measured("strong", 1, [1.0, 0.8, 1.6]),
    measured("strong", 2, [0.5, 0.64, 0.4]),
    measured("strong", 4, [1.0, 1.28, 0.8], shared_cores=True),
    measured("weak", 1, [1.0]),
    measured("weak", 2, [1.25]),
]


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def test_a_row_holds_medians_spread_speedup_and_efficiency():
    head, names, one, two, four, note = scaling_table(SWEEP, "strong")
    assert head == "strong scaling, batch 128"
    assert cells(names)[:5] == ["ranks", "samples/s", "spread", "speed-up", "efficiency"]
    assert cells(one)[:5] == ["1", "1,280", "800 .. 1,600", "1.00", "100%"]
    assert cells(two)[:5] == ["2", "2,560", "2,000 .. 3,200", "2.00", "100%"]
    assert cells(two)[-1] == "rank 1", "which computed longest"
    assert cells(four)[3:5] == ["1.00", "25%"]
    assert "rank" not in one, "one rank is not compared with itself"
    assert "more ranks than cores" in note


def test_weak_scaling_counts_the_samples_of_all_ranks():
    table = scaling_table(SWEEP, "weak")
    assert table[0] == "weak scaling, batch 128 per rank"
    assert cells(table[3])[1:5] == ["2,048", "2,048 .. 2,048", "1.60", "80%"]


def test_rows_of_shared_cores_are_marked_and_no_others():
    lines = scaling_table(SWEEP, "strong")
    marked = [line for line in lines[2:-1] if MARK in line]
    assert [cells(line)[0] for line in marked] == [f"4{MARK}"]
    assert not any(MARK in line for line in scaling_table(SWEEP, "weak"))


def test_shares_add_up():
    shares = [float(cell.rstrip("%")) for cell in cells(scaling_table(SWEEP, "strong")[3])[5:8]]
    assert 99.8 <= sum(shares) <= 100.2


def test_cores_are_counted_on_each_host():
    two_hosts = [("a", [0, 1]), ("a", [0, 1]), ("b", [0, 1]), ("b", [0, 1]), ("b", [0, 1])]
    assert [oversubscribed(two_hosts, n) for n in (1, 2, 3, 4, 5)] == [False, False, False, False, True]
    bound = [("a", [0]), ("a", [1]), ("a", [2]), ("a", [2])]
    assert [oversubscribed(bound, n) for n in (1, 2, 3, 4)] == [False, False, False, True]


def test_a_line_says_whether_the_weights_are_equal():
    assert "same weights on 1, 2, 4 ranks" in same_bits(SWEEP, "tree")
    odd = measured("strong", 3, [1.0], weights="v")
    assert same_bits([*SWEEP, odd], "tree").startswith("DIFFERENT BITS: ")
    assert same_bits(SWEEP, "allreduce") is None, "which promises nothing"
    assert same_bits(SWEEP[:1], "tree") is None


def test_strong_scaling_ends_at_one_micro_batch_a_rank():
    settings = BenchSettings(batch_size=64, micro_batch_size=16)
    cases = scaling_cases(settings, (1, 2, 4, 8))
    assert [one.ranks for one in cases if one.kind == "strong"] == [1, 2, 4]
    assert [one.batch_size for one in cases if one.kind == "weak"] == [64, 128, 256, 512]
    assert [one.micro_batches for one in cases if one.kind == "share"] == [2, 1]


def test_cases_with_shared_cores_are_not_fitted():
    steps = measured_steps(SWEEP)
    assert [(step.kind, step.ranks) for step in steps] == [
        ("strong", 1),
        ("strong", 2),
        ("weak", 1),
        ("weak", 2),
    ]
    assert steps[1].step_seconds == 0.05
    assert round(steps[1].compute_seconds, 6) == 0.0375  # the mean of both ranks, whose shards are equal


def test_layers_are_shown_with_their_rates_and_the_rest():
    part = PartTime("affine_1", "Affine 10", TimedPass(1e-3, 10**8, 5e-4), TimedPass(2e-3, 2 * 10**8, 1e-3))
    flat = PartTime("flatten_1", "Flatten", TimedPass(0.0, 0, 0.0), TimedPass(0.0, 0, 0.0))
    text = "\n".join(layers_table(LayerTimes(16, 4e-4, 1.1e-3, 5e-4, [part, flat])))
    assert "one micro-batch of 16 on one rank, 5.000 ms in total" in text
    forward, backward = ["1.000", "20.0%", "100.0", "200.0"], ["2.000", "40.0%", "100.0", "200.0"]
    assert cells(text.splitlines()[2])[1:] == ["Affine 10", *forward, *backward]
    assert (
        "also: loss 0.400 ms (8.0%) · partial sums and images 1.100 ms (22.0%) · "
        "its part of the update 0.500 ms (10.0%)" in text
    )


def test_the_reduction_is_shown_by_size_next_to_allreduce():
    timed = [
        ReductionTimes(2, 1000, False, {"tree": [2e-6, 1e-6, 9e-6], "allreduce": [1e-6] * 3}),
        ReductionTimes(4, 1000, True, {"tree": [1e-6], "allreduce": [2e-6]}),
    ]
    lines = communication_table(timed, {2: 3.5e-5})
    assert lines[0] == "reduction of a vector over 2 ranks"
    assert cells(lines[2]) == ["1,000", "2.0", "0.500", "1.0", "1.000", "2.00"]
    assert lines[3] == f"reduction of a vector over 4{MARK} ranks"
    assert "agreement of 2 ranks, one per step: 35.0 us" in lines
    assert communication_table([], {}) == ["reduction of a vector: not measured, because there is only one rank"]


def test_predictions_are_called_predictions():
    model = CostModel("tree", 1000, 0.0, 1e-3, 0.0, 0.0, 0.0)
    lines = projection_table(model, "strong", (128, 8), "over an interconnect")
    assert lines[0] == "strong scaling, PREDICTED, not measured: one rank per core, over an interconnect"
    assert [cells(line)[:4] for line in lines[2:]] == [
        ["1", "16,000", "1.00", "100%"],
        ["2", "32,000", "2.00", "100%"],
        ["4", "64,000", "4.00", "100%"],
        ["8", "128,000", "8.00", "100%"],
    ]


def test_the_lines_of_the_fit_show_its_errors():
    step = MeasuredStep("strong", 2, 8, 0.010, 0.009, 0.001, 0.0)
    model = CostModel("tree", 1000, 1e-3, 2e-3, 1e-5, 1e-9, 0.02)
    lines = fit_lines(model, [FitCheck(step, 0.011, 0.008), FitCheck(step, 0.0101, None)])
    assert "+10.0%" in lines[2]
    assert "-20.0%" in lines[2]
    assert lines[-2].strip() == "error of the fit: 5.5% (median), 10.0% (largest)"
    assert lines[-1].strip() == "error of a fit without the predicted point: 20.0% (median), 20.0% (largest)"
    assert fit_lines(model, [FitCheck(step, 0.014, None)])[-1].strip().startswith("THE FIT IS POOR")
