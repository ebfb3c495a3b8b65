"""Score trained networks: ``python -m distdl.evaluate RUN`` or several for an ensemble; ``--help`` lists all flags.

A run folder stands for its newest intact checkpoint. Nothing is written into it. Under mpirun the ranks share the
samples, and the figures are the same.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distdl import cli
from distdl.cli import Command, Flag
from distdl.config import check_dataset_name, check_model_name
from distdl.errors import UserError, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distdl.inference.evaluation import Evaluation, Score, Trained

#: Files that matplotlib writes, by the ends of their names.
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The flags of the command."""

    runs: tuple[Path, ...]
    """Run folder or checkpoint; several form an ensemble."""
    part: str = "test"
    """Part of the dataset: test or validation."""
    best: bool = False
    """Of each run, use the checkpoint with the best validation accuracy."""
    data_dir: Path | None = None
    """Folder of the dataset's files; by default that of the first run."""
    model: tuple[str, ...] = ()
    """Your own model that a run was trained with; its code is run."""
    dataset: str | None = None
    """Your own dataset that the runs were trained on; its code is run. Or npz:FILE.npz or folder:PATH, if it moved."""
    half: bool = False
    """Also score with weights and activations stored as float16."""
    confusion: bool = False
    """Print the confusion matrix."""
    confusion_figure: Path | None = None
    """Draw the confusion matrix; needs matplotlib."""
    misclassified: Path | None = None
    """Draw misclassified images; needs matplotlib."""
    json: Path | None = None
    """Write all numbers to this file."""


COMMAND = Command(
    program="python -m distdl.evaluate",
    summary="Score trained networks, each alone and all together as an ensemble.",
    settings=EvaluateOptions,
    examples=(
        "python -m distdl.evaluate my-run --confusion",
        "python -m distdl.evaluate run-1 run-2 run-3 --json scores.json",
        "mpirun -n 4 python -m distdl.evaluate my-run --part validation --best",
    ),
    groups={
        "runs": ("runs", "best", "model"),
        "data": ("part", "dataset", "data_dir"),
        "results": ("half", "confusion", "confusion_figure", "misclassified", "json"),
    },
    flags={
        "runs": Flag(name="RUN_OR_CHECKPOINT", repeated=True),
        "part": Flag(value="PART"),
        "model": Flag(value="FILE.py:FUNCTION", repeated=True),
        "dataset": Flag(value="FILE.py:FUNCTION"),
        "confusion_figure": Flag(value="FILE.png"),
        "misclassified": Flag(value="FILE.png"),
        "json": Flag(value="FILE"),
    },
)


def parse(arguments: Sequence[str]) -> EvaluateOptions:
    """Return the flags of a command line; raise `UserError` in one line."""
    return COMMAND.parse(arguments)


def main(arguments: Sequence[str]) -> int:
    """Load, score and show; return the exit code."""
    given = parse(arguments)
    cli.set_blas_threads(1)
    from distdl.inference.evaluation import (  # noqa: PLC0415  NumPy reads the number of threads when it is loaded
        PARTS,
        evaluate,
        in_half_precision,
        load,
    )
    from distdl.inference.figures import need_matplotlib  # noqa: PLC0415
    from distdl.parallel import guard, together, world  # noqa: PLC0415

    check_names(given.model, given.dataset)
    if given.part not in PARTS:
        raise unknown_name("part", given.part, PARTS)
    if given.confusion_figure or given.misclassified:
        need_matplotlib()
    communicator = world()
    with guard(communicator):
        speaks = communicator.rank == 0
        together(communicator, lambda: _refuse_outputs(given) if speaks else None)
        trained = load(
            given.runs,
            communicator,
            best=given.best,
            data_dir=given.data_dir,
            dataset=given.dataset,
            models=given.model,
        )
        together(communicator, lambda: _refuse_pictures_of(trained[0], given))
        found = evaluate(trained, given.part, communicator)
        half = evaluate(in_half_precision(trained), given.part, communicator) if given.half else None
        together(communicator, lambda: _show(given, trained, found, half) if speaks else None)
    return 0


def check_names(models: Sequence[str], dataset: str | None) -> None:
    """Raise `UserError` unless `--model` and `--dataset` can name a model and a dataset."""
    for model in models:
        check_model_name(model)
    if dataset is not None:
        check_dataset_name(dataset)


def _show(given: EvaluateOptions, trained: Sequence[Trained], found: Evaluation, half: Evaluation | None) -> None:
    """Print the scores, and write the files that were asked for."""
    from distdl.engine.console import Console  # noqa: PLC0415
    from distdl.engine.storage.files import indented_json, write_output  # noqa: PLC0415
    from distdl.inference import figures  # noqa: PLC0415

    console, data = Console(live=False), trained[0].data
    for complaint in (complaint for one in trained for complaint in one.complaints):
        console.warning(f"{complaint}; the one before it is used")
    for line in report(trained, given.part, found, half):
        console.line(line)
    matrix = (
        figures.confusion_matrix(found.labels, found.predictions, data.classes) if data.targets_per_sample else None
    )
    if given.confusion and matrix is not None:
        for line in table_of(matrix.tolist()):
            console.line(line)
    if given.confusion_figure and matrix is not None:
        drawn = _in_format_of(given.confusion_figure, figures.confusion(matrix))
        write_output(given.confusion_figure, drawn, "--confusion-figure")
    if given.misclassified:
        figure = figures.misclassified(data.images[found.rows], found.labels, found.predictions)
        write_output(given.misclassified, _in_format_of(given.misclassified, figure), "--misclassified")
    if given.json:
        confusion = None if matrix is None else matrix.tolist()
        numbers = as_json(trained, given.part, found, half) | {"confusion": confusion}
        write_output(given.json, indented_json(numbers), "--json")
    console.line(summary_of(given.part, found, half))
    if console.lost is not None:  # what was asked for, not a line of a long run
        raise UserError(f"the scores cannot be printed: {console.lost}; make room, or take them from --json FILE")


def report(trained: Sequence[Trained], part: str, found: Evaluation, half: Evaluation | None) -> list[str]:
    """Return the table of scores: a line for each network, and one for all of them together."""
    names = [str(one.given) for one in trained]
    kinds = [f"{one.config.model}, step {one.step}" for one in trained]
    scores = [list(pair) for pair in zip(found.scores, half.scores if half else found.scores, strict=True)]
    if len(trained) > 1:
        names.append(f"ensemble of {len(trained)}")
        kinds.append("")
        scores.append([found.ensemble, half.ensemble if half else found.ensemble])
    wide, wider = max(map(len, names)), max(map(len, kinds))
    columns = ["accuracy", "loss", "float16", "loss"] if half else ["accuracy", "loss"]
    lines = [f"{trained[0].config.dataset}, {part} part: {len(found.rows)} samples"]
    cells = ([cell for score in pair for cell in (_percent(score), f"{score.loss:.4f}")] for pair in scores)
    rows = [columns, *(row[: len(columns)] for row in cells)]
    width = max(10, 2 + max(len(cell) for row in rows for cell in row))
    for name, kind, row in zip(["", *names], ["", *kinds], rows, strict=True):
        lines.append(f"{name:{wide}}  {kind:{wider}}" + "".join(f"{cell:>{width}}" for cell in row))
    return lines


def table_of(confusion: Sequence[Sequence[int]]) -> list[str]:
    """Return the matrix as lines of text, the true classes downwards, what they were taken for to the right.

    >>> table_of([[5, 1], [0, 12]])
    ['true/taken   0   1', '         0   5   1', '         1   0  12']
    """
    width = max(len(str(number)) for row in [*confusion, [len(confusion)]] for number in row) + 2
    head = "true/taken" + "".join(f"{taken:{width}}" for taken in range(len(confusion)))
    return [head, *(f"{true:10}" + "".join(f"{n:{width}}" for n in row) for true, row in enumerate(confusion))]


def summary_of(part: str, found: Evaluation, half: Evaluation | None) -> str:
    """Return the last line."""
    members = len(found.scores)
    of_several = f"ensemble of {members}, " if members > 1 else ""
    in_half = f"; in float16: {_said(half.ensemble)}" if half else ""
    what = "loss" if found.ensemble.accuracy is None else "accuracy"
    return f"{part} {what}: {of_several}{_said(found.ensemble)}{in_half}"


def _percent(score: Score) -> str:
    return "–" if score.accuracy is None else f"{score.accuracy:.2%}"


def _said(score: Score) -> str:
    return f"{_percent(score)} ({score.correct} of {score.targets})" if score.targets else f"{score.loss:.6f}"


def as_json(trained: Sequence[Trained], part: str, found: Evaluation, half: Evaluation | None) -> dict[str, Any]:
    """Return all numbers, the same for any number of ranks; a loss that is not finite is None."""

    def numbers(score: Score, in_half: Score | None) -> dict[str, Any]:
        loss = score.loss if math.isfinite(score.loss) else None
        said = {"accuracy": score.accuracy, "correct": score.correct, "loss": loss}
        return said if in_half is None else {**said, "half": numbers(in_half, None)}

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


def _refuse_outputs(given: EvaluateOptions) -> None:
    """Raise `UserError` for a file that could not be written, before any work."""
    from distdl.engine.storage.files import check_output  # noqa: PLC0415

    for flag in ("confusion_figure", "misclassified", "json"):
        path, name = getattr(given, flag), f"--{flag.replace('_', '-')}"
        if path is None:
            continue
        if flag != "json" and path.suffix.lower() not in PICTURES:
            raise UserError(f"{name} {path}: expected a name that ends in {', '.join(PICTURES)}")
        check_output(path, name)


def _refuse_pictures_of(first: Trained, given: EvaluateOptions) -> None:
    """Raise `UserError` where the answers are none that a flag could show."""
    answers = first.data.targets_per_sample
    for flag, shows in (("confusion", answers > 0), ("confusion_figure", answers > 0), ("misclassified", answers == 1)):
        if getattr(given, flag) and not shows:
            what = "numbers" if not answers else "a label for each pixel"
            raise UserError(
                f"--{flag.replace('_', '-')} is for {'classes' if flag != 'misclassified' else 'one label an image'}: "
                f"{first.config.dataset} has {what}; leave the flag out"
            )


def _in_format_of(path: Path, figure: Figure) -> bytes:
    """Return a picture in the format that the name ends in."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower())
    return content.getvalue()


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
