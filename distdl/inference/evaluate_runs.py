"""Score runs, print the scores, and write the requested files: the work of `distdl.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distdl.engine.console import Console
from distdl.engine.storage.files import check_output, indented_json, write_output
from distdl.errors import UserError, unknown_name
from distdl.inference import figures
from distdl.inference.load import Trained, load
from distdl.inference.options import EvaluateOptions, check_names
from distdl.inference.score import PARTS, Evaluation, evaluate, in_half_precision
from distdl.inference.score_table import confusion_table, score_table, scores_json, summary_line
from distdl.parallel import guard, on_rank_0, together, world

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The endings of files that matplotlib writes.
PICTURES = (".png", ".svg", ".pdf")


def evaluate_runs(options: EvaluateOptions) -> None:
    """Score the networks of runs on all ranks. Rank 0 prints the scores. Collective. Raises `UserError`."""
    check_names(options)
    part = next((part for part in PARTS if part == options.part), None)
    if part is None:
        raise unknown_name("part", options.part, PARTS)
    if options.confusion_figure or options.misclassified:
        figures.need_matplotlib()
    communicator = world()
    with guard(communicator):
        on_rank_0(communicator, lambda: _check_outputs(options))
        trained = load(
            options.runs,
            communicator,
            best=options.best,
            data_dir=options.data_dir,
            dataset=options.dataset,
            models=options.model,
        )
        together(communicator, lambda: check_task(trained[0], options))
        found = evaluate(trained, part, communicator)
        half = evaluate(in_half_precision(trained), part, communicator) if options.half else None
        on_rank_0(communicator, lambda: _show(options, trained, found, half))


def _show(options: EvaluateOptions, trained: Sequence[Trained], found: Evaluation, half: Evaluation | None) -> None:
    """Print the scores, and write the requested files."""

    def write_figure(path: Path, figure: Figure, flag: str) -> None:
        write_output(path, figures.content_of(figure, path.suffix[1:].lower()), flag)

    console, data = Console(live=False), trained[0].data
    for complaint in (complaint for one in trained for complaint in one.complaints):
        console.warning(f"{complaint}; the one before it is used")
    for line in score_table(trained, options.part, found, half):
        console.line(line)
    matrix = None
    if data.targets_per_sample:
        matrix = figures.confusion_matrix(found.labels, found.predictions, data.classes)
        for line in confusion_table(matrix.tolist()) if options.confusion else ():
            console.line(line)
        if options.confusion_figure:
            write_figure(options.confusion_figure, figures.confusion(matrix), "--confusion-figure")
    if options.misclassified:
        figure = figures.misclassified(data.images[found.rows], found.labels, found.predictions)
        write_figure(options.misclassified, figure, "--misclassified")
    if options.json:
        confusion = None if matrix is None else matrix.tolist()
        numbers = scores_json(trained, options.part, found, half) | {"confusion": confusion}
        write_output(options.json, indented_json(numbers), "--json")
    console.line(summary_line(options.part, found, half))
    if console.lost is not None:  # the scores are the result of this command
        raise UserError(f"the scores cannot be printed: {console.lost}; make room, or take them from --json FILE")


def _check_outputs(options: EvaluateOptions) -> None:
    """Raise `UserError` for a file that could not be written, before any work."""
    for flag in ("confusion_figure", "misclassified", "json"):
        path, name = getattr(options, flag), f"--{flag.replace('_', '-')}"
        if path is None:
            continue
        if flag != "json" and path.suffix.lower() not in PICTURES:
            raise UserError(f"{name} {path}: expected a name that ends in {', '.join(PICTURES)}")
        check_output(path, name)


def check_task(first: Trained, options: EvaluateOptions) -> None:
    """Raise `UserError` for a flag that does not fit the task of the networks."""
    targets = first.data.targets_per_sample
    for flag, fits in (("confusion", targets > 0), ("confusion_figure", targets > 0), ("misclassified", targets == 1)):
        if getattr(options, flag) and not fits:
            found = "a label for each pixel" if targets else "numbers"
            raise UserError(
                f"--{flag.replace('_', '-')} is for {'one label per image' if flag == 'misclassified' else 'classes'}: "
                f"{first.config.dataset} has {found}; leave the flag out"
            )
