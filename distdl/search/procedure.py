"""Which trials there are: pure functions of the settings and of the results so far, the same on every rank.

The procedure of section 6.5.2 of the book:

0. give each hyperparameter a range, mostly a wide one on a logarithmic scale;
1. draw values from the ranges at random;
2. train with them, for a few epochs, and judge that by the accuracy on the validation data, never on the test data;
3. narrow the ranges to those of the best trials, and begin again at 1.

Successive halving (Jamieson and Talwalkar, *Non-stochastic best arm identification and hyperparameter optimization*,
2016) spends the same epochs otherwise: many trials begin, and after a few epochs only the better half goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from distdl.rng import Key
from distdl.search.settings import Range, Settings, nearest

#: Digits of a drawn number: enough to tell trials apart, few enough to be read, and typed again.
DIGITS = 6


@dataclass(frozen=True)
class Trial:
    """A training with certain settings, until it has had so many epochs; rounds and trials are counted from 1."""

    round: int
    trial: int
    settings: dict[str, int | float]
    epochs: int
    #: Below the folder of the search. With halving a trial stays there from round to round.
    run_folder: str


@dataclass(frozen=True)
class Record:
    """A trial and what came of it: a line of ``results.jsonl``."""

    round: int
    trial: int
    settings: dict[str, int | float]
    epochs: int
    run_folder: str
    steps: int | None
    """The steps taken; None, as what follows, where the training has diverged."""
    validation_loss: float | None
    validation_accuracy: float | None
    """None for tasks that have none, such as regression: the loss alone judges them."""
    test_accuracy: float | None
    """For whoever reads the table; no trial is judged by it. None where the trial may go on in a later round."""
    weights_sha256: str | None

    @property
    def diverged(self) -> bool:
        """Whether the training has left the range of numbers."""
        return self.steps is None

    @property
    def key(self) -> tuple[bool, int, float, float, int, int]:
        """What records are sorted by, the best first: a total order, of nothing but the results.

        Where accuracies are equal, the smaller loss comes first, and then the earlier trial. A longer training comes
        before a shorter one, which halving has given up.
        """
        accuracy, loss = self.validation_accuracy or 0.0, self.validation_loss or 0.0
        return self.diverged, -self.epochs, -accuracy, loss, self.round, self.trial

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def drawn(one: Range, uniform: float) -> int | float:
    """Return the value of a range that a number in [0, 1) stands for, to `DIGITS` digits.

    Whole numbers are equally likely on a linear scale, and as likely as log((n + 1) / n) on a logarithmic one.

    >>> drawn(Range("lr", 1e-6, 1e-2, "log"), 0.5), drawn(Range("batch_size", 16, 19), 0.5)
    (0.0001, 18)
    """
    low, high = float(one.low), float(one.high + one.whole)
    if one.scale == "log":
        value = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
    else:
        value = low + uniform * (high - low)
    return min(max(math.floor(value) if one.whole else float(f"{value:.{DIGITS}g}"), one.low), one.high)


def sampled(ranges: Sequence[Range], seed: int, number: int, trial: int) -> dict[str, int | float]:
    """Return the settings of a trial of round `number`; those of one range do not depend on the other ranges."""
    key = Key(seed).of("hyperparameters", number, trial)
    return {one.name: drawn(one, float(key.of(one.name).uniform(1)[0])) for one in ranges}


def best(records: Sequence[Record], share: float, least: int) -> list[Record]:
    """Return the best of the records, so large a `share` of them, but at least so many; never one that has diverged."""
    count = max(least, nearest(len(records) * share))
    return [record for record in sorted(records, key=lambda record: record.key)[:count] if not record.diverged]


def narrowed(ranges: Sequence[Range], records: Sequence[Record], share: float) -> tuple[Range, ...]:
    """Return the ranges that the best of the records span; the same where fewer than two have not diverged."""
    kept = best(records, share, 2)
    if len(kept) < 2:
        return tuple(ranges)
    values = {one.name: [record.settings[one.name] for record in kept] for one in ranges}
    return tuple(replace(one, low=min(values[one.name]), high=max(values[one.name])) for one in ranges)


def ranges_of(settings: Settings, number: int, records: Sequence[Record]) -> tuple[Range, ...]:
    """Return the ranges that the trials of round `number` are drawn from, as the rounds before have narrowed them."""
    ranges = settings.ranges
    if settings.method == "random":
        for before in range(1, number):
            ranges = narrowed(ranges, [record for record in records if record.round == before], settings.share)
    return ranges


def planned(settings: Settings, number: int, records: Sequence[Record]) -> list[Trial]:
    """Return the trials of round `number`, in order, where `records` has all of the rounds before."""
    epochs, width = settings.epochs[number - 1], len(str(settings.trials))
    if settings.method == "random":
        ranges = ranges_of(settings, number, records)
        return [
            Trial(
                number,
                trial,
                sampled(ranges, settings.seed, number, trial),
                epochs,
                f"trials/round-{number}-trial-{trial:0{width}d}",
            )
            for trial in range(1, settings.trials + 1)
        ]
    if number == 1:
        return [
            Trial(
                1, trial, sampled(settings.ranges, settings.seed, 1, trial), epochs, f"trials/trial-{trial:0{width}d}"
            )
            for trial in range(1, settings.trials + 1)
        ]
    kept = best([record for record in records if record.round == number - 1], settings.share, 1)
    return [
        Trial(number, record.trial, record.settings, epochs, record.run_folder)
        for record in sorted(kept, key=lambda record: record.trial)
    ]


def standing(records: Sequence[Record]) -> list[Record]:
    """Return the newest record of each trial, the best first."""
    newest = {record.run_folder: record for record in records}
    return sorted(newest.values(), key=lambda record: record.key)
