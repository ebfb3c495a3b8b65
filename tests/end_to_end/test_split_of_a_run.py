"""The split of a run: by shares that the user gives, on any number of ranks, and as an earlier version drew it."""

from pathlib import Path

import numpy as np
import pytest
from small_runs import piece_of_digits, proof, remove, small_config, sub_world

from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.data.sources import folder, load
from distdl.engine import train
from distdl.errors import UserError
from distdl.inference.load import load as load_runs
from distdl.parallel import OneProcess

SHARES = {"validation_share": 0.3, "test_share": 0.2}


def run(communicator, run_dir, dataset, **settings):
    config = small_config(run_dir, model="mlp", **settings)
    summary = train(config, communicator, dataset=dataset)
    communicator.barrier()
    return summary


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("settings", [SHARES, {"validation_share": 0.4}], ids=str)
def test_shares_give_the_same_bits_on_any_ranks_and_after_a_resume(communicator, shared_tmp_path, settings):
    dataset = load("digits", None) if "test_share" in settings else piece_of_digits(300)
    expected = None
    if communicator.rank == 0:
        expected = proof(shared_tmp_path / "one", run(OneProcess(), shared_tmp_path / "one", dataset, **settings))
    for size in {2, communicator.size}:
        part = sub_world(communicator, size) if size <= communicator.size else None
        if part is not None:
            run_dir = shared_tmp_path / str(size)
            run(part, run_dir, dataset, max_steps=size + 1, **settings)
            found = proof(run_dir, run(part, run_dir, dataset, resume="auto", **settings))
            if part.rank == 0:
                assert found == expected, f"{size} ranks"
        communicator.barrier()
    remove(communicator, shared_tmp_path)


def test_shares_replace_the_default_and_a_resume_keeps_them(tmp_path):
    digits = load("digits", None)
    run(OneProcess(), tmp_path, digits, max_steps=2, **SHARES)
    [trained] = load_runs([tmp_path], OneProcess())
    sizes = [rows.size / len(digits.labels) for rows in vars(trained.data.parts).values()]
    assert sizes == pytest.approx([0.5, 0.3, 0.2], abs=0.005)
    with pytest.raises(UserError, match=r"--test-share is 0.1 here and 0.2 in the checkpoint"):
        run(OneProcess(), tmp_path, digits, resume="auto", **{**SHARES, "test_share": 0.1})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"test_share": 0.2}, "--test-share 0.2 has no effect: digits has its own test part; leave it out"),
        ({"validation_share": 1.0}, "--validation-share must be below 1, a share of the samples, not 1.0"),
        ({"validation_share": 0.0}, "--validation-share must be above 0, not 0.0"),
        ({"validation_share": float("nan")}, "--validation-share must be above 0, not nan"),
        ({"validation_share": 0.001}, "the validation part would be empty"),
    ],
)
def test_a_share_that_cannot_be_used_is_one_line(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        run(OneProcess(), tmp_path / "run", piece_of_digits(300), **settings)
    assert not list(tmp_path.iterdir())


def test_shares_that_leave_nothing_for_training_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"take 1.05 of the samples \(by default each is 0.15\)"):
        run(OneProcess(), tmp_path / "run", load("digits", None), validation_share=0.9)


def test_a_run_that_an_earlier_version_split_is_resumed_and_evaluated_with_its_split(tmp_path, monkeypatch):
    """Earlier versions did not stratify the validation part beside an own test part."""
    dataset = piece_of_digits(300)
    with monkeypatch.context() as patch:
        now = PreparedDataset._split.__func__
        earlier = classmethod(lambda cls, *given, **more: now(cls, *given, **{**more, "stratified": False}))
        patch.setattr(PreparedDataset, "_split", earlier)
        expected = run(OneProcess(), tmp_path / "whole", dataset)
        run(OneProcess(), tmp_path / "part", dataset, max_steps=3)
    run(OneProcess(), tmp_path / "part", dataset, max_steps=5, resume="auto")  # its checkpoint is of this version
    assert run(OneProcess(), tmp_path / "part", dataset, resume="auto").weights_sha256 == expected.weights_sha256
    [trained] = load_runs([tmp_path / "part"], OneProcess(), dataset=dataset)
    assert trained.weights_sha256 == expected.weights_sha256
    assert not np.array_equal(trained.data.parts.validation, PreparedDataset.prepare(dataset, 0).parts.validation)
    run(OneProcess(), tmp_path / "new", dataset)
    [trained] = load_runs([tmp_path / "new"], OneProcess(), dataset=dataset)
    assert trained.data.sha256() == PreparedDataset.prepare(dataset, trained.config.seed).sha256()
    both = load_runs([tmp_path / "part", tmp_path / "new"], OneProcess(), dataset=dataset)  # each has its own split
    assert [one.data.sha256() for one in both] == [
        PreparedDataset._split(dataset, trained.config.seed, (None, None), stratified=stratified).sha256()
        for stratified in (False, True)
    ]


@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_a_run_of_an_earlier_version_keeps_the_plain_order_of_the_classes_of_its_folder(parts, tmp_path, monkeypatch):
    """Earlier versions put class 10 before class 2. Their checkpoints have no signature."""
    image = pytest.importorskip("PIL.Image")
    names = ["2", "10", "1"]
    for part in parts:
        for k, name in enumerate(names):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(10):
                color = (80 * k, 20 * i, 10 * len(part))
                image.new("RGB", (6, 6), color).save(tmp_path / "images" / part / name / f"{i}.png")
    settings = {"model": "mlp", "dataset": f"folder:{tmp_path / 'images'}", "batch_size": 16, "epochs": 4}
    with monkeypatch.context() as patch:
        patch.setattr(folder, "natural_order", str)
        patch.setattr(PreparedDataset, "signature", lambda self: None)
        now = PreparedDataset._split.__func__
        earlier = classmethod(lambda cls, *given, **more: now(cls, *given, **{**more, "stratified": False}))
        if len(parts) > 1:
            patch.setattr(PreparedDataset, "_split", earlier)
        expected = train(TrainConfig(**settings, run_dir=tmp_path / "whole"), OneProcess())
        train(TrainConfig(**settings, run_dir=tmp_path / "part", max_steps=2), OneProcess())
    [trained] = load_runs([tmp_path / "part"], OneProcess(), with_data=False)
    assert trained.signature.names == ("1", "10", "2")
    resumed = train(TrainConfig(**settings, run_dir=tmp_path / "part", resume="auto"), OneProcess())
    assert resumed.weights_sha256 == expected.weights_sha256
    [trained] = load_runs([tmp_path / "part"], OneProcess())
    assert trained.signature.names == trained.data.class_names == ("1", "10", "2")
    assert trained.data.images[trained.data.labels == 2][0, 0, 0, 0] == 0  # the colour of class 2
    train(TrainConfig(**settings, run_dir=tmp_path / "new"), OneProcess())
    for runs in (["part", "new"], ["new", "part"]):
        with pytest.raises(UserError, match=r"numbers the classes in another order"):
            load_runs([tmp_path / name for name in runs], OneProcess())


def test_a_run_that_moved_away_from_its_cache_is_scored_without_one(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            image.new("RGB", (6, 6), (80 * k, 20 * i, 0)).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = {"model": "mlp", "dataset": "folder:images", "batch_size": 16, "epochs": 1, "cache": Path("cache")}
    train(TrainConfig(**settings, run_dir=tmp_path / "elsewhere" / "run"), OneProcess())
    monkeypatch.chdir(tmp_path / "elsewhere")
    [trained] = load_runs([Path("run")], OneProcess(), dataset=f"folder:{tmp_path / 'images'}")
    assert not isinstance(trained.data.images, np.memmap)
    assert [path.name for path in Path().iterdir()] == ["run"]
