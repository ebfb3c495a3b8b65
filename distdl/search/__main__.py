"""Search hyperparameters: ``mpirun -n 4 python -m distdl.search``, or without mpirun; ``--help`` lists all flags.

    python -m distdl.search --range lr=1e-6:1e-2:log --range weight-decay=1e-8:1e-4:log -- --model mlp --epochs 5

trains with random settings from the ranges and with the flags of ``distdl.train`` after ``--``. It narrows the ranges
to the trials of best validation accuracy and repeats. At the end it prints the command that trains with the best
settings.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from distdl import cli, train_command
from distdl.cli import Command, Flag
from distdl.config import flag_of
from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.search.settings import METHODS, SEARCHABLE, SearchSettings, parse_range

#: Flags of distdl.train that the search sets for each trial.
OURS = ("--run-dir", "--dry-run", "--resume", "--max-steps", "--keep-checkpoints", "--trace")

COMMAND = Command(
    program="python -m distdl.search",
    summary="Search hyperparameters with short trainings of random settings.",
    settings=SearchSettings,
    examples=(
        "python -m distdl.search --range lr=1e-6:1e-2:log",
        "mpirun -n 4 python -m distdl.search --range lr=1e-4:1e-1:log -- --model mlp",
        "python -m distdl.search --range lr=0.001:0.1 --method halving -- --epochs 9",
    ),
    groups={
        "search": ("ranges", "method", "rounds", "trials", "keep", "seed"),
        "run": ("ranks_per_trial", "out", "resume"),
    },
    flags={
        "ranges": Flag(name="--range", value="RANGE", names=SEARCHABLE, parse=parse_range, repeated=True),
        "method": Flag(value="NAME", names=METHODS),
        "keep": Flag(value="SHARE"),
    },
    flags_after_dashes="distdl.train",
    trains=True,
)


def parse(arguments: Sequence[str]) -> SearchSettings:
    """Return the checked settings of a command line; raise `UserError` in one line."""
    own, flags = cli.split_at_dashes(arguments)
    given = COMMAND.given(own)
    for word in flags:
        if word.split("=")[0].replace("_", "-") in OURS:
            raise UserError(f"{word.split('=')[0]} is set by distdl.search itself: leave it out")
    for_train = train_command.COMMAND.given(flags)
    settings = COMMAND.made_from({"ranges": [], **given})
    for one in settings.ranges:
        if one.name in for_train:
            raise UserError(
                f"{flag_of(one.name)} is searched by --range {one}, and given after --: leave one of them out"
            )
    return replace(settings, config=train_command.config_of(for_train)).checked()


def main(arguments: Sequence[str]) -> int:
    """Search, print and write; return the exit code."""
    settings = parse(arguments)
    cli.set_blas_threads(settings.config.threads_per_rank)
    from distdl.engine.console import Console  # noqa: PLC0415  NumPy reads the threads when it is loaded
    from distdl.search.tables import training_command  # noqa: PLC0415
    from distdl.search.trials import search  # noqa: PLC0415

    found = search(settings)
    if found.best is None:
        raise UserError(f"all {len(found.results)} trials have diverged: give ranges of smaller values", agreed=True)
    if read_launch().prints_for_all:
        Console(live=False).line(f"best: {training_command(settings.config_with(found.best.settings))}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
