"""The trials of each round, compared with plain versions of the book's procedure and of halving."""

import math
from dataclasses import replace

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.rng import Key
from distdl.search.procedure import (
    TrialResult,
    draw,
    leaderboard,
    narrowed,
    ranges_of_round,
    trials_of_round,
    value_at,
)
from distdl.search.settings import Range, SearchSettings

LR, DECAY = Range("lr", 1e-6, 1e-2, "log"), Range("weight_decay", 0.0, 0.4)
SETTINGS = SearchSettings(ranges=(LR, DECAY), config=TrainConfig(epochs=8), trials=10, keep=0.3).checked()
HALVING = replace(SETTINGS, method="halving", rounds=4, trials=8, keep=0.5).checked()


def result_of(trial, accuracy, test_accuracy=None, loss=1.0):
    steps, loss = (None, None) if accuracy is None else (10, loss)
    outcome = {"steps": steps, "validation_loss": loss, "validation_accuracy": accuracy, "test_accuracy": test_accuracy}
    return TrialResult(**vars(trial), **outcome, weights_sha256=None)


def round_of(settings, number, results, accuracies):
    return [result_of(*pair) for pair in zip(trials_of_round(settings, number, results), accuracies, strict=True)]


def test_a_logarithmic_scale_draws_the_book_s_powers_of_ten():
    for u in np.linspace(0, 1, 100, endpoint=False):
        expected = 10 ** (-6 + u * (-2 - -6))
        assert value_at(LR, u) == pytest.approx(expected, rel=1e-5)
        assert value_at(DECAY, u) == pytest.approx(0.4 * u, rel=1e-5)


def test_whole_numbers_are_drawn_equally_often_on_a_linear_scale():
    linear, log = Range("batch_size", 3, 6), Range("batch_size", 1, 4, "log")
    uniforms = (np.arange(10_000) + 0.5) / 10_000
    counts = np.bincount([value_at(linear, u) for u in uniforms])
    assert counts.tolist() == [0, 0, 0, 2500, 2500, 2500, 2500]
    counts = np.bincount([value_at(log, u) for u in uniforms])[1:]
    expected = [10_000 * math.log((n + 1) / n) / math.log(5) for n in (1, 2, 3, 4)]
    assert np.abs(counts - expected).max() <= 1
    assert type(value_at(linear, 0.5)) is int


def test_rounding_never_leaves_the_range():
    narrow = Range("lr", 0.12345678, 0.12345679)
    assert all(narrow.low <= value_at(narrow, u) <= narrow.high for u in (0.0, 0.5, 1 - 2**-53))
    point = Range("lr", 0.25, 0.25, "log")
    assert value_at(point, 0.7) == 0.25


def test_a_trial_s_hyperparameters_depend_on_its_key_alone():
    found = draw(SETTINGS.ranges, 5, 2, 7)
    [u] = Key(5).of("hyperparameters", 2, 7, "lr").uniform(1)
    assert found["lr"] == value_at(LR, float(u))
    assert draw([LR], 5, 2, 7) == {"lr": found["lr"]}, "another range changes nothing"
    others = [draw(SETTINGS.ranges, *key)["lr"] for key in ((5, 2, 8), (5, 3, 7), (6, 2, 7))]
    assert len({found["lr"], *others}) == 4


def test_ranges_are_narrowed_to_what_the_best_span():
    accuracies = [0.1, 0.9, None, 0.5, 0.8, 0.2, 0.8, 0.7, None, 0.3]
    results = round_of(SETTINGS, 1, [], accuracies)
    kept = [results[1], results[4], results[6]]  # the best three of ten
    for one, new in zip(SETTINGS.ranges, narrowed(SETTINGS.ranges, results, 0.3), strict=True):
        values = [result.settings[one.name] for result in kept]
        assert new == replace(one, low=min(values), high=max(values))
    assert ranges_of_round(SETTINGS, 2, results) == narrowed(SETTINGS.ranges, results, 0.3)
    assert narrowed(SETTINGS.ranges, list(reversed(results)), 0.3) == ranges_of_round(SETTINGS, 2, results)
    for trial in trials_of_round(SETTINGS, 2, results):
        for one in ranges_of_round(SETTINGS, 2, results):
            assert one.low <= trial.settings[one.name] <= one.high


def test_the_smaller_loss_decides_if_accuracies_are_equal_or_absent():
    results = [result_of(trial, 0.5, loss=10.0 - trial.trial) for trial in trials_of_round(SETTINGS, 1, [])]
    for judged in (results, [replace(result, validation_accuracy=None) for result in results]):
        assert [result.trial for result in leaderboard(judged)] == list(range(10, 0, -1))
        values = [result.settings["lr"] for result in judged[-3:]]
        assert narrowed([LR], judged, 0.3) == (replace(LR, low=min(values), high=max(values)),)


def test_the_earlier_trials_are_kept_if_results_are_equal():
    results = round_of(SETTINGS, 1, [], [0.5] * 10)
    values = [result.settings["lr"] for result in results[:3]]
    assert narrowed([LR], results, 0.3) == (replace(LR, low=min(values), high=max(values)),)


@pytest.mark.parametrize("accuracies", [[None] * 10, [None, 0.5, *[None] * 8]])
def test_ranges_stay_if_fewer_than_two_trials_have_not_diverged(accuracies):
    results = round_of(SETTINGS, 1, [], accuracies)
    assert narrowed(SETTINGS.ranges, results, 0.3) == SETTINGS.ranges


def test_test_accuracy_judges_nothing():
    trials, accuracies = trials_of_round(SETTINGS, 1, []), [n / 10 for n in range(10)]
    plain = [result_of(*pair) for pair in zip(trials, accuracies, strict=True)]
    other = [result_of(*pair, test_accuracy=1 - pair[1]) for pair in zip(trials, accuracies, strict=True)]
    assert trials_of_round(SETTINGS, 2, plain) == trials_of_round(SETTINGS, 2, other)
    assert [result.trial for result in leaderboard(other)] == [result.trial for result in leaderboard(plain)]


def test_halving_continues_the_better_half_for_twice_the_epochs():
    first = round_of(HALVING, 1, [], [0.1, 0.6, None, 0.8, 0.6, 0.2, 0.6, 0.7])
    second = trials_of_round(HALVING, 2, first)
    assert [trial.trial for trial in second] == [2, 4, 5, 8]
    assert [(trial.epochs, trial.run_folder) for trial in second] == [(2, f"trials/trial-{n}") for n in (2, 4, 5, 8)]
    assert [trial.settings for trial in second] == [first[n - 1].settings for n in (2, 4, 5, 8)]
    results = [*first, *round_of(HALVING, 2, first, [0.9, 0.8, 0.95, 0.1])]
    third = round_of(HALVING, 3, results, [0.5, 0.6])
    assert [result.trial for result in third] == [2, 5]
    results += third
    assert [(trial.trial, trial.epochs) for trial in trials_of_round(HALVING, 4, results)] == [(5, 8)]
    # Longer trainings come first, and trials that have diverged last.
    assert [result.trial for result in leaderboard(results)] == [5, 2, 4, 8, 7, 6, 1, 3]


def test_halving_ends_early_if_all_trials_have_diverged():
    first = round_of(HALVING, 1, [], [None] * 8)
    assert trials_of_round(HALVING, 2, first) == []
    assert trials_of_round(HALVING, 3, first) == []
