"""Score trained networks: ``python -m distdl.evaluate RUN``, or several for an ensemble; ``--help`` lists all flags.

A run folder stands for its newest intact checkpoint. Nothing is written into it. Under mpirun the ranks share the
samples; the numbers are the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distdl import cli
from distdl.config import check_dataset_name, check_model_name
from distdl.errors import UserError, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distdl.inference.load import Trained
    from distdl.inference.score import Evaluation

#: The endings of files that matplotlib writes.
PICTURES = (".png", ".svg", ".pdf")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the flags of a command line; raise `UserError` in one line."""
    parser = cli.OneLineParser(
        prog="python -m distdl.evaluate",
        description="Score trained networks on their test or validation part: each alone, and together as an ensemble.",
        advice="--help lists all flags",
    )
    add = parser.add_argument
    add(
        "runs", nargs="+", type=Path, metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint; several: an ensemble"
    )
    add("--part", default="test", help="test or validation (default: %(default)s)")
    add("--best", action="store_true", help="of each run the checkpoint with the best validation accuracy")
    add("--data-dir", type=Path, help="folder with the dataset's files (default: that of the first run)")
    own = "FILE.py:FUNCTION"
    add(
        "--model",
        metavar=own,
        action="append",
        default=[],
        help="your own model that a run was trained with; it is run",
    )
    add(
        "--dataset",
        metavar=own,
        help="your own dataset that the runs were trained on; it is run. Or npz:FILE.npz, folder:PATH: where it is now",
    )
    add("--half", action="store_true", help="also with weights and activations stored as float16")
    add("--confusion", action="store_true", help="print how often which class was taken for which")
    add("--confusion-figure", type=Path, metavar="FILE.png", help="draw that; needs matplotlib")
    add(
        "--misclassified", type=Path, metavar="FILE.png", help="draw the images that were named wrong; needs matplotlib"
    )
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Load, score and show; return the exit code."""
    given = parse(arguments)
    cli.set_blas_threads(1)
    from distdl.inference.figures import need_matplotlib  # noqa: PLC0415  NumPy reads the number of threads on import
    from distdl.inference.load import load  # noqa: PLC0415
    from distdl.inference.score import PARTS, evaluate, in_half_precision  # noqa: PLC0415
    from distdl.parallel import guard, on_rank_0, together, world  # noqa: PLC0415

    check_names(given)
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


def check_names(given: argparse.Namespace) -> None:
    """Raise `UserError` if `--model` or `--dataset` cannot be the name of a model or dataset."""
    for model in given.model:
        check_model_name(model)
    if given.dataset is not None:
        check_dataset_name(given.dataset)


def _show(given: argparse.Namespace, trained: Sequence[Trained], found: Evaluation, half: Evaluation | None) -> None:
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


def _check_outputs(given: argparse.Namespace) -> None:
    """Raise `UserError` for a file that could not be written, before any work."""
    from distdl.engine.storage.files import check_output  # noqa: PLC0415

    for flag in ("confusion_figure", "misclassified", "json"):
        path, name = getattr(given, flag), f"--{flag.replace('_', '-')}"
        if path is None:
            continue
        if flag != "json" and path.suffix.lower() not in PICTURES:
            raise UserError(f"{name} {path}: expected a name that ends in {', '.join(PICTURES)}")
        check_output(path, name)


def _check_task(first: Trained, given: argparse.Namespace) -> None:
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
    sys.exit(cli.run(main))
