"""Measurements start at the same state, and ranks that are not in a world wait."""

from dataclasses import replace

import numpy as np
import pytest

from distdl.bench import layers
from distdl.bench.measure import ScalingCase, Workbench, measure_scaling, scaling_cases
from distdl.bench.settings import BenchSettings
from distdl.nn.layers import Product
from distdl.parallel import OneProcess

TINY = BenchSettings(model="mlp", input_shape=(8, 8, 1), batch_size=16, micro_batch_size=4, steps=2, repetitions=2)


def test_shares_of_a_batch_are_measured_on_one_rank():
    """They tell how the time of a step depends on its micro-batches."""
    cases = scaling_cases(replace(TINY, batch_size=24), [1, 2, 4])
    assert [case for case in cases if case.kind == "share"] == [
        ScalingCase("share", 1, 12, 3),
        ScalingCase("share", 1, 4, 1),
    ]
    assert scaling_cases(replace(TINY, scaling="none"), [1]) == []


def test_products_are_timed_on_ordinary_numbers(monkeypatch):
    """Memory may hold numbers for which a processor is slow."""
    matmul, seen = np.matmul, []

    def checked(left, right, *, out):
        seen.append(np.isfinite(left).all() and np.isfinite(right).all())
        return matmul(left, right, out=out)

    monkeypatch.setattr(layers, "aligned_empty", lambda shape: np.full(shape, np.nan, np.float32))
    monkeypatch.setattr(np, "matmul", checked)
    assert layers.product_seconds(Product(3, 5, 7)) > 0
    assert all(seen)


def test_without_steps_a_measurement_takes_about_a_second_after_a_warm_up():
    settings = replace(TINY, steps=None).checked()
    bench = Workbench(settings, OneProcess(), [1])
    assert bench.steps >= 5
    assert bench.warm_up_steps == max(3, round(bench.steps / 3))
    bench.steps = 7
    (measured,) = measure_scaling(bench, [ScalingCase("strong", 1, 16, 4)], lambda _: None)
    assert [len(one.step_seconds) for one in measured.measurements] == [7, 7]


@pytest.mark.mpi(min_size=2)
def test_every_measurement_starts_again_and_unused_ranks_wait(communicator):
    bench = Workbench(TINY, communicator, (1, 2))
    cases = [ScalingCase("strong", 1, 16, 4), ScalingCase("strong", 2, 16, 4)]
    measured = measure_scaling(bench, cases, lambda text: None)
    for one in measured:
        assert len(one.measurements) == (2 if communicator.rank < one.case.ranks else 0)
    receipts = {run.weights_sha256 for one in measured for run in one.measurements}
    assert len(receipts) == (1 if communicator.rank < 2 else 0)
