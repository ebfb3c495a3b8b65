"""The command that starts N ranks, on this machine or on given hosts: `mpirun` with the options that each MPI needs.

MPICH, Intel MPI and their relatives need only `-n`. Open MPI refuses root and more ranks than cores, and binds every
job to the same first cores. The command sets variables that change all three, unless the user has set them. It asks
Open MPI 5 to let the survivors of a killed rank continue (ULFM).

In an allocation of Slurm, PBS or LSF the ranks fill the slots of its hosts; only further ranks share cores.
"""

import errno
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distdl.errors import UserError, one_line
from distdl.job.limits import explained


@dataclass(frozen=True)
class MpirunCommand:
    """A command line that starts a job, and the environment variables to add for it.

    >>> MpirunCommand(["mpirun", "-n", "2", "python", "my job.py"], {"A": "1"}).shell_line()
    "env A=1 mpirun -n 2 python 'my job.py'"
    """

    argv: list[str]
    environment: dict[str, str]

    def shell_line(self) -> str:
        """Return the line that does the same in a shell."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(["env", *variables, *self.argv] if variables else self.argv)


def mpirun_command(ranks: int, program: Sequence[str], hosts: str | None = None) -> MpirunCommand:
    """Return the command that starts `program` (a whole command line) as `ranks` ranks.

    They run on `hosts`, such as ``n1:4,n2:4``, or else on this machine or the hosts of the scheduler.
    Raises `UserError` if there are no ranks to start, or no working `mpirun`.
    """
    if ranks < 1:
        raise UserError(f"cannot start {ranks} ranks: expected 1 or more")
    mpirun = find_mpirun()
    version = _open_mpi_version(mpirun)
    # Open MPI has ULFM, the survival of failures, since version 5. It is off unless the launcher asks for it.
    fault_tolerance = ["--with-ft", "ulfm"] if version is not None and version >= 5 else []
    return MpirunCommand(
        argv=[str(mpirun), *fault_tolerance, *_on_hosts(hosts, version), "-n", str(ranks), *program],
        environment=_environment_in_a_step() | ({} if version is None else _open_mpi_environment(version)),
    )


def _on_hosts(hosts: str | None, version: int | None) -> list[str]:
    """Return the words that name the hosts. Open MPI passes on its own variables only; Python may need this one."""
    if hosts is None:
        return []
    path = ["-x", "PYTHONPATH"] if os.environ.get("PYTHONPATH") else []
    return ["-hosts", hosts] if version is None else ["--host", hosts, *path]


def python_command(module: str) -> list[str]:
    """Return the words that run a module, without a look into the working folder if it is one of distdl."""
    # Without an installation, distdl itself is in the working folder.
    is_safe = module.split(".", maxsplit=1)[0] == "distdl" and Path(__file__).parents[2] != Path.cwd()
    return [sys.executable, *(["-P"] if is_safe else []), "-m", module]


def find_mpirun() -> Path:
    """Return the `mpirun` next to this environment's Python, or else the first on PATH.

    Raises `UserError` if both are missing.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which("mpirun", path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    if found is None:
        for folder in (beside, *os.environ.get("PATH", os.defpath).split(os.pathsep)):
            if Path(folder, "mpirun").is_file():
                raise UserError(f"{folder}/mpirun has no execute permission: chmod +x {folder}/mpirun")
        raise UserError(
            f"no mpirun in {beside} and none on PATH: install an MPI into this environment with "
            "pip install 'distdl-mpi[mpich]', or train in one process with python -m distdl.train"
        )
    return Path(found)


def environment_for(command: MpirunCommand) -> dict[str, str]:
    """Return the whole environment of a job: that of this process and the variables of the command."""
    return {**os.environ, **command.environment}


def home() -> dict[str, str]:
    """Return the variable HOME if it is not set: Open MPI does not start without it.

    It is the user's home folder, or the temporary folder if the system does not know the user, as in some containers.
    """
    if "HOME" in os.environ:
        return {}
    try:
        folder = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        folder = ""
    return {"HOME": folder if os.access(folder, os.W_OK) else tempfile.gettempdir()}


def _open_mpi_version(mpirun: Path) -> int | None:
    """Return the major version of an Open MPI launcher, or None for another MPI's."""
    # Without a copy, execve fails if another thread changes a variable meanwhile.
    environment = {**os.environ, **home()}
    try:
        answer = subprocess.run(
            [mpirun, "--version"], env=environment, capture_output=True, text=True, errors="replace", check=True
        )
    except subprocess.CalledProcessError as error:
        said = one_line(error.stderr or error.stdout or f"exit code {error.returncode}, without a message")
        raise UserError(f"{mpirun} does not work; it says: {said}: reinstall its MPI if that does not help") from error
    except OSError as error:
        if (reached := explained(error)) is not error:
            raise reached from error
        raise UserError(f"{mpirun} does not work ({error.strerror}): {_remedy(error, mpirun)}") from error
    # Debian's launcher calls itself OpenRTE when started by its full name.
    found = re.search(r"\(Open ?(?:MPI|RTE)\) (\d+)", answer.stdout)
    return int(found[1]) if found else None


def _remedy(error: OSError, program: Path) -> str:
    return f"chmod +x {program}" if error.errno == errno.EACCES else "reinstall its MPI"


def _environment_in_a_step() -> dict[str, str]:
    """Return a variable for an `mpirun` in a shell that `srun` started; elsewhere none.

    There each `mpirun` starts its daemons by another `srun`, which would wait for the cores that the shell holds.
    """
    needed = "SLURM_STEP_ID" in os.environ and "SLURM_OVERLAP" not in os.environ
    return {"SLURM_OVERLAP": "1"} if needed else {}


def _open_mpi_environment(version: int) -> dict[str, str]:
    """Return the variables that lift Open MPI's refusals, except those that the user has set."""
    variables = home()
    if os.geteuid() == 0:  # as in a container
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # This also helps with fewer ranks than cores: two jobs, or the BLAS threads of one rank, would share a core while
    # other cores are idle.
    if version >= 5:
        variables |= {
            "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",  # without "slot" one host gets all ranks
            "PRTE_MCA_hwloc_default_binding_policy": "none",
            # A daemon gives up a host after 45 s without an answer; the default is eight minutes.
            "PRTE_MCA_oob_tcp_keepalive_time": "20",
            "PRTE_MCA_oob_tcp_keepalive_intvl": "5",
            "PRTE_MCA_oob_tcp_keepalive_probes": "5",
        }
    else:
        variables |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_hwloc_base_binding_policy": "none"}
    return {name: value for name, value in variables.items() if name not in os.environ}
