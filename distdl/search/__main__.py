"""Hyperparameter search: ``mpirun -n 4 python -m distdl.search``, or without mpirun; ``--help`` lists all flags.

    python -m distdl.search --range lr=1e-6:1e-2:log --range weight-decay=1e-8:1e-4:log -- --model mlp --epochs 5

trains with settings drawn from the ranges and the flags of ``distdl.train`` behind ``--``, narrows the ranges to the
best by validation accuracy, and begins again; it ends with the command that trains with the best settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distdl import cli
from distdl.config import parse as parse_config
from distdl.config import value_of
from distdl.errors import UserError
from distdl.job.launcher import read_launch
from distdl.search.settings import DEFAULT_KEEP, METHODS, SEARCHABLE, SearchSettings, parse_range

#: Flags of distdl.train that the search gives to each trial.
OURS = ("--run-dir", "--resume", "--max-steps", "--keep-checkpoints", "--trace")


def parse(arguments: Sequence[str]) -> SearchSettings:
    """Return the checked settings of a command line; raise `UserError` in one line."""
    own, flags = cli.split_at_dashes(arguments)
    usual = SearchSettings(ranges=())
    parser = cli.OneLineParser(
        prog="python -m distdl.search",
        usage="%(prog)s --range SETTING=LOW:HIGH[:log] [--range ...] [options] [-- flags of distdl.train]",
        description="Search hyperparameters: short trainings with settings drawn at random, judged on validation data.",
        epilog=f"Settings that can be searched: {', '.join(sorted(SEARCHABLE))}.",
        advice="--help lists all flags",
    )
    add, keeps = parser.add_argument, ", ".join(f"{keep} for {name}" for name, keep in DEFAULT_KEEP.items())
    add(
        "--range",
        dest="ranges",
        action="append",
        default=[],
        metavar="lr=1e-6:1e-2:log",
        help="give one for each setting to search; a range wins over a config file behind --",
    )
    add("--method", default=usual.method, help=f"{' or '.join(METHODS)} (default: %(default)s)")
    add("--rounds", type=int, default=usual.rounds, help="number of rounds (default: %(default)s)")
    add(
        "--trials", type=int, default=usual.trials, help="trials of a (halving: the first) round (default: %(default)s)"
    )
    add("--keep", type=float, help=f"share of the trials that the next round builds on (default: {keeps})")
    add("--seed", type=int, default=usual.seed, help="of the drawn settings (default: %(default)s)")
    add("--ranks-per-trial", type=int, default=1, help="ranks that train a trial together (default: %(default)s)")
    add("--out", type=Path, help="folder of the results (default: a new one under runs/)")
    add("--resume", action="store_true", help="go on with the search in --out")
    given = vars(parser.parse_args(own))
    ranges = tuple(parse_range(text) for text in given.pop("ranges"))
    for word in flags:
        if word.split("=")[0].replace("_", "-") in OURS:
            raise UserError(f"{word.split('=')[0]} is set by distdl.search itself: leave it out")
    for one in ranges:
        if value_of(one.name, flags) is not None:
            name = one.name.replace("_", "-")
            raise UserError(f"--{name} is searched by --range {one}, and given behind --: leave one of them out")
    return SearchSettings(**given, ranges=ranges, config=parse_config(flags, "python -m distdl.train")).checked()


def main(arguments: Sequence[str]) -> int:
    """Search, print and write; return the exit code."""
    settings = parse(arguments)
    cli.set_blas_threads(settings.config.threads_per_rank)
    from distdl.engine.console import Console  # noqa: PLC0415  NumPy reads the threads when it is loaded
    from distdl.search.tables import training_command  # noqa: PLC0415
    from distdl.search.trials import search  # noqa: PLC0415

    found = search(settings)
    if found.best is None:
        error = UserError(f"all {len(found.results)} trials have diverged: give ranges of smaller values")
        error.agreed = True
        raise error
    if read_launch().prints_for_all:
        Console(live=False).line(f"best: {training_command(settings.config_with(found.best.settings))}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=True))
