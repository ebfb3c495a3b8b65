"""Score runs, print the scores, and write the requested files: the work of `distdl.evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distdl.config import check_dataset_name, flag_of
from distdl.engine.console import Console
from distdl.engine.pictures import confusion_matrix
from distdl.engine.storage.files import check_output, indented_json, write_output
from distdl.errors import UserError
from distdl.inference import figures
from distdl.inference.class_scores import class_scores, number_scores
from distdl.inference.fit import with_other_data
from distdl.inference.load import Trained, load, refuse_unlike_members
from distdl.inference.options import EvaluateOptions, Part, check_names
from distdl.inference.score import Evaluation, evaluate, in_half_precision
from distdl.inference.score_table import (
    class_table,
    classes_json,
    confusion_table,
    number_table,
    numbers_json,
    score_table,
    scores_json,
    summary_line,
)
from distdl.job import streams
from distdl.parallel import Communicator, guard, on_rank_0, together, world

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The endings of files that matplotlib writes.
PICTURES = (".png", ".svg", ".pdf")


def evaluate_runs(options: EvaluateOptions) -> None:
    """Score the networks of runs on all ranks. Rank 0 prints the scores. Collective. Raises `UserError`."""
    check_names(options)
    if options.on is not None:
        check_dataset_name(options.on)
    if options.confusion_figure or options.misclassified:
        figures.need_matplotlib()
    communicator = world()
    with guard(communicator):
        on_rank_0(communicator, lambda: _check_outputs(options))
        trained, part = _load(options, communicator)
        together(communicator, lambda: check_task(trained[0], options))
        found = evaluate(trained, part, communicator)
        half = evaluate(in_half_precision(trained), part, communicator) if options.half else None
        on_rank_0(communicator, lambda: _show(options, trained, found, half))


def _load(options: EvaluateOptions, communicator: Communicator) -> tuple[list[Trained], Part]:
    """Return the networks with the data to score them on, and its part. Collective."""
    if options.skip_damaged and options.on is None:
        raise UserError("--skip-damaged has no effect without --on: give --on folder:PATH, or leave it out")
    if options.csv_columns is not None and options.on is None:
        raise UserError("--csv-columns has no effect without --on: give --on csv:FILE, or leave it out")
    of_training = options.data_dir if options.on is None else None
    trained = load(
        options.runs,
        communicator,
        best=options.best,
        data_dir=of_training,
        data_gigabytes=options.data_gigabytes,
        dataset=options.dataset,
        models=options.model,
        with_data=options.on is None,
    )
    together(communicator, lambda: refuse_unlike_members(trained))
    if options.on is None:
        return trained, options.part or "test"
    return with_other_data(trained, options, communicator), "test"


def _show(options: EvaluateOptions, trained: Sequence[Trained], found: Evaluation, half: Evaluation | None) -> None:
    """Print the scores, and write the requested files."""

    def write_figure(path: Path, figure: Figure, flag: str) -> None:
        write_output(path, figures.content_of(figure, path.suffix[1:].lower()), flag)

    console, data, signature = Console(live=False), trained[0].data, trained[0].signature
    part = options.part if options.on else options.part or "test"
    for warning in (warning for one in trained for warning in one.warnings):
        console.warning(warning)
    for line in score_table(trained, part, found, half, options.on):
        console.line(line)
    numbers = scores_json(trained, part, found, half, options.on)
    if signature.task == "regression":
        of_numbers = number_scores(found.labels, found.predictions)
        numbers |= numbers_json(of_numbers, signature) | {"confusion": None}
        lines = number_table(of_numbers, signature)
    else:
        matrix = confusion_matrix(found.labels, found.predictions, signature.outputs)
        of_classes = class_scores(matrix)
        numbers |= classes_json(of_classes, signature) | {"confusion": matrix.tolist()}
        lines = class_table(of_classes, signature)
        lines += confusion_table(matrix.tolist(), signature.names) if options.confusion else []
        if options.confusion_figure:
            write_figure(options.confusion_figure, figures.confusion(matrix, signature.names), "--confusion-figure")
    for line in lines:
        console.line(line)
    if options.misclassified:
        images = data.images[found.rows]
        figure = figures.misclassified(images, found.labels, found.predictions, signature.names)
        write_figure(options.misclassified, figure, "--misclassified")
    if options.json:
        write_output(options.json, indented_json(numbers), "--json")
    console.line(summary_line(part, found, half, options.on))
    if console.lost is not None:  # the scores are the result of this command
        raise UserError(f"the scores cannot be printed: {console.lost}; make room, or take them from --json FILE")


def _check_outputs(options: EvaluateOptions) -> None:
    """Raise `UserError` if the scores could not be printed or a file not be written, before any work."""
    if streams.was_closed(sys.stdout) and not (options.json or options.confusion_figure or options.misclassified):
        raise UserError("the scores cannot be printed: standard output is closed; open it, or give --json FILE")
    for field in ("confusion_figure", "misclassified", "json"):
        path, flag = getattr(options, field), flag_of(field)
        if path is not None and field != "json" and path.suffix.lower() not in PICTURES:
            raise UserError(f"{flag} {path}: expected a name that ends in {', '.join(PICTURES)}")
        if path is not None:
            check_output(path, flag)


def check_task(first: Trained, options: EvaluateOptions) -> None:
    """Raise `UserError` for a flag that does not fit the task of the networks."""
    task, name = first.signature.task, options.on or first.config.dataset
    for field, fits in (
        ("confusion", task != "regression"),
        ("confusion_figure", task != "regression"),
        ("misclassified", task == "classification"),
    ):
        if getattr(options, field) and not fits:
            needs = "one label per image" if field == "misclassified" else "classes"
            found = f"{name} has {'numbers' if task == 'regression' else 'a label for each pixel'}"
            raise UserError(f"{flag_of(field)} is for {needs}: {found}; leave the flag out")
