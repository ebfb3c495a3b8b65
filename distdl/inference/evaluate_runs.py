"""Score runs, print the scores, and write the requested files: the work of `distdl.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distdl.config import flag_of
from distdl.engine.console import Console
from distdl.engine.storage.files import check_output, indented_json, write_output
from distdl.errors import UserError
from distdl.inference import figures
from distdl.inference.load import Trained, load
from distdl.inference.options import EvaluateOptions, check_names
from distdl.inference.score import Evaluation, evaluate, in_half_precision
from distdl.inference.score_table import confusion_table, score_table, scores_json, summary_line
from distdl.parallel import guard, on_rank_0, together, world

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The endings of files that matplotlib writes.
PICTURES = (".png", ".svg", ".pdf")


def evaluate_runs(options: EvaluateOptions) -> None:
    """Score the networks of runs on all ranks. Rank 0 prints the scores. Collective. Raises `UserError`."""
    check_names(options)
    if options.confusion_figure or options.misclassified:
        figures.need_matplotlib()
    communicator = world()
    with guard(communicator):
        on_rank_0(communicator, lambda: _check_outputs(options))
        best, data_dir, dataset, models = options.best, options.data_dir, options.dataset, options.model
        trained = load(options.runs, communicator, best=best, data_dir=data_dir, dataset=dataset, models=models)
        together(communicator, lambda: check_task(trained[0], options))
        found = evaluate(trained, options.part, communicator)
        half = evaluate(in_half_precision(trained), options.part, communicator) if options.half else None
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
    for field in ("confusion_figure", "misclassified", "json"):
        path, flag = getattr(options, field), flag_of(field)
        if path is not None and field != "json" and path.suffix.lower() not in PICTURES:
            raise UserError(f"{flag} {path}: expected a name that ends in {', '.join(PICTURES)}")
        if path is not None:
            check_output(path, flag)


def check_task(first: Trained, options: EvaluateOptions) -> None:
    """Raise `UserError` for a flag that does not fit the task of the networks."""
    targets = first.data.targets_per_sample
    for field, fits in (("confusion", targets > 0), ("confusion_figure", targets > 0), ("misclassified", targets == 1)):
        if getattr(options, field) and not fits:
            needs = "one label per image" if field == "misclassified" else "classes"
            found = f"{first.config.dataset} has {'a label for each pixel' if targets else 'numbers'}"
            raise UserError(f"{flag_of(field)} is for {needs}: {found}; leave the flag out")
