"""The trials of each round: pure functions of the settings and of the results so far, the same on every rank.

The procedure of section 6.5.2 of the book:

0. give each hyperparameter a range, usually a wide one on a logarithmic scale;
1. draw values from the ranges at random;
2. train with them for a few epochs, and judge them by the accuracy on the validation data, never on the test data;
3. narrow the ranges to those of the best trials, and repeat from 1.

Successive halving (Jamieson and Talwalkar, *Non-stochastic best arm identification and hyperparameter optimization*,
2016) spends the same epochs differently: many trials start, and only the better half continues after a few epochs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distdl.rng import Key
from distdl.search.settings import Range, SearchSettings, rounded

#: Digits of a drawn number: enough to tell trials apart, and few enough to read and type.
DIGITS = 6


@dataclass(frozen=True)
class Trial:
    """A training with certain hyperparameters up to an epoch. Rounds and trials count from 1."""

    round: int
    trial: int
    settings: dict[str, int | float]
    """The drawn hyperparameters, by name."""
    epochs: int
    run_folder: str
    """Relative to the folder of the search. With halving a trial keeps its folder over all rounds."""


@dataclass(frozen=True)
class TrialResult(Trial):
    """A trial and its outcome: a line of ``results.jsonl``."""

    steps: int | None
    """Number of steps. All fields of the outcome are None if the training has diverged."""
    validation_loss: float | None
    validation_accuracy: float | None
    """None for regression, which is judged by the loss alone."""
    test_accuracy: float | None
    """For the reader only: it judges no trial. None if the trial may continue in a later round."""
    weights_sha256: str | None

    @property
    def diverged(self) -> bool:
        """Whether the loss or the weights became NaN or infinite."""
        return self.steps is None

    @property
    def sort_key(self) -> tuple[bool, int, float, float, int, int]:
        """The key that sorts results, the best first: a total order that depends on the results alone.

        Longer trainings come first, because halving stopped the shorter ones. Then the order is by accuracy, loss, and
        the earlier trial.
        """
        accuracy, loss = self.validation_accuracy or 0.0, self.validation_loss or 0.0
        return self.diverged, -self.epochs, -accuracy, loss, self.round, self.trial


def value_at(one: Range, uniform: float) -> int | float:
    """Return the value of a range for a number in [0, 1), to `DIGITS` digits.

    Whole numbers are equally likely on a linear scale, and as likely as log((n + 1) / n) on a logarithmic one.

    >>> value_at(Range("lr", 1e-6, 1e-2, "log"), 0.5), value_at(Range("batch_size", 16, 19), 0.5)
    (0.0001, 18)
    """
    low, high = float(one.low), float(one.high + one.whole)
    if one.scale == "log":
        value = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
    else:
        value = low + uniform * (high - low)
    return min(max(math.floor(value) if one.whole else float(f"{value:.{DIGITS}g}"), one.low), one.high)


def draw(ranges: Sequence[Range], seed: int, round_number: int, trial: int) -> dict[str, int | float]:
    """Return the hyperparameters of a trial. A value does not depend on the other ranges."""
    key = Key(seed).of("hyperparameters", round_number, trial)
    return {one.name: value_at(one, float(key.of(one.name).uniform(1)[0])) for one in ranges}


def best_of(results: Sequence[TrialResult], share: float, least: int) -> list[TrialResult]:
    """Return the best `share` of the results, at least `least` of them, without those that have diverged."""
    count = max(least, rounded(len(results) * share))
    return [one for one in sorted(results, key=lambda one: one.sort_key)[:count] if not one.diverged]


def narrowed(ranges: Sequence[Range], results: Sequence[TrialResult], share: float) -> tuple[Range, ...]:
    """Return the ranges that the best results span; the same ranges if fewer than two have not diverged."""
    kept = best_of(results, share, 2)
    if len(kept) < 2:
        return tuple(ranges)
    values = {one.name: [result.settings[one.name] for result in kept] for one in ranges}
    return tuple(replace(one, low=min(values[one.name]), high=max(values[one.name])) for one in ranges)


def ranges_of_round(settings: SearchSettings, number: int, results: Sequence[TrialResult]) -> tuple[Range, ...]:
    """Return the ranges that the trials of a round are drawn from, narrowed by the rounds before it."""
    ranges = settings.ranges
    if settings.method == "random":
        for before in range(1, number):
            ranges = narrowed(ranges, [one for one in results if one.round == before], settings.share)
    return ranges


def trials_of_round(settings: SearchSettings, number: int, results: Sequence[TrialResult]) -> list[Trial]:
    """Return the trials of a round in order; `results` must hold all results of the rounds before it."""
    epochs = settings.epochs[number - 1]
    if settings.method == "halving" and number > 1:
        kept = best_of([one for one in results if one.round == number - 1], settings.share, 1)
        kept.sort(key=lambda one: one.trial)
        return [Trial(number, one.trial, one.settings, epochs, one.run_folder) for one in kept]
    ranges, digits = ranges_of_round(settings, number, results), len(str(settings.trials))
    folder = "trials/trial" if settings.method == "halving" else f"trials/round-{number}-trial"
    return [
        Trial(number, trial, draw(ranges, settings.seed, number, trial), epochs, f"{folder}-{trial:0{digits}d}")
        for trial in range(1, settings.trials + 1)
    ]


def leaderboard(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the newest result of each trial, the best first."""
    newest = {one.run_folder: one for one in results}
    return sorted(newest.values(), key=lambda one: one.sort_key)
