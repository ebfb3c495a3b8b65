"""The groups of ranks that train trials, and what a trial prints."""

import io
import sys
from dataclasses import replace

import pytest
from small_runs import piece_of_digits

from distdl.config import TrainConfig
from distdl.errors import DivergedError, UserError
from distdl.parallel import OneProcess
from distdl.search import trials
from distdl.search.procedure import trials_of_round
from distdl.search.settings import Range, SearchSettings
from distdl.search.trials import _WarningsOnly, search

SETTINGS = SearchSettings(
    ranges=(Range("lr", 1e-4, 1e-1, "log"),),
    config=TrainConfig(model="mlp", epochs=1, kernels="numpy"),
    trials=2,
    rounds=1,
).checked()


class Rank(OneProcess):
    """A rank of several, which stops when it has its group."""

    def __init__(self, rank, size, folder):
        super().__init__()
        self.rank, self.size, self.folder = rank, size, str(folder)

    def bcast_json(self, value, root=0):
        return self.folder  # rank 0 chooses it before the groups are formed

    def split(self, color):
        self.color = color
        error = UserError("stop here")
        error.agreed = True
        raise error


@pytest.mark.parametrize(
    ("size", "ranks_per_trial", "groups"),
    [(3, 1, [0, 1, 2]), (4, 2, [0, 0, 1, 1]), (5, 2, [0, 0, 0, 1, 1]), (7, 2, [0, 0, 0, 1, 1, 2, 2]), (3, 3, [0] * 3)],
)
def test_ranks_form_groups_of_neighbours_that_differ_by_one_rank_at_most(size, ranks_per_trial, groups, tmp_path):
    settings = replace(SETTINGS, ranks_per_trial=ranks_per_trial, out=tmp_path / "search")
    found = []
    for rank in range(size):
        one = Rank(rank, size, settings.out)
        with pytest.raises(UserError, match="stop here"):
            search(settings, one)
        found.append(one.color)
    assert found == groups


def test_a_search_without_a_signal_does_all_trials(tmp_path):
    config = replace(SETTINGS.config, batch_size=32, micro_batch_size=8)
    settings = replace(SETTINGS, config=config, out=tmp_path / "search")
    assert len(search(settings, OneProcess(), dataset=piece_of_digits(90)).results) == 2


@pytest.mark.parametrize(("kernels", "expected"), [("numpy", 0), ("compiled", 1)])
def test_a_search_compiles_its_network_before_the_first_trial_and_says_so(
    kernels, expected, tmp_path, monkeypatch, capsys
):
    def compiled(network, communicator, show, *, training):
        assert (network.stack.kernels.name, training) == ("compiled", True)
        show("compiling kernels for this CPU")
        return []

    def trained(*_, **__):
        raise DivergedError("the loss is not finite")

    monkeypatch.setattr(trials, "compile_for_network", compiled)
    monkeypatch.setattr(trials, "train", trained)
    config = replace(SETTINGS.config, kernels=kernels)
    search(replace(SETTINGS, config=config, out=tmp_path / "search"), OneProcess(), dataset=piece_of_digits(90))
    assert capsys.readouterr().out.count("compiling kernels for this CPU\n") == expected


def test_a_trial_prints_only_its_warnings_even_on_a_terminal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    (first, _) = trials_of_round(SETTINGS, 1, [])
    console = _WarningsOnly(first)
    console.line("epoch 1/2")
    console._clock = iter((0.0, 60.0)).__next__
    for step in (1, 2):
        console.progress(SETTINGS.config, step, 10, 0.5)
    console.warning("the disk is full")
    assert sys.stdout.getvalue() == ""
    assert capsys.readouterr().err == f"distdl: warning: {first.run_folder}: the disk is full\n"
