"""Write the report of a run: ``python -m distdl.report RUN`` writes ``report.html`` into its folder, or to `--out`.

The report shows settings, scores, learning curves, times, survived failures, and the network: its filters before and
after training, the feature maps of an image, the activations of its layers, the confusion matrix and the misclassified
images. It is one file with all pictures inside. Under mpirun the ranks share the samples to score.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distdl import cli
from distdl.cli import Command, Flag
from distdl.errors import UserError
from distdl.evaluate import check_names

NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The flags of the command."""

    run: Path
    """Run folder."""
    out: Path | None = None
    """File to write; by default report.html in the run folder."""
    data_dir: Path | None = None
    """Folder of the dataset's files; by default that of the run."""
    model: tuple[str, ...] = ()
    """Your own model that the run was trained with; its code is run."""
    dataset: str | None = None
    """Your own dataset that the run was trained on; its code is run. Or npz:FILE.npz or folder:PATH, if it moved."""


COMMAND = Command(
    program="python -m distdl.report",
    summary="Write a page of scores, curves and pictures (needs matplotlib).",
    settings=ReportOptions,
    examples=(
        "python -m distdl.report my-run",
        "python -m distdl.report my-run --out page.html",
        "mpirun -n 4 python -m distdl.report my-run --data-dir mnist",
    ),
    groups={"flags": ("run", "out", "data_dir", "model", "dataset")},
    flags={
        "run": Flag(name="RUN"),
        "out": Flag(value="FILE.html"),
        "model": Flag(value="FILE.py:FUNCTION", repeated=True),
        "dataset": Flag(value="FILE.py:FUNCTION"),
    },
)


def main(arguments: Sequence[str]) -> int:
    """Score the run, draw, and write; return the exit code."""
    given = COMMAND.parse(arguments)
    cli.set_blas_threads(1)
    from distdl.engine.console import Console  # noqa: PLC0415  NumPy reads the number of threads when it is loaded
    from distdl.engine.storage.files import check_output, write_output  # noqa: PLC0415
    from distdl.inference.figures import need_matplotlib  # noqa: PLC0415
    from distdl.inference.load import load  # noqa: PLC0415
    from distdl.inference.report_page import page_of  # noqa: PLC0415
    from distdl.inference.score import evaluate  # noqa: PLC0415
    from distdl.parallel import guard, on_rank_0, world  # noqa: PLC0415

    check_names(given.model, given.dataset)
    need_matplotlib()
    communicator, run, out = world(), given.run, given.out or given.run / NAME

    def check() -> None:
        if not (run / "config.toml").is_file():
            raise UserError(f"{run} is no run folder: expected one that distdl.train has written, such as runs/…")
        if out.suffix.lower() != ".html":
            raise UserError(f"--out {out}: expected a name that ends in .html")
        check_output(out, "--out")

    def write() -> None:
        write_output(out, page_of(run, trained, found).encode(), "--out")
        Console(live=False).line(f"report: {out}")

    with guard(communicator):
        on_rank_0(communicator, check)
        [trained] = load([run], communicator, data_dir=given.data_dir, dataset=given.dataset, models=given.model)
        found = evaluate([trained], "test", communicator)
        on_rank_0(communicator, write)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
