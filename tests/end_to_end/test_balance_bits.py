"""Promise 1 with `--balance`: the bits do not depend on the ranks that compute the micro-batches."""

import itertools
import json
import random
import time
from functools import partial

import pytest
from small_runs import VERY_RAGGED, piece_of_digits, proof, remove, small_config, small_run, sub_world

from distdl.engine import prepare, train
from distdl.engine.console import Console
from distdl.engine.timing import balance
from distdl.nn import Affine, Conv2d, Flatten, ReLU, Sequential
from distdl.parallel import OneProcess
from distdl.parallel.communicator import SPIN_SECONDS

RANKS = (1, 2, 3, 4, 5, 8)


class SlowFlatten(Flatten):
    """A layer that waits, like a rank on a slow or shared core."""

    def __init__(self, seconds):
        self.seconds = seconds

    def forward(self, x, *, training, key):
        time.sleep(self.seconds)
        return super().forward(x, training=training, key=key)


def slow_run(communicator, folder, seconds, **settings):
    """Train a network whose layers take `seconds` longer on this rank."""

    def network(input_shape, classes):
        return Sequential([Conv2d(4, 3), ReLU(), SlowFlatten(seconds), Affine(classes)], input_shape)

    config = small_config(folder, **settings)
    summary = train(config, communicator, build_network=network, dataset=piece_of_digits(VERY_RAGGED))
    communicator.barrier()
    return proof(folder, summary)


def shares_of_epochs(folder):
    return [json.loads(line)["shares"] for line in (folder / "timing.jsonl").read_text().splitlines()]


@pytest.mark.mpi(min_size=2)
def test_a_slow_rank_gets_fewer_micro_batches_and_the_bits_stay_the_same(communicator, shared_tmp_path, capsys):
    part = sub_world(communicator, 2)
    if part is not None:
        expected = slow_run(part, shared_tmp_path / "even", 0.0, epochs=6)
        capsys.readouterr()
        found = slow_run(part, shared_tmp_path / "dealt", 0.03 * part.rank, epochs=6, balance=True)
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("balance: ")]
        assert found == expected
        shares = shares_of_epochs(shared_tmp_path / "dealt")
        assert [sum(epoch) for epoch in shares] == [8 + 8 + 6] * 6
        assert shares[0] == [11, 11]
        assert shares[-1][1] < shares[-1][0]
        assert bool(said) == (part.rank == 0)
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("model", ["simple_convnet", "deep_convnet"])
def test_any_shards_in_any_step_give_the_bits_of_one_process(communicator, shared_tmp_path, model, monkeypatch):
    """Deal at random instead of by measured speeds: different shards in each step, some of them empty."""

    def by_chance(self, leaves):
        self.draws = getattr(self, "draws", 0) + 1
        chance = random.Random(self.draws)
        owners = [chance.randrange(len(self.loads)) for _ in range(leaves)]
        return tuple(map(owners.count, range(len(self.loads))))

    expected = small_run(OneProcess(), shared_tmp_path / "one", model=model) if communicator.rank == 0 else None
    monkeypatch.setattr(balance.Balance, "shares", by_chance)
    for size in RANKS:
        part = sub_world(communicator, size) if size <= communicator.size else None
        if part is not None:
            found = small_run(part, shared_tmp_path / f"{size}", model=model, balance=True)
            if part.rank == 0:
                assert found == expected, f"{size} ranks differ from one process"
    remove(communicator, shared_tmp_path)


@pytest.mark.parametrize(("seconds_per_look", "lines"), [(10.0, 6), (0.0, 1)])
def test_shares_that_change_often_are_not_printed_often(tmp_path, monkeypatch, capsys, seconds_per_look, lines):
    """The console's clock advances by some seconds per call."""

    def changed(self, _seconds):
        self.loads = (5, 3)
        return True

    looks = itertools.count(1)
    clock = partial(Console, clock=lambda: seconds_per_look * next(looks))
    monkeypatch.setattr(prepare, "Console", clock)
    monkeypatch.setattr(balance.Balance, "observe", changed)
    small_run(OneProcess(), tmp_path / "run", balance=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("balance: ")]
    assert said[0] == "balance: 5, 3 micro-batches on ranks 0, 1 from step 2 on"
    assert len(said) == lines


def test_balance_may_be_switched_on_and_off_on_resume(tmp_path):
    expected = small_run(OneProcess(), tmp_path / "plain")
    small_run(OneProcess(), tmp_path / "run", max_steps=2)
    small_run(OneProcess(), tmp_path / "run", max_steps=4, balance=True, resume="auto")
    assert small_run(OneProcess(), tmp_path / "run", resume="auto") == expected


def test_only_a_balanced_run_records_shares(tmp_path):
    small_run(OneProcess(), tmp_path / "plain")
    small_run(OneProcess(), tmp_path / "dealt", balance=True)
    assert shares_of_epochs(tmp_path / "dealt") == [[22], [22]]
    assert '"shares"' not in (tmp_path / "plain" / "timing.jsonl").read_text()


def test_ranks_spin_longer_only_while_a_run_is_balanced(tmp_path):
    communicator = OneProcess()
    small_run(communicator, tmp_path / "dealt", balance=True)
    assert communicator.waiting.spin_seconds == balance.SPIN_SECONDS
    small_run(communicator, tmp_path / "plain")
    assert communicator.waiting.spin_seconds == SPIN_SECONDS < balance.SPIN_SECONDS
