"""The launcher's environment variables: a process reads its rank from them before MPI starts.

So rank 0 alone prints errors such as a wrong flag, MPI starts only if it is needed (MPI_Init takes up to a second), and
a launcher that does not fit the MPI library is detected.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from distdl.job.allocation import expand_slurm_counts
from distdl.job.processes import ancestors

OPEN_MPI = "Open MPI's mpirun"
MPICH = "MPICH's mpirun"
# Not SLURM_NTASKS: a batch script's single process also has it. Only `srun` sets the number of tasks of a job step.
RANK_AND_SIZE = (
    (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    (MPICH, "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

#: The programs that start ranks with these variables: of Open MPI 5 and 4, of MPICH and its relatives, of Slurm.
#: MPICH's `mpirun` starts a proxy, which starts the ranks. Under `srun --mpi=pmi2`, Slurm's own variables count.
PROGRAMS = {
    OPEN_MPI: {"mpirun", "mpiexec", "prterun", "prte", "prted", "orterun", "orted"},
    MPICH: {"mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_pr"},
    "srun": {"slurmstepd"},
}
#: The first letters of the variables that each of them sets.
PREFIXES = {OPEN_MPI: "OMPI_|PMIX_|PRTE_", MPICH: "PMI_|PMIX_|MPI_LOCAL", "srun": "SLURM_PROCID|SLURM_STEP_|PMIX_"}

#: The rank among the ranks of its host: the names of Open MPI, MPICH and Slurm.
LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")

#: The number of ranks on this host: the names of Open MPI and MPICH.
LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")

#: MPI libraries that need a launcher like MPICH's; mpi4py's names for their vendors.
KIN_OF_MPICH = {"MPICH", "MVAPICH", "MVAPICH2", "Intel MPI", "Cray MPICH"}


@dataclass(frozen=True)
class Launch:
    """How this process was started: the launcher, the rank, the number of ranks, and the rank on its host, if known."""

    by: str | None
    rank: int
    size: int
    local_rank: int = 0

    @property
    def prints_for_all(self) -> bool:
        """Whether this process prints the messages that concern all ranks."""
        return self.rank == 0 or _replaces_rank_0


_replaces_rank_0 = False


def print_for_all_ranks() -> None:
    """Let this process print for all ranks from now on: it is the lowest surviving rank."""
    global _replaces_rank_0  # noqa: PLW0603  there is one job
    _replaces_rank_0 = True


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return how this process was started; `by` is None without a known launcher.

    >>> read_launch({"PMI_RANK": "1", "PMI_SIZE": "4"})
    Launch(by="MPICH's mpirun", rank=1, size=4, local_rank=0)
    """
    local = [int(environment[name]) for name in LOCAL_RANK if environment.get(name, "").isdecimal()]
    found = [
        Launch(by, int(environment[rank]), int(environment[size]), local[0] if local else 0)
        for by, rank, size in RANK_AND_SIZE
        if environment.get(rank, "").isdecimal() and environment.get(size, "").isdecimal()
    ]
    if len(found) > 1 and environment is os.environ:  # those of one launcher may be left over from another job
        for process in ancestors():
            for launch in found:
                if process.name in PROGRAMS[launch.by or ""]:
                    return launch
    return found[0] if found else Launch(None, 0, 1)


def ranks_of_this_host(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks that the launcher starts on this host; 0 if it is unknown.

    >>> ranks_of_this_host({"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"})
    1
    """
    for name in LOCAL_SIZE:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    try:
        return expand_slurm_counts(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
    except (LookupError, ValueError):
        return 0


def launcher_is_missing(launch: Launch, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether variables of a launcher are set, but no such launcher is above this process.

    Then they are left over from another job, or the launcher is outside of this process's container.
    """
    if launch.by is None:
        return False
    above = list(ancestors())
    if not any(process.name in PROGRAMS[launch.by] for process in above):
        return True
    task = environment.get("SLURM_TASK_PID", "")  # a script of Slurm is below its daemon too
    return launch.by == "srun" and task.isdecimal() and int(task) not in {os.getpid(), *(one.pid for one in above)}


def how_to_unset(launch: Launch) -> str:
    """Return the line for a shell that removes the variables of this launcher.

    >>> how_to_unset(Launch("srun", 1, 4))
    "unset $(env | grep -oE '^(SLURM_PROCID|SLURM_STEP_|PMIX_)[A-Z0-9_]*')"
    """
    return f"unset $(env | grep -oE '^({PREFIXES[launch.by or '']})[A-Z0-9_]*')"


def variables_of(launch: Launch) -> str:
    """Return the two variables that tell the rank and the size.

    >>> variables_of(Launch("srun", 1, 4))
    'SLURM_PROCID=1 and SLURM_STEP_NUM_TASKS=4'
    """
    rank, size = next((rank, size) for by, rank, size in RANK_AND_SIZE if by == launch.by)
    return f"{rank}={launch.rank} and {size}={launch.size}"


def compatible(launch: Launch, library: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether processes with this MPI library (mpi4py's name of its vendor) form one job under this launcher.

    If they do not, MPI_Init would abort the process or make it a job of its own. With every MPI, an `srun` that uses
    PMI sets the variables of MPICH's mpirun.

    >>> compatible(Launch("MPICH's mpirun", 0, 4), "Open MPI", {})
    False
    """
    if launch.by == OPEN_MPI:
        return library not in KIN_OF_MPICH
    if launch.by == MPICH and "SLURM_STEP_NUM_TASKS" not in environment:
        return library != "Open MPI"
    return True


def survives_failures(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the launcher turned on fault tolerance (`mpirun --with-ft ulfm`).

    Only the launcher is asked: the MPI library answers its fault-tolerance calls even if fault tolerance is off.
    """
    return environment.get("OMPI_MCA_mpi_ft_enable", "").lower() in {"1", "true", "yes"}
