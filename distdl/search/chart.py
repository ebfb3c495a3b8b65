"""Draw ``search.svg``: the validation score of each trial over its hyperparameters, one panel per hyperparameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distdl.search.procedure import TrialResult, leaderboard
from distdl.search.settings import SearchSettings, flag_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The size of a panel, in inches.
PANEL = (4.0, 3.4)
#: Most entries in the legend: the latest rounds, and the trials that have diverged.
MOST_ENTRIES = 10


def search_figure(results: Sequence[TrialResult], settings: SearchSettings) -> Figure:
    """Return the chart. Later rounds have darker dots; a cross on the edge is a trial that has diverged."""
    import matplotlib as mpl  # noqa: PLC0415  slow to load, and not installed everywhere
    from matplotlib.figure import Figure  # noqa: PLC0415

    ordered, colors = leaderboard(results), mpl.colormaps["viridis_r"]
    has_accuracy = any(one.validation_accuracy is not None for one in ordered)
    figure = Figure(figsize=(PANEL[0] * len(settings.ranges) + 1.6, PANEL[1]), layout="constrained")
    figure.suptitle(f"{settings.config.model} on {settings.config.dataset}: {len(ordered)} trials", parse_math=False)
    panels = figure.subplots(1, len(settings.ranges), sharey=True, squeeze=False)[0]
    for searched, axes in zip(settings.ranges, panels, strict=True):
        for number in range(1, settings.rounds + 1):
            if shown := [one for one in ordered if one.round == number and not one.diverged]:
                values = [one.settings[searched.name] for one in shown]
                scores = [
                    100 * (one.validation_accuracy or 0) if has_accuracy else one.validation_loss for one in shown
                ]
                color = colors(number / settings.rounds)
                axes.plot(values, scores, "o", color=color, label=f"round {number}", clip_on=False)
        if diverged := [one.settings[searched.name] for one in ordered if one.diverged]:
            edge = [0 if has_accuracy else 1] * len(diverged)  # 0 is the bottom, 1 the top
            transform = axes.get_xaxis_transform()
            axes.plot(diverged, edge, "x", color="#d55e00", label="diverged", clip_on=False, transform=transform)
        axes.set(xlabel=flag_name(searched.name), xscale=searched.scale, xlim=(searched.low, searched.high))
        axes.grid(visible=True, alpha=0.3)
    if has_accuracy:
        panels[0].set(ylabel="validation accuracy, %", ylim=(0, 100))
    else:
        panels[0].set_ylabel("validation loss")
    panels[-1].legend(handles=panels[0].get_lines()[-MOST_ENTRIES:], loc="upper left", bbox_to_anchor=(1, 1))
    return figure
