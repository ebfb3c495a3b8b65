"""Scores as text for the user, and as JSON for programs."""

import math
from collections.abc import Sequence
from typing import Any

from distdl.data.signature import Signature
from distdl.engine.table import shortened, table
from distdl.errors import one_line
from distdl.inference.class_scores import ClassScore, NumberScore, balanced_accuracy, macro_f1, mean_r2
from distdl.inference.load import Trained
from distdl.inference.score import Evaluation, Score

COLUMNS = 80
CORNER = "actual/predicted"
#: The head of a column has at least this many characters of a name.
LEAST_NAME = 4
#: The most characters of a name of a class in a table.
LONGEST = 32


def score_table(
    trained: Sequence[Trained], part: str | None, found: Evaluation, half: Evaluation | None, on: str | None = None
) -> list[str]:
    """Return the table of scores: a line for each network, and one for the ensemble.

    `half` are those in float16. `on` names other data than that of the training; all of it is scored if `part` is None.
    """
    columns = ["accuracy", "loss", "float16", "loss"] if half else ["accuracy", "loss"]
    rows = [["", "", *columns]]
    for i, one in enumerate(trained):
        name, kind = str(one.given), f"{one.config.model}, step {one.step}"
        rows.append([name, kind, *_cells(found.scores[i], half.scores[i] if half else None)])
    if len(trained) > 1:
        cells = _cells(found.ensemble, half.ensemble if half else None)
        rows.append([f"ensemble of {len(trained)}", "", *cells])
    scored = ", ".join([on or trained[0].config.dataset, *([f"{part} part"] if part else [])])
    return [f"{scored}: {len(found.rows)} samples", *table(rows, "<<")]


def _cells(score: Score, half: Score | None) -> list[str]:
    return [f"{_percent(score.accuracy):>8}", f"{score.loss:8.4f}", *(_cells(half, None) if half else [])]


def confusion_table(confusion: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> list[str]:
    """Return a confusion matrix as lines of text: a row for each actual class, a column for each predicted class.

    Columns have the names of the classes if all fit into 80 columns, shortened if necessary; otherwise numbers, which
    the rows explain.

    >>> confusion_table([[5, 1], [0, 12]])
    ['actual/predicted   0   1', '               0   5   1', '               1   0  12']
    >>> confusion_table([[5, 1], [0, 12]], ["cat", "dog"])
    ['actual/predicted  cat  dog', '             cat    5    1', '             dog    0   12']
    """
    numbers = [str(k) for k in range(len(confusion))]
    least = max(len(str(number)) for row in [*confusion, numbers] for number in row)
    heads, first = numbers, numbers
    if names is not None:
        shown = [one_line(name) for name in names]
        room = (COLUMNS - len(CORNER)) // len(shown) - 2
        heads = [shortened(name, max(room, 0)) for name in shown]
        first = [shortened(name, len(CORNER)) for name in shown]
        if room < max(least, LEAST_NAME) or len({*heads}) < len(heads) or len({*first}) < len(first):
            heads, first = numbers, [f"{k} {shortened(name, LONGEST)}" for k, name in enumerate(shown)]
    width = max(least, *map(len, heads))
    rows = [[CORNER, *heads], *([k, *map(str, row)] for k, row in zip(first, confusion, strict=True))]
    return table([[corner, *(cell.rjust(width) for cell in cells)] for corner, *cells in rows])


def class_table(scores: Sequence[ClassScore], signature: Signature) -> list[str]:
    """Return the scores of each class as lines of text, and their means."""
    what = "pixels" if signature.task == "segmentation" else "samples"
    rows = [["class", what, "precision", "recall", "F1"]]
    for output, one in enumerate(scores):
        name = shortened(one_line(signature.name_of(output)), LONGEST)
        rows.append([name, str(one.samples), *map(_percent, (one.precision, one.recall, one.f1))])
    balanced, f1 = balanced_accuracy(scores), macro_f1(scores)
    return [*table(rows, "<"), f"balanced accuracy: {_percent(balanced)}, macro F1: {_percent(f1)}"]


def number_table(scores: Sequence[NumberScore], signature: Signature) -> list[str]:
    """Return the scores of each number of a regression as lines of text."""
    rows = [["number", "mean absolute error", "R²"]]
    for output, one in enumerate(scores):
        name = shortened(one_line(signature.name_of(output)), LONGEST)
        rows.append([name, f"{one.mean_absolute_error:.6g}", "–" if one.r2 is None else f"{one.r2:.4f}"])
    return table(rows, "<")


def summary_line(part: str | None, found: Evaluation, half: Evaluation | None, on: str | None = None) -> str:
    """Return the last line."""
    members = len(found.scores)
    of_several = f"ensemble of {members}, " if members > 1 else ""
    in_half = f"; in float16: {score_text(half.ensemble)}" if half else ""
    name = "loss" if found.ensemble.accuracy is None else "accuracy"
    what = f"{part} {name}" if on is None else f"{name} on {on}" + (f", {part} part" if part else "")
    return f"{what}: {of_several}{score_text(found.ensemble)}{in_half}"


def score_text(score: Score) -> str:
    """Return the accuracy with its counts; for regression the loss.

    >>> score_text(Score(0.5, 3, 4)), score_text(Score(0.5, 0, 0))
    ('75.00% (3 of 4)', '0.500000')
    """
    return f"{_percent(score.accuracy)} ({score.correct} of {score.targets})" if score.targets else f"{score.loss:.6f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def scores_json(
    trained: Sequence[Trained], part: str | None, found: Evaluation, half: Evaluation | None, on: str | None = None
) -> dict[str, Any]:
    """Return all numbers, the same for any number of ranks; a loss that is not finite is None."""

    def numbers(score: Score, in_half: Score | None) -> dict[str, Any]:
        loss = score.loss if math.isfinite(score.loss) else None
        values = {"accuracy": score.accuracy, "correct": score.correct, "loss": loss}
        return values if in_half is None else {**values, "half": numbers(in_half, None)}

    signature = trained[0].signature
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
        "dataset": on or trained[0].config.dataset,
        "part": part or "all",
        "samples": len(found.rows),
        "task": signature.task,
        "classes": signature.outputs,
        "class_names": None if signature.names is None else list(signature.names),
        "members": members,
        "ensemble": numbers(found.ensemble, half.ensemble if half else None),
    }


def classes_json(scores: Sequence[ClassScore], signature: Signature) -> dict[str, Any]:
    """Return the scores of each class, and their means."""
    each = [{"class": signature.name_of(output), **vars(one)} for output, one in enumerate(scores)]
    return {"balanced_accuracy": balanced_accuracy(scores), "macro_f1": macro_f1(scores), "per_class": each}


def numbers_json(scores: Sequence[NumberScore], signature: Signature) -> dict[str, Any]:
    """Return the scores of each number of a regression, and their means; None for one that is not finite."""

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    each = [
        {"number": signature.name_of(output), **{name: finite(value) for name, value in vars(one).items()}}
        for output, one in enumerate(scores)
    ]
    mean = finite(sum(one.mean_absolute_error for one in scores) / len(scores))
    return {"mean_absolute_error": mean, "r2": finite(mean_r2(scores)), "per_number": each}
