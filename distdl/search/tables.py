"""The printed lines of a search: banner, rounds, trials, the table of the best trials, and the command that trains."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import distdl
from distdl.config import NOT_IN_CONFIG_FILE, TrainConfig
from distdl.engine.table import table
from distdl.search.procedure import Trial, TrialResult, leaderboard
from distdl.search.settings import Range, SearchSettings, flag_name

MOST_ROWS = 10


def banner(settings: SearchSettings, ranks: int, groups: int) -> list[str]:
    """Return the first lines of a search."""
    config, kept = settings.config, f"the best {settings.share:.0%}"
    rounds = f"{settings.method}: {settings.rounds} round{_s(settings.rounds)} of {settings.trials} trials"
    if settings.method == "halving":
        rounds += f" at first, of which {kept} continue"
    elif settings.rounds > 1:
        rounds += f", ranges narrowed to {kept}"
    return [
        f"distdl {distdl.__version__} search · {config.dataset} · {config.model} · {config.optimizer} · "
        f"training seed {config.seed} · search seed {settings.seed}",
        f"{rounds}, judged on the validation data",
        f"{ranks} rank{_s(ranks)}: {groups} trial{_s(groups)} at once",
    ]


def round_lines(settings: SearchSettings, number: int, trials: Sequence[Trial], ranges: Sequence[Range]) -> list[str]:
    """Return the first lines of a round."""
    drawn = settings.method == "random" or number == 1
    source = f"from {', '.join(map(str, ranges))}" if drawn else "that continue"
    epochs = f"{trials[0].epochs} epoch{_s(trials[0].epochs)}"
    return ["", f"round {number}/{settings.rounds}: {len(trials)} trial{_s(len(trials))} of {epochs} {source}"]


def trial_line(result: TrialResult, settings: SearchSettings) -> str:
    """Return the line of a completed trial."""
    outcome = "diverged" if result.diverged else f"validation {_score(result)}"
    values = "  ".join(f"{flag_name(name)} {value:g}" for name, value in result.settings.items())
    return f"  trial {result.trial:{len(str(settings.trials))}d}  {outcome:17}  {values}"


def _score(result: TrialResult) -> str:
    """Return the accuracy, or for regression the loss."""
    if result.diverged:
        return "diverged"
    accuracy, loss = result.validation_accuracy, result.validation_loss
    return f"loss {loss:.4g}" if accuracy is None else f"{accuracy:6.2%}"


def best_trials_table(results: Sequence[TrialResult], settings: SearchSettings) -> list[str]:
    """Return the table of the best trials, the best first."""
    ordered = leaderboard(results)
    rows = [["round", "trial", "epochs", "validation", "test", *(flag_name(one.name) for one in settings.ranges)]]
    for one in ordered[:MOST_ROWS]:
        test = "-" if one.test_accuracy is None else f"{one.test_accuracy:.2%}"
        values = [f"{one.settings[searched.name]:g}" for searched in settings.ranges]
        rows.append([f"{one.round}", f"{one.trial}", f"{one.epochs}", _score(one), test, *values])
    more = "; results.jsonl has the others" if len(ordered) > MOST_ROWS else ""
    return ["", f"the best of {len(ordered)} trials{more}", *table(rows, indent="  "), ""]


def summary(results: Sequence[TrialResult], ranges: Sequence[Range]) -> dict[str, Any]:
    """Return the content of ``summary.json``."""
    ordered = leaderboard(results)
    return {
        "trials": len(ordered),
        "diverged": sum(one.diverged for one in ordered),
        "best": None if ordered[0].diverged else asdict(ordered[0]),
        "last_ranges": [asdict(one) for one in ranges],
    }


def training_command(config: TrainConfig) -> str:
    """Return the command line that trains with a config.

    >>> training_command(TrainConfig(model="mlp", lr=0.01, balance=True))
    'python -m distdl.train --model mlp --lr 0.01 --balance'
    """
    words = ["python", "-m", "distdl.train"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in NOT_IN_CONFIG_FILE:
            words += [f"--{flag_name(field.name)}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def _s(count: int) -> str:
    return "" if count == 1 else "s"
