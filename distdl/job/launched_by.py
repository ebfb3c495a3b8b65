"""The launcher's environment variables: a process reads its rank from them before MPI starts.

So rank 0 alone prints errors such as a wrong flag, MPI starts only if it is needed (MPI_Init takes up to a second), and
a launcher that does not fit the MPI library is detected.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

OPEN_MPI = "Open MPI's mpirun"
MPICH = "MPICH's mpirun"
# Not SLURM_NTASKS: a batch script's single process also has it. Only `srun` sets the number of tasks of a job step.
RANK_AND_SIZE = (
    (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    (MPICH, "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

#: The rank among the ranks of its host: the names of Open MPI, MPICH and Slurm.
LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")

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
    for by, rank, size in RANK_AND_SIZE:
        if environment.get(rank, "").isdecimal() and environment.get(size, "").isdecimal():
            local = [environment[name] for name in LOCAL_RANK if environment.get(name, "").isdecimal()]
            return Launch(by, int(environment[rank]), int(environment[size]), int(local[0]) if local else 0)
    return Launch(None, 0, 1)


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
