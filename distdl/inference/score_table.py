"""Scores as text for the user, and as JSON for programs."""

import math
from collections.abc import Sequence
from typing import Any

from distdl.engine.table import table
from distdl.inference.load import Trained
from distdl.inference.score import Evaluation, Score


def score_table(trained: Sequence[Trained], part: str, found: Evaluation, half: Evaluation | None) -> list[str]:
    """Return the table of scores: a line for each network, and one for the ensemble. `half`: those in float16."""
    columns = ["accuracy", "loss", "float16", "loss"] if half else ["accuracy", "loss"]
    rows = [["", "", *columns]]
    for i, one in enumerate(trained):
        name, kind = str(one.given), f"{one.config.model}, step {one.step}"
        rows.append([name, kind, *_cells(found.scores[i], half.scores[i] if half else None)])
    if len(trained) > 1:
        cells = _cells(found.ensemble, half.ensemble if half else None)
        rows.append([f"ensemble of {len(trained)}", "", *cells])
    return [f"{trained[0].config.dataset}, {part} part: {len(found.rows)} samples", *table(rows, "<<")]


def _cells(score: Score, half: Score | None) -> list[str]:
    return [f"{_percent(score):>8}", f"{score.loss:8.4f}", *(_cells(half, None) if half else [])]


def confusion_table(confusion: Sequence[Sequence[int]]) -> list[str]:
    """Return a confusion matrix as lines of text: a row for each actual class, a column for each predicted class.

    >>> confusion_table([[5, 1], [0, 12]])
    ['actual/predicted   0   1', '               0   5   1', '               1   0  12']
    """
    classes = [str(k) for k in range(len(confusion))]
    width = max(len(str(number)) for row in [*confusion, classes] for number in row)
    rows = [["actual/predicted", *classes], *([k, *map(str, row)] for k, row in zip(classes, confusion, strict=True))]
    return table([[first, *(cell.rjust(width) for cell in cells)] for first, *cells in rows])


def summary_line(part: str, found: Evaluation, half: Evaluation | None) -> str:
    """Return the last line."""
    members = len(found.scores)
    of_several = f"ensemble of {members}, " if members > 1 else ""
    in_half = f"; in float16: {score_text(half.ensemble)}" if half else ""
    name = "loss" if found.ensemble.accuracy is None else "accuracy"
    return f"{part} {name}: {of_several}{score_text(found.ensemble)}{in_half}"


def score_text(score: Score) -> str:
    """Return the accuracy with its counts; for regression the loss.

    >>> score_text(Score(0.5, 3, 4)), score_text(Score(0.5, 0, 0))
    ('75.00% (3 of 4)', '0.500000')
    """
    return f"{_percent(score)} ({score.correct} of {score.targets})" if score.targets else f"{score.loss:.6f}"


def _percent(score: Score) -> str:
    return "–" if score.accuracy is None else f"{score.accuracy:.2%}"


def scores_json(trained: Sequence[Trained], part: str, found: Evaluation, half: Evaluation | None) -> dict[str, Any]:
    """Return all numbers, the same for any number of ranks; a loss that is not finite is None."""

    def numbers(score: Score, in_half: Score | None) -> dict[str, Any]:
        loss = score.loss if math.isfinite(score.loss) else None
        values = {"accuracy": score.accuracy, "correct": score.correct, "loss": loss}
        return values if in_half is None else {**values, "half": numbers(in_half, None)}

    members = [
        {
            "run": str(one.given),
            "checkpoint": str(one.path),
            "step": one.step,
            "model": one.config.model,
            "seed": one.config.seed,
            "weights_sha256": one.weights_sha256,
            **numbers(found.scores[i], half.scores[i] if half else None),
        }
        for i, one in enumerate(trained)
    ]
    return {
        "dataset": trained[0].config.dataset,
        "part": part,
        "samples": len(found.rows),
        "classes": trained[0].data.classes,
        "members": members,
        "ensemble": numbers(found.ensemble, half.ensemble if half else None),
    }
