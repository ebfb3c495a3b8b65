"""Promise 1: the same bits on any number of ranks, even if the run is interrupted and resumed."""

import json
import os
from itertools import product

import pytest
from small_runs import LAST_BATCH_OF_ONE, RAGGED, VERY_RAGGED, remove, small_config, small_run, sub_world

from distdl.config import OPTIMIZERS
from distdl.engine import train
from distdl.nn import (
    Affine,
    AvgPool2d,
    BatchNorm,
    Branches,
    Conv2d,
    ConvTranspose2d,
    Flatten,
    GlobalAvgPool2d,
    LeakyReLU,
    LocalResponseNorm,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    Tanh,
    Upsample2d,
)
from distdl.parallel import OneProcess

RANKS = (1, 2, 3, 4, 5, 8)


def assert_every_number_of_ranks_agrees(communicator, folder, **settings):
    """Rank 0 trains in one process, without MPI; then the first n ranks do, for each n."""
    expected = small_run(OneProcess(), folder / "one", **settings) if communicator.rank == 0 else None
    for size in RANKS:
        part = sub_world(communicator, size) if size <= communicator.size else None
        if part is not None:
            found = small_run(part, folder / f"{size}", **settings)
            if part.rank == 0:
                assert found == expected, f"{size} ranks differ from one process"
    remove(communicator, folder)


#: The book's own models; they accept the digits of 8x8.
MODELS = ("mlp", "simple_convnet", "deep_convnet")
#: Each model, and each optimizer, once.
TRAININGS = [
    *((model, "adam") for model in MODELS),
    *(("mlp", optimizer) for optimizer in sorted({*OPTIMIZERS} - {"adam"})),
]


def normalized_network(shape, classes):
    """Return a network with batch normalization of channels in one branch, and of features after both branches."""
    way = [Conv2d(4, 3, padding=1), BatchNorm(), ReLU(), Conv2d(4, 3, padding=1)]
    layers = [Conv2d(4, 3, padding=1), Residual(way), BatchNorm(), ReLU(), Flatten(), Affine(8), BatchNorm()]
    return Sequential([*layers, Affine(classes)], shape)


def network_of_many_layers(shape, classes):
    """Return a network of the layers that are neither in the book's own models nor in the network above."""
    around = [AvgPool2d(3, stride=1, padding=1), Conv2d(3, 1), Tanh()]
    smaller_and_back = [Conv2d(3, 2, stride=2), Sigmoid(), Upsample2d(2)]
    larger_and_back = [ConvTranspose2d(3, 2, stride=2), LeakyReLU(), AvgPool2d(2)]
    first = [Conv2d(4, 3, padding=1), LeakyReLU(0.1), LocalResponseNorm(3, alpha=0.5)]
    ways = Branches(around, smaller_and_back, larger_and_back)
    return Sequential([*first, ways, Conv2d(6, 3), Tanh(), GlobalAvgPool2d(), Affine(classes)], shape)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("model", "optimizer"), TRAININGS)
def test_every_number_of_ranks_gives_the_bits_of_one_process(communicator, shared_tmp_path, model, optimizer):
    """Dropout is on in deep_convnet; the last batch is ragged, and its last micro-batch has one sample."""
    assert_every_number_of_ranks_agrees(
        communicator, shared_tmp_path, model=model, optimizer=optimizer, rows=VERY_RAGGED, weight_decay=0.01
    )


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("model", MODELS)
def test_numpy_kernels_give_the_bits_of_one_process_too(communicator, shared_tmp_path, model):
    """The other tests take the kernels of ``--kernels auto``: compiled ones, if numba is installed."""
    assert_every_number_of_ranks_agrees(communicator, shared_tmp_path, model=model, rows=VERY_RAGGED, kernels="numpy")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("rows", [LAST_BATCH_OF_ONE, RAGGED])
@pytest.mark.parametrize("model", MODELS)
def test_a_last_batch_smaller_than_the_world_changes_nothing(communicator, shared_tmp_path, model, rows):
    assert_every_number_of_ranks_agrees(communicator, shared_tmp_path, model=model, rows=rows, epochs=1)


@pytest.mark.mpi(min_size=2)
def test_micro_batches_that_no_rank_count_divides_change_nothing(communicator, shared_tmp_path):
    assert_every_number_of_ranks_agrees(
        communicator, shared_tmp_path, batch_size=34, micro_batch_size=3, schedule="step", lr_step_epochs=1
    )


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cross_check", [0, 2])
def test_batch_normalization_has_the_moments_of_the_whole_batch_on_any_ranks(
    communicator, shared_tmp_path, cross_check
):
    settings = {"build_network": normalized_network, "rows": VERY_RAGGED, "cross_check": cross_check, "verify_every": 2}
    assert_every_number_of_ranks_agrees(communicator, shared_tmp_path, **settings)


@pytest.mark.mpi(min_size=2)
def test_every_further_layer_gives_the_same_bits_on_any_ranks(communicator, shared_tmp_path):
    settings = {"build_network": network_of_many_layers, "rows": VERY_RAGGED, "cross_check": 2}
    assert_every_number_of_ranks_agrees(communicator, shared_tmp_path, **settings)


#: The first epoch stays the best.
STANDS_STILL = {"lr": 1e-6, "epochs": 3}
#: Settings of training that change the bits, each with another optimizer, schedule or loss than the default.
FURTHER_SETTINGS = {
    "momentum": {"optimizer": "momentum", "momentum": 0.5},
    "plateau, and the best weights": {
        "schedule": "plateau",
        "plateau_patience": 1,
        "test_with": "best",
        **STANDS_STILL,
    },
    "label smoothing": {"label_smoothing": 0.1},
    "class weights": {"class_weights": "balanced"},
    "betas and epsilon": {"optimizer": "adamw", "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-4},
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", FURTHER_SETTINGS)
def test_every_further_setting_gives_the_same_bits_on_any_ranks(communicator, shared_tmp_path, what):
    assert_every_number_of_ranks_agrees(communicator, shared_tmp_path, model="mlp", **FURTHER_SETTINGS[what])


@pytest.mark.mpi(min_size=2)
def test_clipping_decay_and_schedules_give_the_same_bits_on_any_ranks(communicator, shared_tmp_path):
    settings = {"l1_decay": 0.01, "clip_norm": 0.5, "schedule": "cosine", "warmup_steps": 2, "lr_base_batch": 16}
    assert_every_number_of_ranks_agrees(communicator, shared_tmp_path, optimizer="adamw", weight_decay=0.1, **settings)


@pytest.mark.mpi(min_size=2)
def test_all_ranks_stop_early_after_the_same_epoch(communicator, shared_tmp_path):
    """At this learning rate no epoch is better than the first.

    A resume with more patience continues to the undisturbed receipt.
    """
    never_better = {"lr": 1e-30, "epochs": 8}
    assert_every_number_of_ranks_agrees(communicator, shared_tmp_path, early_stopping=2, **never_better)
    folder = shared_tmp_path / "resumed"
    small_run(communicator, folder, early_stopping=2, **never_better)
    if communicator.rank == 0:
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["epochs"], summary["test_accuracy"] is None) == (3, False)
    longer = small_run(communicator, folder, early_stopping=4, resume="auto", **never_better)
    at_once = small_run(communicator, shared_tmp_path / "at once", early_stopping=4, **never_better)
    assert longer[:2] == at_once[:2]
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
def test_other_settings_give_other_bits(communicator, shared_tmp_path):
    """The receipts can differ: a seed, a micro-batch size or an optimizer changes them."""
    settings = [{}, {"seed": 1}, {"micro_batch_size": 2}, {"optimizer": "sgd"}, {"weight_decay": 0.1}]
    found = [small_run(communicator, shared_tmp_path / str(i), **chosen)[0] for i, chosen in enumerate(settings)]
    assert len(set(found)) == len(settings)
    remove(communicator, shared_tmp_path)


#: With dropout and with batch normalization, a few numbers of ranks are tested instead of all.
STOPPED = [("simple_convnet", ranks) for ranks in range(1, 9)]
STOPPED += [(model, ranks) for model in ("deep_convnet", "with batch normalization") for ranks in (2, 3)]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("model", "before"), STOPPED)
def test_stopped_after_any_step_and_resumed_on_any_ranks_gives_the_same_bits(
    communicator, shared_tmp_path, model, before
):
    """Two epochs have five steps to stop after. The full test has every pair of 1 to 8 ranks, and every step."""
    size = min(communicator.size, 8)
    if before > size:
        pytest.skip(f"{before} ranks are needed")
    every = list(product(range(1, size + 1), range(1, 6)))
    some = [((3 * before + turn) % size + 1, (before + 2 * turn) % 5 + 1) for turn in range(2)]
    how = {"build_network": normalized_network} if model == "with batch normalization" else {"model": model}
    expected = small_run(OneProcess(), shared_tmp_path / "one", **how) if communicator.rank == 0 else None
    first = sub_world(communicator, before)
    for after, step in every if os.environ.get("DISTDL_FAULTS") == "full" else some:
        second = sub_world(communicator, after)
        folder = shared_tmp_path / f"{after}-{step}"
        if first is not None:
            small_run(first, folder, max_steps=step, **how)
        communicator.barrier()
        if second is not None:
            found = small_run(second, folder, resume="auto", **how)
            if communicator.rank == 0:
                assert found == expected, f"stopped after step {step} on {before} ranks, resumed on {after}"
        communicator.barrier()
    remove(communicator, shared_tmp_path)


def test_stopped_at_every_step_in_turn_gives_the_same_bits(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "straight")
    for step in range(1, 6):
        small_run(OneProcess(), tmp_path / "pieces", max_steps=step, resume="auto")
    assert small_run(OneProcess(), tmp_path / "pieces", resume="auto") == expected


def test_resuming_a_finished_run_prints_its_receipt_again(tmp_path, capsys):
    expected = small_run(OneProcess(), tmp_path / "run")
    capsys.readouterr()
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected
    assert f"weights sha256: {expected[0]}" in capsys.readouterr().out


def test_more_epochs_continue_from_the_end_of_a_finished_run(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "three", epochs=3)
    small_run(OneProcess(), tmp_path / "two", epochs=2)
    assert small_run(OneProcess(), tmp_path / "two", epochs=3, resume="auto") == expected


def test_checkpoints_and_hashes_do_not_change_the_bits(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "plain")
    found = small_run(OneProcess(), tmp_path / "busy", checkpoint_every=1, keep_checkpoints=1, record_hashes=True)
    assert found == expected


def test_a_run_resumed_into_another_folder_copies_its_metrics(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "straight")
    small_run(OneProcess(), tmp_path / "first", max_steps=2)
    found = small_run(OneProcess(), tmp_path / "second", resume=str(tmp_path / "first"))
    assert found == expected


def test_records_later_than_the_checkpoint_are_cut(tmp_path):
    """As after a kill: the metrics contain steps after the newest checkpoint."""
    expected = small_run(OneProcess(), tmp_path / "straight")
    folder = tmp_path / "killed"
    small_run(OneProcess(), folder, max_steps=4)
    with (folder / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b'{"step": 5, "epoch": 2, "loss"')
    assert small_run(OneProcess(), folder, resume="auto") == expected


def test_metrics_hold_every_step_and_epoch_and_one_test_score(tmp_path):
    small_run(OneProcess(), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records if "validation_accuracy" in record] == [1, 2]
    assert [record["step"] for record in records if "test_accuracy" in record] == [6]


def test_global_random_state_is_neither_used_nor_changed(tmp_path):
    import numpy as np

    np.random.seed(1)  # noqa: NPY002
    first = small_run(OneProcess(), tmp_path / "a", model="deep_convnet")
    drawn = np.random.random()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert drawn == np.random.random()  # noqa: NPY002
    assert small_run(OneProcess(), tmp_path / "b", model="deep_convnet") == first


def test_the_default_run_learns_the_digits(tmp_path):
    summary = train(small_config(tmp_path / "run", batch_size=128, micro_batch_size=16, epochs=None), OneProcess())
    assert summary.test_accuracy >= 0.96
