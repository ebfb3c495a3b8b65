"""Compare two runs bit for bit: ``python -m distdl.compare RUN RUN``.

The command only reads the two folders. The runs may come from other machines, and may have other numbers of ranks. It
also compares two files of `distdl.replay`. Exit codes: 0 equal, 1 different, 2 not comparable, 3 a damaged file.
"""

import sys
from collections.abc import Sequence

from distdl import cli
from distdl.cli import Command, Flag
from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.proof.options import CompareOptions

COMMAND = Command(
    program="python -m distdl.compare",
    summary="Compare two runs bit for bit; show where they first differ.",
    settings=CompareOptions,
    examples=(
        "python -m distdl.compare run-1 run-2",
        "python -m distdl.compare run-on-1-rank run-on-4-ranks",
        "python -m distdl.compare one-side.npz other-side.npz",
    ),
    groups={"flags": ("runs",)},
    flags={"runs": Flag(name="RUN", repeated=True)},
)


def main(arguments: Sequence[str]) -> int:
    """Compare the runs of the command line; return the exit code."""
    options = COMMAND.parse(arguments)
    if len(options.runs) != 2:
        raise UserError(f"{len(options.runs)} runs given, expected two: python -m distdl.compare RUN RUN")
    if read_launch().size > 1:
        raise UserError("distdl.compare only reads files: call it without mpirun")
    cli.set_blas_threads(1)
    from distdl.proof.compare_runs import compare  # noqa: PLC0415  NumPy reads the threads when it is loaded

    return compare(*options.runs)


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
