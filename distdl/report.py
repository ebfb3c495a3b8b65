"""Write the report of a run: ``python -m distdl.report RUN`` writes ``report.html`` into its folder, or to `--out`.

The report shows settings, scores, learning curves, times, survived failures, and the network: its filters before and
after training, the feature maps of an image, the activations of its layers, the confusion matrix and the misclassified
images. It is one file with all pictures inside. Under mpirun the ranks share the samples to score.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distdl import cli
from distdl.errors import UserError
from distdl.evaluate import check_names

NAME = "report.html"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the flags of a command line; raise `UserError` in one line."""
    parser = cli.OneLineParser(
        prog="python -m distdl.report",
        description="Write a run on one page: scores, curves, filters, mistakes, time, settings. Needs matplotlib.",
        advice="--help lists all flags",
    )
    add, own = parser.add_argument, "FILE.py:FUNCTION"
    add("run", type=Path, metavar="RUN", help="run folder")
    add("--out", type=Path, metavar="FILE.html", help=f"file to write (default: {NAME} in the run folder)")
    add("--data-dir", type=Path, help="folder with the dataset's files (default: that of the run)")
    add("--model", metavar=own, action="append", default=[], help="your own model that the run was trained with")
    add("--dataset", metavar=own, help="your own dataset that the run was trained on, or npz:FILE.npz …")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Score the run, draw, and write; return the exit code."""
    given = parse(arguments)
    cli.set_blas_threads(1)
    from distdl.engine.console import Console  # noqa: PLC0415  NumPy reads the number of threads when it is loaded
    from distdl.engine.storage.files import check_output, write_output  # noqa: PLC0415
    from distdl.inference.figures import need_matplotlib  # noqa: PLC0415
    from distdl.inference.load import load  # noqa: PLC0415
    from distdl.inference.report_page import page_of  # noqa: PLC0415
    from distdl.inference.score import evaluate  # noqa: PLC0415
    from distdl.parallel import guard, on_rank_0, world  # noqa: PLC0415

    check_names(given)
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
    sys.exit(cli.run(main))
