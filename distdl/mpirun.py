"""Start N ranks on this machine with the MPI of this environment: `python -m distdl.mpirun -n 4 -- --epochs 3`.

This is the one place that knows the habits of each MPI's `mpirun`. MPICH, Intel MPI and their kin want nothing but
`-n`. Open MPI as it comes refuses root, refuses more ranks than cores, and binds every job it starts to the same
first cores, even out of a `taskset`; here all three are lifted, by variables that yield to those a person has set.
From version 5 on it is also asked to let the survivors of a killed rank go on (ULFM).

Neither NumPy nor MPI is imported: this process turns into `mpirun`, so its signals and its exit code are `mpirun`'s.
With `--restarts` it stays, passes signals on, and starts a job that fails again (`restarts.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distdl import cli
from distdl.errors import UserError
from distdl.job.launcher import remove_session_folder
from distdl.job.restarts import run_until_done


@dataclass(frozen=True)
class Command:
    """What starts a job: a command, and the variables that it needs besides those already set.

    >>> Command(["mpirun", "-n", "2", "python", "my job.py"], {"A": "1"}).shell_line()
    "env A=1 mpirun -n 2 python 'my job.py'"
    """

    argv: list[str]
    environment: dict[str, str]

    def shell_line(self) -> str:
        """Return the line that does the same when pasted into a shell."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(["env", *variables, *self.argv] if variables else self.argv)


def find_mpirun() -> Path:
    """Return this environment's own `mpirun`, beside its Python, else the first on PATH.

    Raises `UserError` when there is none.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which("mpirun", path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise UserError(
            f"no mpirun in {beside} and none on PATH: install an MPI into this environment with "
            "pip install 'distdl-mpi[mpich]', or train in one process with python -m distdl.train"
        )
    return Path(found)


def mpirun_command(ranks: int, program: Sequence[str]) -> Command:
    """Return what starts `program` (a whole command line) as `ranks` ranks on this machine.

    Raises `UserError` when there are no ranks to start, or no `mpirun` that works.
    """
    if ranks < 1:
        raise UserError(f"cannot start {ranks} ranks: expected 1 or more")
    mpirun = find_mpirun()
    version = _open_mpi_version(mpirun)
    # ULFM, the survival of failures, is built into Open MPI from 5 on, and off unless the launcher asks for it.
    fault_tolerance = ["--with-ft", "ulfm"] if version is not None and version >= 5 else []
    return Command(
        argv=[str(mpirun), *fault_tolerance, "-n", str(ranks), *program],
        environment={} if version is None else _open_mpi_environment(version),
    )


def environment_for(command: Command) -> dict[str, str]:
    """Return the whole environment of a job: this process's own and what the command adds."""
    return {**os.environ, **command.environment}


def _open_mpi_version(mpirun: Path) -> int | None:
    """Return the major version of an Open MPI launcher, None for one of another MPI."""
    try:
        answer = subprocess.run([mpirun, "--version"], capture_output=True, text=True, errors="replace", check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{mpirun} does not work ({error}): reinstall the MPI it belongs to") from error
    # Debian's launcher calls itself OpenRTE when started by its full name.
    found = re.search(r"\(Open ?(?:MPI|RTE)\) (\d+)", answer.stdout)
    return int(found[1]) if found else None


def _open_mpi_environment(version: int) -> dict[str, str]:
    """Return the variables that lift Open MPI's refusals, less those that a person has set already."""
    variables: dict[str, str] = {}
    if os.geteuid() == 0:  # as in a container
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Not only for more ranks than cores: Open MPI counts a core's two hardware threads as one place for a rank, and
    # two jobs at once, or the BLAS threads of one rank, would share one core while others idle.
    if version >= 5:
        variables |= {
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "PRTE_MCA_hwloc_default_binding_policy": "none",
        }
    else:
        variables |= {
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "OMPI_MCA_hwloc_base_binding_policy": "none",
        }
    return {name: value for name, value in variables.items() if name not in os.environ}


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into this launcher's options and, after the first `--`, the program's flags."""
    parser = cli.OneLineParser(
        prog="python -m distdl.mpirun",
        usage="%(prog)s -n RANKS [--restarts N] [--module MODULE] [--dry-run] [-- FLAGS OF THE PROGRAM]",
        description="Train with several ranks on this machine, with the MPI of this environment.",
        advice="see --help, and put the flags of the program after --",
    )
    parser.add_argument("-n", dest="ranks", metavar="RANKS", type=int, required=True, help="how many to start")
    parser.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        default=0,
        help="start a job that fails again, up to N times, from its last checkpoint; for distdl.train and modules that "
        "know --run-dir and --resume auto as it does (%(default)s)",
    )
    parser.add_argument("--module", default="distdl.train", help="the Python module that every rank runs (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the command line instead of running it")
    own, flags = cli.split_at_dashes(arguments)
    return parser.parse_args(own), flags


def _command_of(options: argparse.Namespace, flags: Sequence[str]) -> Command:
    """Return what starts the module that the options name; raise `UserError` once here, not once a rank."""
    try:
        found = importlib.util.find_spec(options.module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UserError(f"no Python module {options.module!r}: expected a name like distdl.train")
    return mpirun_command(options.ranks, [sys.executable, "-m", options.module, *flags])


def main(arguments: Sequence[str]) -> int:
    """Become `mpirun`; return an exit code only when there is nothing to run."""
    options, flags = _parse(arguments)
    if options.restarts < 0:
        raise UserError(f"cannot restart {options.restarts} times: expected 0 or more")
    if options.restarts and options.module.startswith("distdl.") and options.module != "distdl.train":
        raise UserError(f"--restarts is for trainings, and {options.module} is none: leave it out")
    command = _command_of(options, flags)

    def start_of(flags: Sequence[str]) -> tuple[Sequence[str], dict[str, str]]:
        command = _command_of(options, flags)
        return command.argv, environment_for(command)

    if options.restarts and not options.dry_run and not {"-h", "--help"} & set(flags):
        return run_until_done(start_of, flags, options.restarts)
    if not options.dry_run:
        remove_session_folder(os.getpid())  # which will be mpirun's
        os.execve(command.argv[0], command.argv, environment_for(command))  # noqa: S606  no shell is wanted
    sys.stdout.write(f"{command.shell_line()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
