"""Measure the scaling: ``mpirun -n 4 python -m distdl.bench``, or without mpirun; ``--help`` lists all flags.

The benchmark measures the steps of the engine on 1, 2, 4 … of its ranks, for strong and weak scaling.
"""

import sys
from collections.abc import Sequence

from distdl import cli
from distdl.bench.settings import SCALINGS, BenchSettings, parse_interconnect, parse_ranks, parse_shape
from distdl.cli import Command, Flag
from distdl.config import DATASETS, KERNELS, MODELS, OPTIMIZERS, REDUCTIONS
from distdl.errors import UserError

COMMAND = Command(
    program="python -m distdl.bench",
    summary="Measure how training scales, and predict it for more ranks.",
    settings=BenchSettings,
    examples=(
        "mpirun -n 4 python -m distdl.bench",
        "mpirun -n 4 python -m distdl.bench --model deep_convnet --scaling strong",
        "python -m distdl.bench --scaling none --layers",
    ),
    groups={
        "training": (
            "model",
            "input_shape",
            "dataset",
            "data_dir",
            "batch_size",
            "micro_batch_size",
            "optimizer",
            "kernels",
        ),
        "measurement": (
            *("ranks", "scaling", "reduction", "steps", "repetitions"),
            *("layers", "communication", "interconnect"),
        ),
        "results": ("out", "trace"),
    },
    flags={
        "model": Flag(value="MODEL", names=MODELS, is_path=True),
        "input_shape": Flag(name="--input", value="HxWxC", parse=parse_shape),
        "dataset": Flag(value="NAME", names=DATASETS),
        "optimizer": Flag(value="NAME", names=OPTIMIZERS),
        "reduction": Flag(value="NAME", names=REDUCTIONS),
        "kernels": Flag(value="NAME", names=KERNELS),
        "ranks": Flag(value="1,2,4", parse=parse_ranks),
        "scaling": Flag(value="NAME", names=tuple(SCALINGS)),
        "interconnect": Flag(name="--network", value="10us,10Gbit", parse=parse_interconnect),
        "trace": Flag(value="FILE.json"),
    },
)


def parse(arguments: Sequence[str]) -> BenchSettings:
    """Return the checked settings of a command line; raise `UserError` in one line."""
    given = COMMAND.given(arguments)
    if {"dataset", "input_shape"} <= given.keys():
        raise UserError("--dataset and --input exclude each other: a dataset has a shape of its own")
    return COMMAND.made_from(given).checked()


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; return the exit code."""
    settings = parse(arguments)
    cli.set_blas_threads(1)
    from distdl.bench.benchmark import benchmark  # noqa: PLC0415  NumPy reads the number of threads when it is loaded

    benchmark(settings)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
