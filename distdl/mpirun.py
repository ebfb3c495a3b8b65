"""Start N ranks with the MPI of this environment: `python -m distdl.mpirun -n 4 -- --epochs 3`.

Without `--restarts` this process becomes `mpirun`, so its signals and its exit code are those of `mpirun`. With it, the
process stays, forwards signals, and starts a failed job again. It imports neither NumPy nor MPI.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from distdl import cli
from distdl.__main__ import COMMANDS
from distdl.cli import Command, Flag
from distdl.errors import UserError
from distdl.job import leftovers
from distdl.job.allocation import read_allocation
from distdl.job.limits import why_too_few_processes
from distdl.job.mpirun_command import MpirunCommand, environment_for, mpirun_command, python_command
from distdl.job.restarts import run_until_done
from distdl.job.slow_start import report_a_slow_start


@dataclass(frozen=True, kw_only=True)
class MpirunOptions:
    """The flags of the launcher."""

    ranks: int
    """Number of ranks to start."""
    module: str = "distdl.train"
    """Python module that every rank runs; a command of distdl after the dashes, such as predict, means its module."""
    restarts: int = 0
    """Start a failed job again from its last checkpoint, up to N times; for distdl.train, and for modules with the
    same flags --run-dir and --resume auto."""
    hosts: str | None = None
    """Hosts for the ranks, such as n1:4,n2:4, instead of this machine or the scheduler's; launch/hosts.sh checks
    them."""
    doctor: bool = False
    """Run distdl.doctor first in the same way; stop if it finds that the job will not work."""
    dry_run: bool = False
    """Print the command line instead of running it."""


COMMAND = Command(
    program="python -m distdl.mpirun",
    summary="Start N ranks on this machine, with the MPI of this environment.",
    settings=MpirunOptions,
    examples=(
        "python -m distdl.mpirun -n 4 -- --dataset mnist --epochs 3",
        "python -m distdl.mpirun -n 4 -- predict my-run photos",
        "python -m distdl.mpirun -n 4 --restarts 5 -- --run-dir my-run",
    ),
    groups={"flags": ("ranks", "hosts", "module", "doctor", "restarts", "dry_run")},
    flags={
        "ranks": Flag(name="-n", value="RANKS"),
        "hosts": Flag(value="HOST:RANKS,..."),
        "module": Flag(value="MODULE"),
    },
    flags_after_dashes="the program",
)


def main(arguments: Sequence[str]) -> int:
    """Become `mpirun`. Return an exit code only with `--restarts` or `--dry-run`."""
    own, flags = cli.split_at_dashes(arguments)
    options = COMMAND.parse(own)
    if (
        flags and options.module == MpirunOptions.module and flags[0] in set(COMMANDS) - {"mpirun"}
    ):  # train takes no words
        options, flags = replace(options, module=f"distdl.{flags[0]}"), flags[1:]
    if options.restarts < 0:
        raise UserError(f"cannot restart {options.restarts} times: expected 0 or more")
    if options.restarts and options.module.startswith("distdl.") and options.module != "distdl.train":
        raise UserError(f"--restarts is for trainings, and {options.module} is not a training: leave it out")
    if options.hosts is not None and re.fullmatch(r"[\w.-]+(:\d+)?(,[\w.-]+(:\d+)?)*", options.hosts, re.ASCII) is None:
        raise UserError(f"--hosts {options.hosts}: expected names and numbers of ranks, such as n1:4,n2:4")
    command = _command_of(options, flags)
    if options.doctor and not options.dry_run and (code := _doctors_code(options, flags)) not in {0, 1}:
        return code
    is_here = options.hosts is None and read_allocation() is None
    if is_here and (few := why_too_few_processes(options.ranks)):
        raise UserError(few)
    if options.dry_run:
        sys.stdout.write(f"{command.shell_line()}\n")
    elif options.restarts and not {"-h", "--help", "--dry-run", "--dry_run"} & set(flags):
        return run_until_done(lambda flags: _start_of(_command_of(options, flags)), flags, options.restarts)
    else:
        environment = leftovers.own_session(environment_for(command))  # mpirun keeps this process number
        report_a_slow_start(command.argv)
        os.execve(command.argv[0], command.argv, environment)  # noqa: S606  no shell is wanted
    return 0


def _command_of(options: MpirunOptions, flags: Sequence[str]) -> MpirunCommand:
    """Return the command that starts the module; raise `UserError` here once, rather than on every rank."""
    if options.module.split(".")[0] != "distdl":
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.util.find_spec(options.module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UserError(f"no Python module {options.module!r}: expected a name like distdl.train")
    return mpirun_command(options.ranks, [*python_command(options.module), *flags], options.hosts)


def _doctors_code(options: MpirunOptions, flags: Sequence[str]) -> int:
    """Run the doctor as the job will run, for its run folder, and return the exit code."""
    folder = [f"--run-dir={value}" for flag, value in pairwise([*flags, ""]) if flag == "--run-dir"]
    folder += [flag for flag in flags if flag.startswith("--run-dir=")]
    argv, environment = _start_of(_command_of(replace(options, module="distdl.doctor"), folder))
    return subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def _start_of(command: MpirunCommand) -> tuple[Sequence[str], dict[str, str]]:
    return command.argv, environment_for(command)


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=COMMAND.trains))
