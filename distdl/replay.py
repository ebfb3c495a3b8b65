"""Take one step of a run again and look inside it: ``python -m distdl.replay RUN --step N``; also under mpirun.

The step is checked against the records of the run. All arrays of one of its micro-batches are written as npz, the same
bytes on any number of ranks, with a picture. Exit codes: 0, or 1 if the step differs from the records.
"""

import sys
from collections.abc import Sequence

from distdl import cli
from distdl.cli import USER_CODE, Command, Flag
from distdl.proof.options import ReplayOptions

COMMAND = Command(
    program="python -m distdl.replay",
    summary="Take one step of a run again, check its bits and look inside it.",
    settings=ReplayOptions,
    examples=(
        "python -m distdl.replay my-run --step 317",
        "python -m distdl.replay my-run --step 317 --micro-batch 5 --layer conv2d_2",
        "mpirun -n 4 python -m distdl.replay my-run --step 317",
    ),
    groups={
        "step": ("run", "step", "micro_batch", "layer", "out"),
        "data and model": ("data_dir", "model", "dataset", "data_gigabytes"),
    },
    flags={
        "run": Flag(name="RUN"),
        "layer": Flag(value="NAME"),
        "out": Flag(value="FILE.npz"),
        **USER_CODE,
    },
)


def main(arguments: Sequence[str]) -> int:
    """Take the step of the command line again; return the exit code."""
    options = COMMAND.parse(arguments)
    cli.set_blas_threads(1)
    from distdl.proof.replay_step import replay  # noqa: PLC0415  NumPy reads the threads when it is loaded

    return replay(options)


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
