"""Audit a run: ``python -m distdl.audit RUN --fraction 0.1``; also under mpirun.

Randomly chosen stretches between checkpoints are computed again and compared with the records of the run. So a third
party can check a training without repeating all of it. Exit codes: 0, or 1 if anything differs.
"""

import sys
from collections.abc import Sequence

from distdl import cli
from distdl.cli import USER_CODE, Command, Flag
from distdl.proof.options import AuditOptions

COMMAND = Command(
    program="python -m distdl.audit",
    summary="Compute random stretches of a run again and compare every bit.",
    settings=AuditOptions,
    examples=(
        "python -m distdl.audit my-run",
        "python -m distdl.audit my-run --fraction 0.3 --seed 7",
        "mpirun -n 4 python -m distdl.audit my-run --fraction 1",
    ),
    groups={
        "audit": ("run", "fraction", "seed"),
        "data and model": ("data_dir", "model", "dataset", "data_gigabytes"),
    },
    flags={
        "run": Flag(name="RUN"),
        **USER_CODE,
    },
)


def main(arguments: Sequence[str]) -> int:
    """Audit the run of the command line; return the exit code."""
    options = COMMAND.parse(arguments)
    cli.set_blas_threads(1)
    from distdl.proof.audit_run import audit  # noqa: PLC0415  NumPy reads the threads when it is loaded

    return audit(options)


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
