"""The scaling benchmark: ``mpirun -n 4 python -m distdl.bench``, or without mpirun; ``--help`` lists all flags.

Within the ranks it was given it measures 1, 2, 4 … of them, strong and weak scaling, with the engine's own steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distdl import cli
from distdl.bench.settings import SCALINGS, BenchSettings, parse_interconnect, parse_ranks, parse_shape
from distdl.config import MODELS, OPTIMIZERS
from distdl.errors import UserError

#: What the flag's text is turned into, beyond argparse's own kinds.
PARSERS = {"input_shape": parse_shape, "ranks": parse_ranks, "interconnect": parse_interconnect}


def parse(arguments: Sequence[str]) -> BenchSettings:
    """Return the checked settings of a command line; raise `UserError` in one line."""
    usual = BenchSettings()
    parser = cli.OneLineParser(
        prog="python -m distdl.bench",
        description="Measure how training scales with the ranks, and predict how it would go on.",
        advice="--help lists all flags",
    )
    add = parser.add_argument
    add(
        "--model",
        default=usual.model,
        help=f"network to train: {', '.join(MODELS)}; or one of your own, file.py:function or package.module:function "
        "(default: %(default)s)",
    )
    add("--input", dest="input_shape", metavar="HxWxC", help="random pixels of this shape (default: 28x28x1)")
    add("--dataset", help="a data set in the place of random pixels: digits, mnist or fashion-mnist")
    add("--data-dir", type=Path, help="folder with the data set's files")
    add("--batch-size", type=int, default=usual.batch_size, help="samples of a step (default: %(default)s)")
    add("--micro-batch-size", type=int, default=usual.micro_batch_size, help="unit of compute (default: %(default)s)")
    add("--optimizer", default=usual.optimizer, help=f"{', '.join(OPTIMIZERS)} (default: %(default)s)")
    add("--reduction", default=usual.reduction, help="tree or allreduce (default: %(default)s)")
    add("--ranks", metavar="1,2,4", help="numbers of ranks to measure (default: 1, 2, 4 ... and all there are)")
    add("--scaling", default=usual.scaling, help=f"{', '.join(SCALINGS)} (default: %(default)s)")
    add("--steps", type=int, help="steps of a measurement (default: as many as one rank takes in a second)")
    add("--repetitions", type=int, default=usual.repetitions, help="measurements of each (default: %(default)s)")
    add("--layers", action="store_true", help="time each layer, beside this machine's own matrix products")
    add("--communication", action="store_true", help="time the reduction over sizes, beside MPI's Allreduce")
    add(
        "--network",
        dest="interconnect",
        metavar="10us,10Gbit",
        help="predict for this latency and bandwidth, up to 1,024 ranks",
    )
    add("--out", type=Path, help="folder of bench.json and scaling.svg (default: a new one under runs/)")
    add("--trace", type=Path, metavar="FILE.json", help="when each rank computed, reduced, waited, for ui.perfetto.dev")
    given = vars(parser.parse_args(arguments))
    if given["dataset"] is not None and given["input_shape"] is not None:
        raise UserError("--dataset and --input exclude each other: a data set has a shape of its own")
    for name, parsed in PARSERS.items():
        if given[name] is not None:
            given[name] = parsed(given[name])
    return BenchSettings(**{name: value for name, value in given.items() if value is not None}).checked()


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; return the exit code."""
    settings = parse(arguments)
    cli.set_blas_threads(1)
    from distdl.bench.benchmark import benchmark  # noqa: PLC0415  NumPy reads the number of threads when it is loaded

    benchmark(settings)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
