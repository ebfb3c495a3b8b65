"""Score trained networks: ``python -m distdl.evaluate RUN``, or several for an ensemble; ``--help`` lists all flags.

A run folder stands for its newest intact checkpoint. Nothing is written into it. Under mpirun the ranks share the
samples; the numbers are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distdl import cli
from distdl.cli import Command, Flag
from distdl.config import check_dataset_name, check_model_name
from distdl.errors import UserError, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distdl.inference.load import Trained
    from distdl.inference.score import Evaluation

#: The endings of files that matplotlib writes.
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
    from distdl.inference.figures import need_matplotlib  # noqa: PLC0415  NumPy reads the number of threads on import
    from distdl.inference.load import load  # noqa: PLC0415
    from distdl.inference.score import PARTS, evaluate, in_half_precision  # noqa: PLC0415
    from distdl.parallel import guard, on_rank_0, together, world  # noqa: PLC0415

    check_names(given.model, given.dataset)
    if given.part not in PARTS:
        raise unknown_name("part", given.part, PARTS)
    if given.confusion_figure or given.misclassified:
        need_matplotlib()
    communicator = world()
    with guard(communicator):
        on_rank_0(communicator, lambda: _check_outputs(given))
        trained = load(
            given.runs,
            communicator,
            best=given.best,
            data_dir=given.data_dir,
            dataset=given.dataset,
            models=given.model,
        )
        together(communicator, lambda: _check_task(trained[0], given))
        found = evaluate(trained, given.part, communicator)
        half = evaluate(in_half_precision(trained), given.part, communicator) if given.half else None
        on_rank_0(communicator, lambda: _show(given, trained, found, half))
    return 0


def check_names(models: Sequence[str], dataset: str | None) -> None:
    """Raise `UserError` unless `--model` and `--dataset` can name a model and a dataset."""
    for model in models:
        check_model_name(model)
    if dataset is not None:
        check_dataset_name(dataset)


def _show(given: EvaluateOptions, trained: Sequence[Trained], found: Evaluation, half: Evaluation | None) -> None:
    """Print the scores, and write the requested files."""
    from distdl.engine.console import Console  # noqa: PLC0415
    from distdl.engine.storage.files import indented_json, write_output  # noqa: PLC0415
    from distdl.inference import figures  # noqa: PLC0415
    from distdl.inference.score_table import confusion_table, score_table, scores_json, summary_line  # noqa: PLC0415

    def write_figure(path: Path, figure: Figure, flag: str) -> None:
        write_output(path, figures.content_of(figure, path.suffix[1:].lower()), flag)

    console, data = Console(live=False), trained[0].data
    for complaint in (complaint for one in trained for complaint in one.complaints):
        console.warning(f"{complaint}; the one before it is used")
    for line in score_table(trained, given.part, found, half):
        console.line(line)
    matrix = None
    if data.targets_per_sample:
        matrix = figures.confusion_matrix(found.labels, found.predictions, data.classes)
        for line in confusion_table(matrix.tolist()) if given.confusion else ():
            console.line(line)
        if given.confusion_figure:
            write_figure(given.confusion_figure, figures.confusion(matrix), "--confusion-figure")
    if given.misclassified:
        figure = figures.misclassified(data.images[found.rows], found.labels, found.predictions)
        write_figure(given.misclassified, figure, "--misclassified")
    if given.json:
        confusion = None if matrix is None else matrix.tolist()
        numbers = scores_json(trained, given.part, found, half) | {"confusion": confusion}
        write_output(given.json, indented_json(numbers), "--json")
    console.line(summary_line(given.part, found, half))
    if console.lost is not None:  # the scores are the result of this command
        raise UserError(f"the scores cannot be printed: {console.lost}; make room, or take them from --json FILE")


def _check_outputs(given: EvaluateOptions) -> None:
    """Raise `UserError` for a file that could not be written, before any work."""
    from distdl.engine.storage.files import check_output  # noqa: PLC0415

    for flag in ("confusion_figure", "misclassified", "json"):
        path, name = getattr(given, flag), f"--{flag.replace('_', '-')}"
        if path is None:
            continue
        if flag != "json" and path.suffix.lower() not in PICTURES:
            raise UserError(f"{name} {path}: expected a name that ends in {', '.join(PICTURES)}")
        check_output(path, name)


def _check_task(first: Trained, given: EvaluateOptions) -> None:
    """Raise `UserError` for a flag that does not fit the task of the networks."""
    targets = first.data.targets_per_sample
    for flag, fits in (("confusion", targets > 0), ("confusion_figure", targets > 0), ("misclassified", targets == 1)):
        if getattr(given, flag) and not fits:
            found = "a label for each pixel" if targets else "numbers"
            raise UserError(
                f"--{flag.replace('_', '-')} is for {'one label per image' if flag == 'misclassified' else 'classes'}: "
                f"{first.config.dataset} has {found}; leave the flag out"
            )


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
