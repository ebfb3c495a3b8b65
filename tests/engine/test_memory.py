"""A run that cannot fit into the memory of its hosts is refused before the first step, on all ranks, in one line."""

import math
from dataclasses import replace

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.data.sources import Dataset
from distdl.engine import memory, train
from distdl.engine.memory import check_memory, check_resized, check_room_for_dataset, need_of
from distdl.engine.state import TrainingState
from distdl.errors import UserError
from distdl.mapped_files import created, open_mapped
from distdl.nn import build_model
from distdl.optim import optimizer_class
from distdl.parallel import OneProcess

MB = 10**6


def prepared(config, shape=(32, 32, 3), samples=100):
    """Return a dataset and a state for a config; the arrays of the images take no memory."""
    labels = np.arange(samples) % 4
    pixels = (np.arange(samples, dtype=np.uint8)).reshape(-1, 1, 1, 1)
    split = PreparedDataset.prepare(Dataset("x", pixels, labels, 4, None), 0)
    data = replace(split, images=np.broadcast_to(np.zeros((), np.uint8), (samples, *shape)))
    network = build_model(config.model, shape, 4)
    return data, TrainingState(network, optimizer_class("adam")(network.parameters.size))


class Ranks:
    """Pretends that all ranks of some hosts have the same numbers as this one."""

    def __init__(self, *hosts, rank=0):
        self.hosts, self.size, self.rank = hosts, len(hosts), rank

    def allgather_json(self, mine):
        return [[host, *mine[1:]] for host in self.hosts]

    def bcast_json(self, value):
        return value


@pytest.fixture
def memory_of(monkeypatch):
    """Return a function that sets the memory that a host, and a process, have left."""

    def is_left(host=math.inf, process=math.inf):
        monkeypatch.setattr(memory, "available_bytes", lambda: host)
        monkeypatch.setattr(memory, "available_to_this_process", lambda: process)

    return is_left


CONFIG = TrainConfig(model="resnet20", batch_size=64).checked()


@pytest.fixture(scope="module")
def run():
    return prepared(CONFIG)


@pytest.fixture(scope="module")
def need(run):
    return need_of(CONFIG, *run, ranks=1, rank=0).bytes


def test_there_is_no_message_if_memory_suffices_or_is_unknown(run, need, memory_of):
    for left in ({}, {"host": need}, {"process": need}):
        memory_of(**left)
        assert check_memory(CONFIG, *run, Ranks("a")) == []


@pytest.mark.parametrize("limited", ["host", "process"])
def test_too_little_memory_is_refused_and_a_little_less_than_the_estimate_is_a_warning(limited, run, need, memory_of):
    memory_of(**{limited: 0.6 * need})
    with pytest.raises(UserError) as caught:
        check_memory(CONFIG, *run, Ranks("a"))
    assert caught.value.agreed
    memory_of(**{limited: 0.8 * need})
    [warning] = check_memory(CONFIG, *run, Ranks("a"))
    assert warning.startswith(str(caught.value).split(" which has")[0])
    assert "so the system may kill the run: give --micro-batch-size 8, smaller images with --resize, or a" in warning


def test_the_message_names_the_need_the_memory_and_the_remedies(memory_of):
    data, state = prepared(CONFIG, (1500, 1000, 3))
    memory_of(host=16_000 * MB)
    with pytest.raises(UserError) as caught:
        check_memory(CONFIG, data, state, Ranks("a"))
    words = str(caught.value)
    assert "\n" not in words
    assert words.startswith("--model resnet20 on images of 1500x1000x3 needs about ")
    assert " GB of memory on the host a (1 rank), which has 16.0 GB: give " in words
    assert words.endswith(": give a smaller --micro-batch-size, smaller images with --resize, or a smaller model")


def test_a_suggested_micro_batch_fits(run, need, memory_of):
    memory_of(host=need / 4)
    with pytest.raises(UserError, match=r"give --micro-batch-size (2|4),") as caught:
        check_memory(CONFIG, *run, Ranks("a"))
    size = int(str(caught.value).split("--micro-batch-size ")[1].split(",")[0])
    smaller = TrainConfig(model="resnet20", batch_size=64, micro_batch_size=size).checked()
    assert check_memory(smaller, *run, Ranks("a")) == []


def test_the_ranks_of_a_host_share_its_memory(run, memory_of):
    one = need_of(CONFIG, *run, ranks=4, rank=0).bytes
    memory_of(host=2.1 * one)
    assert check_memory(CONFIG, *run, Ranks("a", "a", "b", "b")) == []
    with pytest.raises(UserError, match=r"on the host b \(4 ranks\).* or fewer ranks"):
        check_memory(CONFIG, *run, Ranks("b", "b", "b", "b"))


def test_only_the_last_rank_has_arrays_for_ragged_micro_batches_and_rank_0_copies_the_state(run):
    needs = [need_of(CONFIG, *run, ranks=3, rank=rank) for rank in range(3)]
    assert needs[0].working == needs[1].working < needs[2].working
    assert needs[0].checkpoint == needs[0].state > 0 == needs[1].checkpoint


def test_a_dataset_that_does_not_fit_is_refused(memory_of, tmp_path):
    arrays = {"images": np.zeros((10, 100, 100, 10), np.uint8), "labels": np.zeros(10, np.int64)}
    memory_of(host=1.1 * MB)
    check_room_for_dataset(Ranks("a", "b"), arrays)
    memory_of(host=0.9 * MB)
    with pytest.raises(
        UserError, match=r"the dataset needs 1.0 MB of memory on the host a, which has 0.9 MB: give .*resize"
    ):
        check_room_for_dataset(Ranks("a", "b"), arrays)
    with created(tmp_path / "images.npy", (10 * MB,), np.uint8):
        pass
    check_room_for_dataset(Ranks("a"), {"images": open_mapped(tmp_path / "images.npy")})
    of_the_user = np.load(tmp_path / "images.npy", mmap_mode="r")
    with pytest.raises(UserError, match=r"the dataset needs 10 MB of memory"):  # it is copied
        check_room_for_dataset(Ranks("a"), {"images": of_the_user})


RESIZED = TrainConfig(model="mlp", dataset="folder:photos", resize="4000").checked()


def test_a_huge_resize_is_refused_before_any_image_is_read(tmp_path, memory_of):
    """The weights of the first layer need 6.4 GB, and Adam and the gradient three times that."""
    (tmp_path / "photos").mkdir()  # with images, or the error would be another
    memory_of(host=10_000 * MB)
    with pytest.raises(
        UserError, match=r"--resize 4000x4000:crop: .* at least 2\d\.\d GB .* but 10\.0 GB are available"
    ):
        train(replace(RESIZED, dataset=f"folder:{tmp_path}/photos", run_dir=tmp_path / "run"), OneProcess())


def test_a_resize_is_accepted_if_memory_suffices_or_nothing_is_resized(memory_of):
    memory_of(host=30_000 * MB)
    check_resized(RESIZED)
    memory_of(host=1)
    for other in (
        {"dataset": "digits"},
        {"resize": None},
        {"model": "net.py:build"},
        {"resize": "1", "model": "vgg11"},
    ):
        check_resized(replace(RESIZED, **other))


def test_a_resize_is_refused_if_not_even_the_parameters_can_be_allocated(memory_of, monkeypatch):
    def build(*_):
        raise np._core._exceptions._ArrayMemoryError((7_000 * MB,), np.dtype(np.uint8))

    monkeypatch.setattr(memory, "network_builder", lambda *_: build)
    memory_of(host=10_000 * MB)
    with pytest.raises(UserError, match=r"at least 28\.0 GB"):
        check_resized(RESIZED)
