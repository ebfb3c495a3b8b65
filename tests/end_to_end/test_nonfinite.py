"""If a loss or gradient is not finite, all ranks see that in the same step, and stop or skip the step.

The message names the micro-batch.
"""

import itertools
import json
import os
import time

import numpy as np
import pytest
from injected import faults, spoil_records, spoil_state
from small_runs import VERY_RAGGED, piece_of_digits, remove, small_config, small_run, worlds

from distdl.data import batch_order, split
from distdl.engine import same_bits, train
from distdl.engine.fault_injection import fail_at
from distdl.errors import CorruptionError, UserError
from distdl.optim import Adam
from distdl.parallel import OneProcess, contiguous_shards, deal, loads_by_speed
from distdl.rng import Key


def nan_gradient(record):
    record["gradient"][0] = np.nan


def inf_loss(record):
    record["loss_sum"][0] = np.inf


WHAT = {nan_gradient: "the gradient is not finite", inf_loss: "the loss is inf"}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("spoil", [nan_gradient, inf_loss])
@pytest.mark.parametrize("balance", [False, True])
def test_all_ranks_stop_at_that_step_and_name_the_lowest_micro_batch(communicator, shared_tmp_path, spoil, balance):
    spoil_records(spoil, step=2, micro_batches={5, 7})
    for size, part in worlds(communicator):
        folder = shared_tmp_path / f"{size}"
        with pytest.raises(UserError) as caught:
            small_run(part, folder, balance=balance)
        assert caught.value.agreed
        dealt = deal(loads_by_speed(8, (1.0,) * size)) if balance else contiguous_shards(8, size)
        (owner,) = [rank for rank, shard in enumerate(dealt) if 5 in shard]
        saved = folder / "not-finite-step-000000002.npz"
        assert str(caught.value) == (
            f"{WHAT[spoil]} at step 2, first in micro-batch 5 (computed by rank {owner}); "
            f"the micro-batch is saved in {saved}: "
            "training has diverged; start a new run with a smaller --lr than 0.001"
        )
        data, key = piece_of_digits(VERY_RAGGED), Key(0)
        training = split.split(data.labels, data.test_start, key).training
        rows = training[batch_order.epoch_order(key, 0, len(training))][32 + 20 : 32 + 24]
        with np.load(saved, allow_pickle=False) as arrays:
            assert {name: int(arrays[name]) for name in ("step", "micro_batch")} == {"step": 2, "micro_batch": 5}
            np.testing.assert_array_equal(arrays["rows"], rows)
            np.testing.assert_array_equal(arrays["images"], data.images[rows])
            np.testing.assert_array_equal(arrays["labels"], data.labels[rows])
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("spoil", [nan_gradient, inf_loss])
@pytest.mark.parametrize("model", ["simple_convnet", "deep_convnet"])
def test_a_skipped_step_gives_the_same_bits_on_any_number_of_ranks(communicator, shared_tmp_path, spoil, model):
    spoil_records(spoil, step=2, micro_batches={5})
    proofs = {
        size: small_run(part, shared_tmp_path / f"{size}", on_nonfinite="skip", model=model)
        for size, part in worlds(communicator)
    }
    assert len(set(proofs.values())) <= 1
    if communicator.rank == 0:
        records = [json.loads(line) for line in (shared_tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
        assert [record for record in records if record["step"] == 2] == [
            {"step": 2, "epoch": 1, "skipped": WHAT[spoil], "micro_batch": 5, "skipped_steps": 1}
        ]
        assert [record["step"] for record in records if "loss" in record] == [1, 3, 4, 5, 6]
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_temporary_fault_on_one_rank_is_not_called_divergence(communicator, shared_tmp_path, on_nonfinite):
    """The run ends even with --on-nonfinite skip: a skipped step would make the weights depend on a hardware fault."""
    for size, part in worlds(communicator):
        for victim in range(size):
            with faults():
                spoil_records(nan_gradient, step=2, rank=victim, once=True)
                with pytest.raises(
                    CorruptionError, match="not finite at step 2, but not when computed again"
                ) as caught:
                    small_run(part, shared_tmp_path / f"{size}-{victim}", on_nonfinite=on_nonfinite)
                assert (caught.value.agreed, caught.value.exit_code) == (True, 4)
    remove(communicator, shared_tmp_path)


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_nan_between_two_parameters_is_a_fault_of_the_moment_too(tmp_path, on_nonfinite):
    """No backward pass writes there. So it would stay, and each micro-batch would seem to be at fault."""

    def nan_in_the_padding(state):
        belongs = np.zeros_like(state.network.gradients)
        for _, view in state.network.views(belongs):
            view[...] = 1
        state.network.gradients[np.flatnonzero(belongs == 0)[0]] = np.nan

    fail_at("step", rank=0, step=2, action=nan_in_the_padding)
    with pytest.raises(CorruptionError, match="not finite at step 2, but not when computed again"):
        small_run(OneProcess(), tmp_path / "run", on_nonfinite=on_nonfinite)


@pytest.mark.mpi(min_size=2)
def test_wrong_weights_on_a_single_rank_are_not_called_divergence(communicator, shared_tmp_path):
    """A flipped bit of the exponent makes a weight so large that the loss is infinite."""
    for size, part in worlds(communicator):
        if size > 1:
            with faults():
                spoil_state(lambda state: state.network.parameters.fill(np.inf), step=2, rank=1)
                with pytest.raises(CorruptionError, match=r"rank .*1 .*after step 1, first in"):
                    small_run(part, shared_tmp_path / f"{size}", verify_every=0, on_nonfinite="skip")
    remove(communicator, shared_tmp_path)


def test_a_skipped_step_counts_and_changes_neither_weights_nor_optimizer(tmp_path):
    spoil_records(nan_gradient, step=2)
    small_run(OneProcess(), tmp_path / "run", on_nonfinite="skip", record_hashes=True)
    records = [json.loads(line) for line in (tmp_path / "run" / "hashes.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    changed = [
        {name for name, digest in after["hashes"].items() if digest != before["hashes"][name]}
        for before, after in itertools.pairwise(records)
    ]
    assert changed[0] == {"step"}
    assert len(changed[1]) > 10


@pytest.mark.parametrize("skipped", [{1}, {3, 4}], ids=str)
def test_adam_counts_the_updates_and_not_the_steps_that_are_skipped(tmp_path, monkeypatch, skipped):
    """As in PyTorch. The gradients are those of the run. The formula gives the moments and their bias correction."""
    for step in skipped:
        spoil_records(nan_gradient, step=step)
    weights, gradients, update = [], [], Adam.update

    def watched(self, w, g, *arguments):
        weights.append(w.astype(np.float64))
        gradients.append(g.astype(np.float64))
        update(self, w, g, *arguments)
        weights.append(w.astype(np.float64))

    monkeypatch.setattr(same_bits, "fingerprint", lambda *_: {})  # it updates too
    monkeypatch.setattr(Adam, "update", watched)
    small_run(OneProcess(), tmp_path / "first", on_nonfinite="skip", lr=0.01, max_steps=4, kernels="numpy")
    small_run(OneProcess(), tmp_path / "first", on_nonfinite="skip", lr=0.01, resume="auto", kernels="numpy")
    assert len(gradients) == 6 - len(skipped)
    w, m, v = weights[0], 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        w = w - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(weights[-1], w, rtol=0, atol=1e-5)


def test_a_run_with_a_skipped_step_resumes_to_the_same_bits(tmp_path):
    spoil_records(nan_gradient, step=2)
    expected = small_run(OneProcess(), tmp_path / "straight", on_nonfinite="skip")
    small_run(OneProcess(), tmp_path / "pieces", on_nonfinite="skip", max_steps=2)
    assert small_run(OneProcess(), tmp_path / "pieces", resume="auto") == expected  # config.toml is not read here
    spoil_records(nan_gradient, step=5)
    small_run(OneProcess(), tmp_path / "twice", on_nonfinite="skip", max_steps=3)
    small_run(OneProcess(), tmp_path / "twice", on_nonfinite="skip", resume="auto")
    text = (tmp_path / "twice" / "metrics.jsonl").read_text()
    assert [record["skipped_steps"] for record in map(json.loads, text.splitlines()) if "skipped" in record] == [1, 2]


def test_an_overflow_of_the_sum_of_finite_micro_batches_is_named(tmp_path):
    spoil_records(lambda record: record["gradient"].fill(2e38), step=2)
    expected = "not finite at step 2, though each micro-batch is finite: their sum overflows: training has diverged"
    with np.errstate(over="ignore"), pytest.raises(UserError, match=expected):
        small_run(OneProcess(), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.npz"))


def test_an_epoch_without_a_single_update_has_diverged(tmp_path):
    for step in (4, 5, 6):
        spoil_records(inf_loss, step=step)
    with pytest.raises(UserError, match="every step of epoch 2 was skipped: training has diverged"):
        small_run(OneProcess(), tmp_path / "run", on_nonfinite="skip")


def test_some_but_not_all_of_many_skipped_steps_are_printed_and_saved(tmp_path, monkeypatch, capsys):
    """Two steps of each epoch are skipped; the run saves the micro-batches of ten steps."""
    skipped = [step for step in range(1, 19) if step % 3]
    for step in skipped:
        spoil_records(nan_gradient, step=step)
    now = iter(range(0, 10**6, 3))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    small_run(OneProcess(), tmp_path / "run", on_nonfinite="skip", epochs=6)
    *warnings, last = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert last == "distdl: warning: steps skipped, of 18: 12; see metrics.jsonl"
    saved = tmp_path / "run" / "not-finite-step-000000001.npz"
    assert warnings[0] == (
        "distdl: warning: the gradient is not finite at step 1, first in micro-batch 0 (computed by rank 0); "
        f"the micro-batch is saved in {saved}: no update in this step (1 skipped so far)"
    )
    assert 1 <= len(warnings) < 12
    assert sorted(path.name for path in (tmp_path / "run").glob("*.npz")) == [
        f"not-finite-step-{step:09d}.npz" for step in skipped[:10]
    ]


def test_a_micro_batch_that_cannot_be_saved_gives_a_warning(tmp_path, monkeypatch, capsys):
    spoil_records(nan_gradient, step=2)
    opened = os.open

    def full(path, *arguments, **named):
        if str(path).startswith("not-finite"):
            raise OSError(28, os.strerror(28), path)
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(UserError, match=r"micro-batch 0 \(computed by rank 0\): training has diverged"):
        train(small_config(tmp_path / "run"), OneProcess(), dataset=piece_of_digits(VERY_RAGGED))
    assert "not-finite-step-000000002.npz: No space left on device" in capsys.readouterr().err
