"""Write the report of a run: ``python -m distdl.report RUN`` writes ``report.html`` into its folder, or to `--out`.

The report is one file with all pictures inside. Under mpirun the ranks share the samples to score.
"""

import sys
from collections.abc import Sequence

from distdl import cli
from distdl.cli import USER_CODE, Command, Flag
from distdl.inference.options import ReportOptions

COMMAND = Command(
    program="python -m distdl.report",
    summary="Write a page of scores, curves and pictures (needs matplotlib).",
    settings=ReportOptions,
    examples=(
        "python -m distdl.report my-run",
        "python -m distdl.report my-run --out page.html",
        "mpirun -n 4 python -m distdl.report my-run --data-dir mnist",
    ),
    groups={"flags": ("run", "out", "data_dir", "model", "dataset", "data_gigabytes")},
    flags={
        "run": Flag(name="RUN"),
        "out": Flag(value="FILE.html"),
        **USER_CODE,
    },
)


def main(arguments: Sequence[str]) -> int:
    """Write the report of the run of the command line; return the exit code."""
    options = COMMAND.parse(arguments)
    cli.set_blas_threads(1)
    from distdl.inference.report_page import write_report  # noqa: PLC0415  NumPy reads the threads when it is loaded

    write_report(options)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
