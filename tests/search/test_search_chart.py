"""The chart of a search."""

from dataclasses import asdict

import pytest

from distdl.config import TrainConfig
from distdl.search.chart import MOST_ENTRIES, search_figure
from distdl.search.procedure import TrialResult, trials_of_round
from distdl.search.settings import Range, SearchSettings

pytest.importorskip("matplotlib")

UNKNOWN = {"test_accuracy": None, "weights_sha256": None}


def test_the_legend_of_the_latest_rounds_is_beside_the_panels():
    ranges = (Range("lr", 1e-4, 1e-1, "log"), Range("weight_decay", 1e-8, 1e-4, "log"))
    settings = SearchSettings(ranges=ranges, config=TrainConfig(epochs=1), rounds=12, trials=2).checked()
    results: list[TrialResult] = []
    for number in range(1, settings.rounds + 1):
        results += [
            TrialResult(**asdict(trial), steps=6, validation_loss=0.5, validation_accuracy=0.9, **UNKNOWN)
            for trial in trials_of_round(settings, number, results)
        ]
    figure = search_figure(results, settings)
    figure.draw_without_rendering()
    last = figure.axes[-1]
    legend = last.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [f"round {n}" for n in range(3, 13)][-MOST_ENTRIES:]
    shown, panel = legend.get_window_extent(), last.get_window_extent()
    assert shown.x0 >= panel.x1
    assert panel.y0 <= shown.y0
    assert shown.y1 <= panel.y1
