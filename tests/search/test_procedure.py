"""Which trials there are: held against plain versions of the book's procedure and of halving."""

import math
from dataclasses import replace

import numpy as np
import pytest

from distdl.config import TrainConfig
from distdl.rng import Key
from distdl.search.procedure import Record, drawn, narrowed, planned, ranges_of, sampled, standing
from distdl.search.settings import Range, Settings

LR, DECAY = Range("lr", 1e-6, 1e-2, "log"), Range("weight_decay", 0.0, 0.4)
SETTINGS = Settings(ranges=(LR, DECAY), config=TrainConfig(epochs=8), trials=10, keep=0.3).checked()
HALVING = replace(SETTINGS, method="halving", rounds=4, trials=8, keep=0.5).checked()


def record_of(trial, accuracy, test_accuracy=None, loss=1.0):
    steps, loss = (None, None) if accuracy is None else (10, loss)
    outcome = {"steps": steps, "validation_loss": loss, "validation_accuracy": accuracy, "test_accuracy": test_accuracy}
    return Record(**vars(trial), **outcome, weights_sha256=None)


def round_of(settings, number, records, accuracies):
    return [record_of(trial, one) for trial, one in zip(planned(settings, number, records), accuracies, strict=True)]


def test_a_logarithmic_scale_is_the_book_s_power_of_ten_of_a_uniform_number():
    for u in np.linspace(0, 1, 100, endpoint=False):
        expected = 10 ** (-6 + u * (-2 - -6))
        assert drawn(LR, u) == pytest.approx(expected, rel=1e-5)
        assert drawn(DECAY, u) == pytest.approx(0.4 * u, rel=1e-5)


def test_both_ends_of_whole_numbers_are_drawn_as_often_as_what_is_between():
    linear, log = Range("batch_size", 3, 6), Range("batch_size", 1, 4, "log")
    uniforms = (np.arange(10_000) + 0.5) / 10_000
    counts = np.bincount([drawn(linear, u) for u in uniforms])
    assert counts.tolist() == [0, 0, 0, 2500, 2500, 2500, 2500]
    counts = np.bincount([drawn(log, u) for u in uniforms])[1:]
    expected = [10_000 * math.log((n + 1) / n) / math.log(5) for n in (1, 2, 3, 4)]
    assert np.abs(counts - expected).max() <= 1
    assert type(drawn(linear, 0.5)) is int


def test_rounding_never_leaves_the_range():
    narrow = Range("lr", 0.12345678, 0.12345679)
    assert all(narrow.low <= drawn(narrow, u) <= narrow.high for u in (0.0, 0.5, 1 - 2**-53))
    point = Range("lr", 0.25, 0.25, "log")
    assert drawn(point, 0.7) == 0.25


def test_a_trial_s_settings_are_those_of_its_key_and_of_nothing_else():
    found = sampled(SETTINGS.ranges, 5, 2, 7)
    [u] = Key(5).of("hyperparameters", 2, 7, "lr").uniform(1)
    assert found["lr"] == drawn(LR, float(u))
    assert sampled([LR], 5, 2, 7) == {"lr": found["lr"]}, "another range changes nothing"
    others = [sampled(SETTINGS.ranges, *key)["lr"] for key in ((5, 2, 8), (5, 3, 7), (6, 2, 7))]
    assert len({found["lr"], *others}) == 4


def test_ranges_are_narrowed_to_what_the_best_span():
    accuracies = [0.1, 0.9, None, 0.5, 0.8, 0.2, 0.8, 0.7, None, 0.3]
    records = round_of(SETTINGS, 1, [], accuracies)
    kept = [records[1], records[4], records[6]]  # three of ten, by a sort that a person does
    for one, new in zip(SETTINGS.ranges, narrowed(SETTINGS.ranges, records, 0.3), strict=True):
        values = [record.settings[one.name] for record in kept]
        assert new == replace(one, low=min(values), high=max(values))
    assert ranges_of(SETTINGS, 2, records) == narrowed(SETTINGS.ranges, records, 0.3)
    assert narrowed(SETTINGS.ranges, list(reversed(records)), 0.3) == ranges_of(SETTINGS, 2, records)
    for trial in planned(SETTINGS, 2, records):
        for one in ranges_of(SETTINGS, 2, records):
            assert one.low <= trial.settings[one.name] <= one.high


def test_of_equal_accuracies_the_smaller_losses_are_kept_and_without_any_they_judge_alone():
    records = [record_of(trial, 0.5, loss=10.0 - trial.trial) for trial in planned(SETTINGS, 1, [])]
    for judged in (records, [replace(record, validation_accuracy=None) for record in records]):
        assert [record.trial for record in standing(judged)] == list(range(10, 0, -1))
        values = [record.settings["lr"] for record in judged[-3:]]
        assert narrowed([LR], judged, 0.3) == (replace(LR, low=min(values), high=max(values)),)


def test_of_equal_results_the_earlier_trials_are_kept():
    records = round_of(SETTINGS, 1, [], [0.5] * 10)
    values = [record.settings["lr"] for record in records[:3]]
    assert narrowed([LR], records, 0.3) == (replace(LR, low=min(values), high=max(values)),)


@pytest.mark.parametrize("accuracies", [[None] * 10, [None, 0.5, *[None] * 8]])
def test_ranges_stay_where_fewer_than_two_trials_have_not_diverged(accuracies):
    records = round_of(SETTINGS, 1, [], accuracies)
    assert narrowed(SETTINGS.ranges, records, 0.3) == SETTINGS.ranges


def test_test_accuracy_judges_nothing():
    trials, accuracies = planned(SETTINGS, 1, []), [n / 10 for n in range(10)]
    plain = [record_of(*pair) for pair in zip(trials, accuracies, strict=True)]
    other = [record_of(*pair, test_accuracy=1 - pair[1]) for pair in zip(trials, accuracies, strict=True)]
    assert planned(SETTINGS, 2, plain) == planned(SETTINGS, 2, other)
    assert [record.trial for record in standing(other)] == [record.trial for record in standing(plain)]


def test_halving_goes_on_with_the_better_half_and_twice_the_epochs():
    first = round_of(HALVING, 1, [], [0.1, 0.6, None, 0.8, 0.6, 0.2, 0.6, 0.7])
    second = planned(HALVING, 2, first)
    assert [trial.trial for trial in second] == [2, 4, 5, 8]
    assert [(trial.epochs, trial.run_folder) for trial in second] == [(2, f"trials/trial-{n}") for n in (2, 4, 5, 8)]
    assert [trial.settings for trial in second] == [first[n - 1].settings for n in (2, 4, 5, 8)]
    records = [*first, *round_of(HALVING, 2, first, [0.9, 0.8, 0.95, 0.1])]
    third = round_of(HALVING, 3, records, [0.5, 0.6])
    assert [record.trial for record in third] == [2, 5]
    records += third
    assert [(trial.trial, trial.epochs) for trial in planned(HALVING, 4, records)] == [(5, 8)]
    # Whoever has come further stands higher; those that have diverged are last.
    assert [record.trial for record in standing(records)] == [5, 2, 4, 8, 7, 6, 1, 3]


def test_halving_ends_early_where_all_have_diverged():
    first = round_of(HALVING, 1, [], [None] * 8)
    assert planned(HALVING, 2, first) == []
    assert planned(HALVING, 3, first) == []
