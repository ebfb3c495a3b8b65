"""The example of a custom loop: two networks train each other, with the same receipts on any number of ranks."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from distdl.job.launched_by import read_launch
from distdl.mpirun import mpirun_command
from distdl.nn import numerical_gradient
from distdl.rng import Key

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "two_networks.py"
SECONDS = 120

pytestmark = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return __import__("two_networks")


def test_the_example_is_one_page():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 120


def test_both_networks_learn_and_have_the_same_receipts_on_1_2_and_3_ranks(run_program, run_job, tmp_path):
    alone = run_program([sys.executable, EXAMPLE], cwd=tmp_path, timeout=SECONDS)
    assert alone.returncode == 0, alone.stderr
    found = re.findall(
        r"^(\w+): test accuracy (\d+\.\d+)%, weights sha256: ([0-9a-f]{64})$", alone.stdout, re.MULTILINE
    )
    assert [name for name, _, _ in found] == ["simple_convnet", "mlp"]
    assert all(float(accuracy) > 94 for _, accuracy, _ in found)
    assert len({receipt for _, _, receipt in found}) == 2
    for ranks in (2, 3):
        done = run_job(mpirun_command(ranks, [sys.executable, str(EXAMPLE)]), cwd=tmp_path, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        assert done.stdout == alone.stdout, f"{ranks} ranks"


def test_the_gradient_of_the_divergence_is_that_of_differences(example):
    logits, other = Key(0).normal(3 * 5).reshape(3, 5), Key(1).normal(3 * 5).reshape(3, 5)
    kl, gradient = example.divergence(logits, other)
    assert gradient == pytest.approx(numerical_gradient(lambda: example.divergence(logits, other)[0], logits), abs=1e-7)
    p, q = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (logits, other))
    assert kl == pytest.approx((q * np.log(q / p)).sum())
    assert example.divergence(logits, logits + 7)[0] == pytest.approx(0), "equal probabilities"


def test_each_network_learns_from_the_other(example, monkeypatch):
    """Without the divergence, the receipt of a network does not depend on the other network."""
    from distdl.parallel import OneProcess

    data = example.PreparedDataset.prepare(example.sources.load("digits", None), seed=0)

    def receipt(other):
        states = [example.new_network("mlp", data, Key(0)), example.new_network(other, data, Key(1))]
        example.train(OneProcess(), data, states, Key(0), epochs=1)
        return states[0].weights_sha256()

    assert receipt("mlp") != receipt("logistic")
    monkeypatch.setattr(example, "divergence", lambda logits, _: (0.0, np.zeros_like(logits)))
    assert receipt("mlp") == receipt("logistic")
