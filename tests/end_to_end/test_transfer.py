"""A run starts with the matching weights of another run. Frozen weights stay. Neither depends on ranks or a resume."""

import dataclasses
import shutil

import numpy as np
import pytest
from small_runs import VERY_RAGGED, piece_of_digits, remove, small_config, small_run, worlds

from distdl.config import OPTIMIZERS
from distdl.engine import step, train, transfer
from distdl.engine.fault_injection import fail_at
from distdl.engine.storage import checkpoints
from distdl.errors import UserError
from distdl.nn import Affine, BatchNorm, Conv2d, Flatten, ReLU, Residual, Sequential
from distdl.parallel import OneProcess
from distdl.rng import Key


def network(shape, classes):
    """Return a network with nested layers and batch normalization, which also has moments."""
    way = [Conv2d(4, 3, padding=1), BatchNorm(), ReLU()]
    layers = [Conv2d(4, 3, padding=1), BatchNorm(), ReLU(), Residual(way), Flatten(), Affine(8), ReLU()]
    return Sequential([*layers, Affine(classes)], shape)


#: Parameters whose shape depends on the number of classes.
OF_THE_CLASSES = {"affine_2.weight", "affine_2.bias"}
FREEZE = "conv2d_1, residual_1.body,affine_1.bias"
FROZEN = {
    *("conv2d_1.weight", "conv2d_1.bias", "affine_1.bias"),
    *(f"residual_1.body.{name}" for name in ("conv2d_1.weight", "conv2d_1.bias")),
    *(f"residual_1.body.batchnorm_1.{name}" for name in ("gamma", "beta")),
}


def of_five_classes():
    digits = piece_of_digits(VERY_RAGGED)
    return dataclasses.replace(digits, labels=digits.labels % 5, classes=5)


def source_in(folder, **settings):
    """Train on ten classes; return the run folder, the source of weights."""
    small_run(OneProcess(), folder, build_network=network, **settings)
    return str(folder)


def transferred(communicator, folder, **settings):
    """Train on five classes, with another seed."""
    config = small_config(folder, seed=1, **settings)
    return train(config, communicator, build_network=network, dataset=of_five_classes())


def newest(folder):
    return checkpoints.newest_intact(folder / "checkpoints")[1].tensors


def first_state(folder, **settings):
    """Return the arrays of a run before its first step, by name."""
    kept = {}
    fail_at(
        "training",
        rank=0,
        action=lambda state: kept.update({name: array.copy() for name, array in state.named_arrays()}),
    )
    transferred(OneProcess(), folder, **settings)
    return kept


def same(one, other):
    return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())


@pytest.mark.parametrize("given", ["run folder", "checkpoint"])
def test_matching_tensors_start_with_the_bits_of_the_source_and_the_others_with_those_of_the_seed(
    tmp_path, capsys, given
):
    source = source_in(tmp_path / "source")
    if given == "checkpoint":
        source = str(sorted((tmp_path / "source" / "checkpoints").iterdir())[0])
    theirs = newest(tmp_path / "source") if given == "run folder" else checkpoints.read(tmp_path / source).tensors
    capsys.readouterr()
    begun = first_state(tmp_path / "new", init_from=source)
    said = capsys.readouterr().out
    plain = network((8, 8, 1), 5)
    plain.initialize(Key(1).of("initialization"))
    names = [name for name, _ in [*plain.named_parameters(), *plain.named_buffers()]]
    assert "residual_1.body.batchnorm_1.mean" in names
    for name in set(names) - OF_THE_CLASSES:
        assert same(begun.pop(name), theirs[name]), name
    for name in OF_THE_CLASSES:
        assert same(begun.pop(name), dict(plain.named_parameters())[name]), name
    assert "first_moment/conv2d_1.weight" in begun, "the optimizer's vectors are not copied"
    assert not any(array.any() for array in begun.values())
    assert f"begins with {len(names) - 2} of {len(names)} tensors from {source}" in said
    assert "; initialized: affine_2.weight, affine_2.bias\n" in said


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_parameters_keep_their_bits_and_all_others_change(tmp_path, optimizer, monkeypatch):
    lengths, clip_by_norm = [], step.clip_by_norm

    def clipped(gradient, largest, norm_of):
        views = dict(built[-1].views(gradient))
        lengths.append({name: float(np.abs(view).sum()) for name, view in views.items()})
        return clip_by_norm(gradient, largest, norm_of)

    built, build = [], network
    monkeypatch.setitem(globals(), "network", lambda *shape: built.append(build(*shape)) or built[-1])
    monkeypatch.setattr(step, "clip_by_norm", clipped)
    pull = {"optimizer": optimizer, "weight_decay": 0.1, "l1_decay": 0.01, "clip_norm": 0.5}
    begun = first_state(tmp_path / "run", freeze=FREEZE, **pull)
    ended = newest(tmp_path / "run")
    parameters = {name for name, _ in built[-1].named_parameters()}
    assert parameters > FROZEN
    assert {name for name in parameters if same(begun[name], ended[name])} == FROZEN
    assert all(of_step[name] == 0 for of_step in lengths for name in FROZEN), "they do not count in the norm"
    assert all(sum(of_step.values()) > 0 for of_step in lengths)
    buffers = [name for name, _ in built[-1].named_buffers()]
    assert not any(same(begun[name], ended[name]) for name in buffers), "moments are measured, not trained"


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "settings", [{}, {"cross_check": 1, "clip_norm": 0.5, "optimizer": "momentum", "balance": True}]
)
def test_every_number_of_ranks_gives_the_bits_of_one_process(communicator, shared_tmp_path, settings, monkeypatch):
    """Only rank 0 reads the source: another host need not have it."""
    settings = {"freeze": FREEZE, "init_from": str(shared_tmp_path / "source"), **settings}
    expected = None
    if communicator.rank == 0:
        source_in(shared_tmp_path / "source")
        expected = transferred(OneProcess(), shared_tmp_path / "one", **settings)
    else:
        monkeypatch.delattr(transfer, "find_checkpoint")
    communicator.barrier()
    for size, part in worlds(communicator):
        found = transferred(part, shared_tmp_path / f"{size}", **settings)
        if part.rank == 0:
            assert found.state_sha256 == expected.state_sha256, f"{size} ranks differ from one process"
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("settings", [{"init_from": "nowhere"}, {"freeze": "conv2d"}])
def test_all_ranks_refuse_an_impossible_transfer_before_anything_is_written(communicator, shared_tmp_path, settings):
    with pytest.raises(UserError, match=next(iter(settings.values()))) as caught:
        transferred(communicator, shared_tmp_path / "run", **settings)
    assert caught.value.agreed
    communicator.barrier()
    assert not (shared_tmp_path / "run").exists()
    remove(communicator, shared_tmp_path)


def test_a_resumed_run_continues_from_its_own_weights_and_does_not_need_the_source(tmp_path, capsys):
    settings = {"init_from": source_in(tmp_path / "source"), "freeze": FREEZE}
    straight = transferred(OneProcess(), tmp_path / "straight", **settings)
    fresh = transferred(OneProcess(), tmp_path / "auto", resume="auto", **settings)
    assert fresh.state_sha256 == straight.state_sha256, "without a checkpoint it begins with the source"
    transferred(OneProcess(), tmp_path / "stopped", max_steps=2, **settings)
    shutil.rmtree(tmp_path / "source")
    capsys.readouterr()
    resumed = transferred(OneProcess(), tmp_path / "stopped", resume="auto", **settings)
    assert resumed.state_sha256 == straight.state_sha256
    said = capsys.readouterr().out
    assert "resumed from" in said
    assert "begins with" not in said


def test_the_checkpoint_before_a_damaged_one_is_used_and_the_damaged_one_is_named(tmp_path, capsys):
    source = source_in(tmp_path / "source")
    *_, before, damaged = sorted((tmp_path / "source" / "checkpoints").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    expected = transferred(OneProcess(), tmp_path / "expected", init_from=str(before))
    capsys.readouterr()
    found = transferred(OneProcess(), tmp_path / "found", init_from=source)
    assert found.state_sha256 == expected.state_sha256
    said = capsys.readouterr()
    assert f"tensors from {before}" in said.out
    assert f"distdl: warning: {damaged} is damaged" in said.err
