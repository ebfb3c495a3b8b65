"""The fit recovers the numbers of artificial measurements, and returns None if they do not determine it."""

import itertools
import random
import statistics

import pytest

from distdl.bench.projection import (
    CostModel,
    MeasuredStep,
    bytes_sent,
    check,
    expected_largest,
    fit,
    fit_two,
    messages,
    projected_ranks,
)
from distdl.bench.settings import Interconnect
from distdl.parallel import contiguous_shards
from distdl.parallel.tree import maximal_nodes

GRADIENT = 1_735_680
KNOWN = CostModel(
    "tree",
    GRADIENT,
    once_seconds=1.2e-3,
    micro_batch_seconds=1.7e-3,
    latency_seconds=6e-6,
    byte_seconds=1 / 4e9,
    deviation=0.03,
)
SETUPS = [("strong", n, 8) for n in (1, 2, 4)] + [("weak", n, 8 * n) for n in (1, 2, 4)] + [("share", 1, 1)]


def measured(model, *, noise=0.0, setups=SETUPS):
    """Return the steps that the model predicts, each changed by up to `noise`."""
    chance = random.Random(1)
    points = []
    for kind, ranks, micro_batches in setups:
        step = model.step(ranks, micro_batches)
        off = [1 + chance.uniform(-noise, noise) for _ in range(3)]
        points.append(
            MeasuredStep(
                kind,
                ranks,
                micro_batches,
                step.seconds * off[0],
                step.compute * off[1],
                step.reduction * off[2],
                model.deviation,
            )
        )
    return points


def reductions(model, *, noise=0.0):
    chance = random.Random(2)
    return [
        (
            ranks,
            nbytes,
            (
                model.latency_seconds * messages(model.reduction, ranks)
                + model.byte_seconds * bytes_sent(model.reduction, ranks, ranks, nbytes)
            )
            * (1 + chance.uniform(-noise, noise)),
        )
        for ranks in (2, 4)
        for nbytes in (2**12, 2**18, 2**21)
    ]


NUMBERS = ("once_seconds", "micro_batch_seconds", "latency_seconds", "byte_seconds", "deviation")


@pytest.mark.parametrize("reduction", ["tree", "allreduce"])
def test_the_fit_recovers_the_numbers_of_the_steps(reduction):
    known = CostModel(reduction, *(getattr(KNOWN, name) for name in ("gradient_bytes", *NUMBERS)))
    found = fit(measured(known), reductions(known), reduction, GRADIENT)
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(known, name), rel=1e-6), name
    assert all(abs(one.fitted_error) < 1e-9 for one in check(measured(known), reductions(known), found))


def test_steps_with_some_per_cent_of_noise_are_fitted_to_some_per_cent():
    points, reduced = measured(KNOWN, noise=0.03), reductions(KNOWN, noise=0.03)
    found = fit(points, reduced, "tree", GRADIENT)
    for ranks, micro_batches in ((8, 8), (64, 512), (1024, 8192)):
        expected = KNOWN.step(ranks, micro_batches).seconds
        assert found.step(ranks, micro_batches).seconds == pytest.approx(expected, rel=0.06)
    checks = check(points, reduced, found)
    assert len(checks) == 6, "steps of one rank's share are not checked"
    assert statistics.median(abs(one.fitted_error) for one in checks) < 0.04
    assert all(abs(one.left_out_error) < 0.1 for one in checks)


def test_a_step_that_is_left_out_does_not_help_its_own_prediction():
    points, reduced = measured(KNOWN), reductions(KNOWN)
    odd = points[2]
    points[2] = MeasuredStep(
        odd.kind, odd.ranks, odd.micro_batches, 3 * odd.step_seconds, 3 * odd.compute_seconds, 0.1, 0.03
    )
    found = fit(points, reduced, "tree", GRADIENT)
    one = next(one for one in check(points, reduced, found) if one.point is points[2])
    honest = KNOWN.step(odd.ranks, odd.micro_batches).seconds
    assert one.left_out_seconds == pytest.approx(honest, rel=1e-6)
    assert one.left_out_error == pytest.approx(1 / 3 - 1, rel=1e-6)
    assert abs(one.fitted_error) < abs(one.left_out_error)


def test_there_is_no_fit_if_the_measurements_do_not_determine_it():
    points, reduced = measured(KNOWN), reductions(KNOWN)
    assert fit([], [], "tree", GRADIENT) is None
    alone = [point for point in points if point.ranks == 1]
    assert fit(alone, [], "tree", GRADIENT) is None, "no reduction was measured"
    assert fit(alone, reduced, "tree", GRADIENT) is not None
    one_load = [point for point in points if point.micro_batches == 8 and point.ranks == 1]
    assert fit(one_load, reduced, "tree", GRADIENT) is None, "compute was measured with one load only"
    assert check(one_load, reduced, KNOWN)[0].left_out_seconds is None


def test_a_given_interconnect_replaces_the_measured_one():
    interconnect = Interconnect(5e-5, 1e8)
    found = fit([point for point in measured(KNOWN) if point.ranks == 1], [], "tree", GRADIENT, interconnect)
    step = found.step(4, 8)
    assert step.reduction == pytest.approx(5e-5 * 6 + 2 * GRADIENT * 3 / 4 / 1e8)
    assert step.compute == pytest.approx(KNOWN.step(4, 8).compute)


def test_fitted_numbers_are_never_negative():
    assert fit_two([(1, 1), (1, 2), (1, 3)], [1.0, 3.0, 5.0])[0] == 0
    assert fit_two([(1, 1), (1, 2), (1, 3)], [3.0, 2.0, 1.0])[1] == 0
    assert fit_two([(1, 2), (2, 4)], [1.0, 2.0]) is None
    assert fit_two([], []) is None


def test_more_ranks_than_micro_batches_are_not_predicted():
    assert projected_ranks("strong", 8) == [1, 2, 4, 8]
    assert projected_ranks("strong", 5000)[-1] == projected_ranks("weak", 1)[-1] == 1024


def test_reduction_and_waiting_grow_with_the_ranks_and_compute_does_not():
    steps = [KNOWN.step(ranks, 8 * ranks) for ranks in (1, 2, 8, 64, 1024)]
    for one, larger in itertools.pairwise(steps):
        assert larger.compute == pytest.approx(one.compute)
        assert larger.reduction > one.reduction
        assert larger.waiting > one.waiting
    assert steps[0].reduction == steps[0].waiting == 0


@pytest.mark.parametrize("count", [2, 3, 5, 16, 100])
def test_the_expected_maximum_is_that_of_many_draws(count):
    chance = random.Random(count)
    drawn = statistics.fmean(max(chance.gauss(0, 1) for _ in range(count)) for _ in range(20_000))
    assert expected_largest(count) == pytest.approx(drawn, abs=0.04)


@pytest.mark.parametrize(("ranks", "leaves"), [(2, 8), (3, 8), (4, 8), (5, 8), (6, 48), (3, 128)])
def test_bytes_sent_follow_from_the_tree_nodes_per_rank(ranks, leaves):
    most = max(len(maximal_nodes(shard, leaves)) for shard in contiguous_shards(leaves, ranks))
    assert bytes_sent("tree", ranks, leaves, 1000) == pytest.approx((most + 1) * 1000 * (ranks - 1) / ranks)
