"""Export a trained network: ``python -m distdl.export RUN --to onnx``; ``--help`` lists all flags.

It reads a run folder or a checkpoint, and needs no training data. The result is used without distdl.
"""

import sys
from collections.abc import Sequence

from distdl import cli
from distdl.cli import USER_CODE, Command, Flag
from distdl.export.options import ExportOptions

COMMAND = Command(
    program="python -m distdl.export",
    summary="Export a trained network to ONNX, PyTorch or NumPy.",
    settings=ExportOptions,
    examples=(
        "python -m distdl.export my-run --to onnx",
        "python -m distdl.export my-run --to pytorch --out shells",
        "python -m distdl.export my-run --to npz --out shells.npz --best",
    ),
    groups={
        "flags": ("run", "to", "out", "best"),
        "code and old checkpoints": ("model", "dataset", "data_dir", "data_gigabytes"),
    },
    flags={
        "run": Flag(name="RUN"),
        **USER_CODE,
    },
)


def main(arguments: Sequence[str]) -> int:
    """Export the network of the command line; return the exit code."""
    options = COMMAND.parse(arguments)
    cli.set_blas_threads(1)
    from distdl.export.export import export  # noqa: PLC0415  NumPy reads the threads when it is loaded

    export(options)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
