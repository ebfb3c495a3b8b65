"""What a person reads of a search: lines, the table of the best trials, the command that trains so, the picture."""

from __future__ import annotations

import importlib.util
import io
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import distdl
from distdl.config import NOT_IN_CONFIG_FILE, TrainConfig
from distdl.search.procedure import Record, Trial, standing
from distdl.search.settings import Range, Settings

MOST_ROWS = 10
#: A panel of the picture, and what is beside the panels, in inches.
PANEL, LEFT, RIGHT = (4.0, 3.4), 0.7, 1.3


def flag(name: str) -> str:
    """Return the name as a flag has it."""
    return name.replace("_", "-")


def banner(settings: Settings, ranks: int, groups: int) -> list[str]:
    """Return the lines that open a search."""
    config, keep = settings.config, f"the best {settings.share:.0%}"
    rounds = f"{settings.method}: {settings.rounds} round{_s(settings.rounds)} of {settings.trials} trials"
    if settings.method == "halving":
        rounds += f" at first, of which {keep} go on"
    elif settings.rounds > 1:
        rounds += f", ranges narrowed to {keep}"
    return [
        f"distdl {distdl.__version__} search · {config.dataset} · {config.model} · {config.optimizer} · "
        f"training seed {config.seed} · search seed {settings.seed}",
        f"{rounds}, judged on the validation data",
        f"{ranks} rank{_s(ranks)}: {groups} trial{_s(groups)} at once",
    ]


def round_lines(settings: Settings, number: int, trials: Sequence[Trial], ranges: Sequence[Range]) -> list[str]:
    """Return the lines that open a round."""
    ends = ", ".join(str(one) for one in ranges)
    what = f"from {ends}" if settings.method == "random" or number == 1 else "that go on"
    epochs = f"{trials[0].epochs} epoch{_s(trials[0].epochs)}"
    return ["", f"round {number}/{settings.rounds}: {len(trials)} trial{_s(len(trials))} of {epochs} {what}"]


def trial_line(record: Record, settings: Settings) -> str:
    """Return the line of a trial that has ended."""
    outcome = "diverged" if record.diverged else f"validation {_score(record)}"
    return f"  trial {record.trial:{len(str(settings.trials))}d}  {outcome:17}  {_values(record)}"


def _score(record: Record) -> str:
    """Return the accuracy, or the loss where there is none."""
    if record.diverged:
        return "diverged"
    accuracy, loss = record.validation_accuracy, record.validation_loss
    return f"loss {loss:.4g}" if accuracy is None else f"{accuracy:6.2%}"


def _values(record: Record) -> str:
    return "  ".join(f"{flag(name)} {value:g}" for name, value in record.settings.items())


def table(records: Sequence[Record], settings: Settings) -> list[str]:
    """Return the best trials, the best first."""
    ordered = standing(records)
    rows = [["round", "trial", "epochs", "validation", "test", *(flag(one.name) for one in settings.ranges)]]
    for record in ordered[:MOST_ROWS]:
        test = "-" if record.test_accuracy is None else f"{record.test_accuracy:.2%}"
        values = [f"{record.settings[one.name]:g}" for one in settings.ranges]
        rows.append([f"{record.round}", f"{record.trial}", f"{record.epochs}", _score(record), test, *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    more = f"; the others are in {'results.jsonl'}" if len(ordered) > MOST_ROWS else ""
    return ["", f"the best of {len(ordered)} trials{more}", *lines, ""]


def summary(records: Sequence[Record], ranges: Sequence[Range]) -> dict[str, Any]:
    """Return the content of ``summary.json``."""
    ordered = standing(records)
    return {
        "trials": len(ordered),
        "diverged": sum(record.diverged for record in ordered),
        "best": None if ordered[0].diverged else ordered[0].to_json(),
        "last_ranges": [asdict(one) for one in ranges],
    }


def command(config: TrainConfig) -> str:
    """Return the command line that trains as a config says.

    >>> command(TrainConfig(model="mlp", lr=0.01, balance=True))
    'python -m distdl.train --model mlp --lr 0.01 --balance'
    """
    words = ["python", "-m", "distdl.train"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name not in NOT_IN_CONFIG_FILE:
            words += [f"--{flag(field.name)}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def picture(records: Sequence[Record], settings: Settings) -> bytes | None:
    """Return the picture of a search as SVG, a panel for each setting; None where matplotlib is not installed.

    A trial is a dot at its value and accuracy (or loss), darker the later its round; a cross on
    the edge has diverged.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib as mpl  # noqa: PLC0415  half a second, and not always there
    from matplotlib.figure import Figure  # noqa: PLC0415

    ordered, colors = standing(records), mpl.colormaps["viridis_r"]
    has_accuracy = any(record.validation_accuracy is not None for record in ordered)
    width = PANEL[0] * len(settings.ranges) + LEFT + RIGHT
    figure = Figure(figsize=(width, PANEL[1]))
    figure.subplots_adjust(left=LEFT / width, right=1 - RIGHT / width, bottom=0.16, top=0.9, wspace=0.12)
    panels = figure.subplots(1, len(settings.ranges), sharey=True, squeeze=False)[0]
    for one, axes in zip(settings.ranges, panels, strict=True):
        for number in range(1, settings.rounds + 1):
            those = [record for record in ordered if record.round == number and not record.diverged]
            axes.plot(
                [record.settings[one.name] for record in those],
                [
                    100 * (record.validation_accuracy or 0) if has_accuracy else record.validation_loss
                    for record in those
                ],
                "o",
                color=colors(number / settings.rounds),
                label=f"round {number}",
                clip_on=False,
            )
        bad = [record.settings[one.name] for record in ordered if record.diverged]
        worst = axes.get_xaxis_transform()  # from 0, the bottom, to 1
        heights = [0 if has_accuracy else 1] * len(bad)
        axes.plot(bad, heights, "x", color="#d55e00", label="diverged", clip_on=False, transform=worst)
        axes.set(xlabel=flag(one.name), xscale=one.scale, xlim=(one.low, one.high))
        axes.grid(visible=True, alpha=0.3)
    if has_accuracy:
        panels[0].set(ylabel="validation accuracy, %", ylim=(0, 100))
    else:
        panels[0].set_ylabel("validation loss")
    figure.legend(handles=panels[0].get_lines()[-MOST_ROWS:], loc="upper right")
    figure.suptitle(f"{settings.config.model} on {settings.config.dataset}: {len(ordered)} trials", fontsize="medium")
    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "distdl"}):  # the same bytes each time
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _s(count: int) -> str:
    return "" if count == 1 else "s"
