"""Score trained networks: ``python -m distdl.evaluate RUN``, or several for an ensemble; ``--help`` lists all flags.

A run folder stands for its newest intact checkpoint. Nothing is written into it. Under mpirun the ranks share the
samples; the numbers are the same.
"""

import sys
from collections.abc import Sequence

from distdl import cli
from distdl.cli import USER_CODE, Command, Flag
from distdl.inference.options import EvaluateOptions, part_of

COMMAND = Command(
    program="python -m distdl.evaluate",
    summary="Score trained networks, each alone and all together as an ensemble.",
    settings=EvaluateOptions,
    examples=(
        "python -m distdl.evaluate my-run --confusion",
        "python -m distdl.evaluate run-1 run-2 run-3 --on folder:new-photos",
        "mpirun -n 4 python -m distdl.evaluate my-run --part validation --best",
    ),
    groups={
        "runs": ("runs", "best", "model"),
        "data": ("on", "skip_damaged", "csv_columns", "part", "dataset", "data_dir", "data_gigabytes"),
        "results": ("half", "confusion", "confusion_figure", "misclassified", "json"),
    },
    flags={
        "runs": Flag(name="RUN_OR_CHECKPOINT", repeated=True),
        **USER_CODE,
        "on": Flag(value="SOURCE", is_path=True),
        "csv_columns": Flag(value="PATH,LABEL"),
        "part": Flag(value="test|validation|training", parse=part_of),
        "confusion_figure": Flag(value="FILE.png"),
        "misclassified": Flag(value="FILE.png"),
        "json": Flag(value="FILE"),
    },
)


def main(arguments: Sequence[str]) -> int:
    """Score the networks of the command line; return the exit code."""
    options = COMMAND.parse(arguments)
    cli.set_blas_threads(1)
    from distdl.inference.evaluate_runs import evaluate_runs  # noqa: PLC0415  NumPy reads the threads when it is loaded

    evaluate_runs(options)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
