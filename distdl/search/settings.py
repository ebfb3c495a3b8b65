"""The settings of a search, and the parser of `--range`. This module imports neither NumPy nor MPI."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from distdl.config import FREE_TO_CHANGE_ON_RESUME, OTHER_NAMES, TrainConfig, flag_of, without_effect
from distdl.errors import UserError, unknown_name

METHODS = ("random", "halving")
SCALES = ("linear", "log")
#: The default share of a round's trials that the next round builds on.
DEFAULT_KEEP = {"random": 0.25, "halving": 0.5}
#: The largest accepted count.
MOST = 2**20

#: Settings that do not change the result of a trial. A resumed search may change these and no others.
WITHOUT_EFFECT = (
    *("config", "run_dir", "resume", "data_dir", "max_steps", "checkpoint_every", "keep_checkpoints", "log_every"),
    *("stall_warning", "detect_hangs", "record_hashes", "threads_per_rank", "balance", "verify_every", "cross_check"),
    *("trace", "dry_run", "require_same_bits", "prove", "tensorboard", "mlflow"),
)


def _searchable() -> Iterator[tuple[str, bool]]:
    for name, kind in typing.get_type_hints(TrainConfig).items():
        kinds = set(typing.get_args(kind) or (kind,)) - {NoneType}
        if kinds <= {int, float} and name not in FREE_TO_CHANGE_ON_RESUME | {"seed"}:
            yield name, float not in kinds


#: The settings of a training that can be searched, and whether each is a whole number.
SEARCHABLE = dict(_searchable())


def flag_name(setting: str) -> str:
    """Return the name of a setting in the form of a flag, such as ``weight-decay``."""
    return setting.replace("_", "-")


@dataclass(frozen=True)
class Range:
    """The values to search for a setting: `low` to `high`, both included, on a linear or logarithmic scale."""

    name: str
    low: float
    high: float
    scale: str = "linear"

    def __str__(self) -> str:
        """Return the range in the form of the flag."""
        return f"{flag_name(self.name)}={self.low!r}:{self.high!r}" + (":log" if self.scale == "log" else "")

    @property
    def whole(self) -> bool:
        """Whether the setting is a whole number."""
        return SEARCHABLE[self.name]

    def checked(self) -> Range:
        """Return the range, with ints if the setting is a whole number; raise `UserError` if it is invalid."""
        if self.name not in SEARCHABLE:
            raise unknown_name("setting to search", self.name, SEARCHABLE, OTHER_NAMES)
        if self.scale not in SCALES:
            raise unknown_name(f"scale of --range {self.name}", self.scale, SCALES)
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise UserError(f"--range {self}: expected two finite numbers")
        if not self.low < self.high:
            raise UserError(f"--range {self}: {self.low:g} is not below {self.high:g}; give the lower end first")
        if self.scale == "log" and not self.low > 0:
            raise UserError(
                f"--range {self}: a logarithmic scale begins above 0; give a lower end above 0, or leave out :log"
            )
        if not self.whole:
            return replace(self, low=float(self.low), high=float(self.high))
        if self.low != int(self.low) or self.high != int(self.high):
            raise UserError(f"--range {self}: {flag_name(self.name)} is a whole number; give whole ends")
        return replace(self, low=int(self.low), high=int(self.high))


def parse_range(text: str) -> Range:
    """Return the range that a text such as ``lr=1e-6:1e-2:log`` describes, or raise `UserError`.

    >>> parse_range("weight-decay=1e-8:1e-4:log")
    Range(name='weight_decay', low=1e-08, high=0.0001, scale='log')
    """
    name, _, rest = text.partition("=")
    numbers = rest.split(":")
    scale = numbers.pop() if len(numbers) == 3 else "linear"
    try:
        low, high = map(float, numbers)
    except ValueError:
        raise UserError(
            f"--range {text[:80]!r}: expected a setting with its lowest and highest value, such as "
            "lr=1e-6:1e-2:log, or batch-size=16:128 on a linear scale"
        ) from None
    return Range(name.replace("-", "_"), low, high, scale).checked()


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The settings of a search; `config` holds the settings that all trials share."""

    ranges: tuple[Range, ...]
    """Setting to search, with its lowest and highest value, such as batch-size=16:128, or lr=1e-6:1e-2:log on a
    logarithmic scale; give one for each setting. It overrides a config file after --."""
    config: TrainConfig = TrainConfig()  # noqa: RUF009  frozen
    method: str = "random"
    """random: each round draws new trials from the ranges that the best trials of the previous round span; halving: the
    first round draws all trials, and each later round continues the best of the previous round."""
    rounds: int = 3
    """Number of rounds."""
    trials: int = 16
    """Trials of a round; with halving, of the first round."""
    keep: float | None = None
    """Share of the trials of a round that the next round builds on; by default 0.25 for random and 0.5 for halving."""
    seed: int = 0
    """Seed of the drawn settings; trainings have their own --seed after --."""
    ranks_per_trial: int = 1
    """Ranks that train a trial together."""
    out: Path | None = None
    """Folder of the results; by default a new folder under runs/."""
    resume: bool = False
    """Continue the search in --out."""

    def checked(self) -> SearchSettings:
        """Return the settings with all defaults filled in; raise `UserError` if one is invalid."""
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        settings = replace(
            self,
            ranges=tuple(one.checked() for one in self.ranges),
            config=self.config.checked(),
            keep=DEFAULT_KEEP[self.method] if self.keep is None else self.keep,
        )
        for name in ("rounds", "trials", "ranks_per_trial"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"{flag_of(name)} must be at least 1 and at most {MOST}, not {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"--seed must be at least 0, not {self.seed}")
        if not 0 < settings.share < 1:
            raise UserError(f"--keep must be above 0 and below 1, the share of the trials to keep, not {self.keep}")
        if self.resume and self.out is None:
            raise UserError("--resume continues the search in --out: give that folder too")
        if self.config.max_steps is not None:
            raise UserError(
                f"max_steps = {self.config.max_steps} of the config: a search decides when its trials stop; leave it "
                "out of the file"
            )
        if "\0" in str(self.out):
            raise UserError(
                f"--out {str(self.out)!r} contains a NUL character: no file can have this name; give another folder"
            )
        settings._check_ranges()
        settings._check_rounds()
        return settings

    @property
    def share(self) -> float:
        """The share of trials kept. The settings must be checked."""
        assert self.keep is not None
        return self.keep

    @property
    def epochs(self) -> list[int]:
        """The epochs of a trial up to the end of each round. The settings must be checked."""
        last = self.config.epoch_count
        if self.method == "random":
            return [last] * self.rounds
        return [rounded(last * self.share ** (self.rounds - number)) for number in range(1, self.rounds + 1)]

    def config_with(self, values: Mapping[str, Any]) -> TrainConfig:
        """Return the config of a trial."""
        return replace(self.config, **values)

    def extremes(self) -> Iterator[TrainConfig]:
        """Yield the configs at all corners of the ranges; raise `UserError` if one is invalid."""
        names = [one.name for one in self.ranges]
        for corner in itertools.product(*((one.low, one.high) for one in self.ranges)):
            try:
                yield self.config_with(dict(zip(names, corner, strict=True))).checked()
            except UserError as error:
                raise UserError(f"the ranges contain invalid values: {error}") from None

    def _check_ranges(self) -> None:
        names = [one.name for one in self.ranges]
        if not names:
            raise UserError("there is nothing to search: give --range, such as --range lr=1e-6:1e-2:log")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"--range {flag_name(name)} is given {names.count(name)} times: give it once")
            if reason := without_effect(self.config, name, before="-- "):
                raise UserError(f"--range {flag_name(name)} {reason}, or leave it out")
        for _ in self.extremes():
            pass

    def _check_rounds(self) -> None:
        if self.method == "random" and self.rounds > 1 and self.trials < 2:
            raise UserError(f"--trials 1 leaves no range to narrow for --rounds {self.rounds}: give 2 trials or more")
        epochs = self.epochs
        if self.method == "halving" and not (epochs[0] and len(set(epochs)) == len(epochs)):
            raise UserError(
                f"--epochs {epochs[-1]} cannot be divided into --rounds {self.rounds} with --keep {self.share:g}, each "
                f"longer than the one before ({', '.join(map(str, epochs))}): give more epochs or fewer rounds"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings that determine the results, as JSON values."""
        return {
            "method": self.method,
            "ranges": [str(one) for one in self.ranges],
            "rounds": self.rounds,
            "trials": self.trials,
            "keep": self.share,
            "seed": self.seed,
            "config": {name: value for name, value in self.config.to_json().items() if name not in WITHOUT_EFFECT},
        }


def rounded(number: float) -> int:
    """Return the nearest integer; a half is rounded up."""
    return math.floor(number + 0.5)
