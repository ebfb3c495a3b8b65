"""The main job: ``python -m distdl.train``, or ``mpirun -n 4 python -m distdl.train``; ``--help`` lists all flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distdl import cli
from distdl.config import parse


def main(arguments: Sequence[str]) -> int:
    """Train as the flags say; return the exit code."""
    config = parse(arguments, "python -m distdl.train")
    cli.set_blas_threads(config.threads_per_rank)
    from distdl.engine import train  # noqa: PLC0415  NumPy reads the number of threads when it is loaded

    train(config)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=True))
