"""The lines that a search prints."""

import pytest

from distdl.config import TrainConfig
from distdl.search.procedure import trials_of_round
from distdl.search.settings import Range, SearchSettings
from distdl.search.tables import round_lines

RANGES = (Range("lr", 1e-4, 1e-1, "log"),)


@pytest.mark.parametrize(
    ("method", "number", "source"),
    [
        ("random", 1, "from lr=0.0001:0.1:log"),
        ("random", 2, "from lr=0.0001:0.1:log"),
        ("halving", 1, "from lr=0.0001:0.1:log"),
        ("halving", 2, "that continue"),
    ],
)
def test_a_round_says_whether_its_trials_are_drawn_or_continue(method, number, source):
    config = TrainConfig(model="mlp", epochs=2)
    settings = SearchSettings(ranges=RANGES, config=config, method=method, rounds=2, trials=2).checked()
    first = trials_of_round(settings, 1, [])
    [blank, line] = round_lines(settings, number, first, RANGES)
    assert blank == ""
    assert line.startswith(f"round {number}/2: 2 trials of ")
    assert line.endswith(source)
