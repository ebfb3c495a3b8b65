"""What the launcher's environment variables tell a process about itself, before MPI is started.

`mpirun` and `srun` hand every process its rank and the number of ranks. That is enough to let rank 0 alone
speak about a wrong flag, to start MPI only when there is something to start it for (MPI_Init takes up to a
second), and to notice when a launcher and the MPI library do not belong together.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

OPEN_MPI = "Open MPI's mpirun"
MPICH = "MPICH's mpirun"
# Not SLURM_NTASKS: the one process of a batch script has that too. Only `srun` says how many tasks a step has.
RANK_AND_SIZE = (
    (OPEN_MPI, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    (MPICH, "PMI_RANK", "PMI_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

#: The rank among those of a host, as Open MPI, MPICH and Slurm name it.
LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")

#: As mpi4py names those whose processes only a launcher like MPICH's can start.
KIN_OF_MPICH = {"MPICH", "MVAPICH", "MVAPICH2", "Intel MPI", "Cray MPICH"}


@dataclass(frozen=True)
class Launch:
    """How this process was started: by what, as which rank of how many, and as which of those of its host, if known."""

    by: str | None
    rank: int
    size: int
    local_rank: int = 0

    @property
    def speaks(self) -> bool:
        """Whether this process is the one that tells a person what is wrong."""
        return self.rank == 0 or _has_the_word


_has_the_word = False


def take_the_word() -> None:
    """Let this process speak for the job from now on: the lowest rank of those that are left."""
    global _has_the_word  # noqa: PLW0603  there is one job
    _has_the_word = True


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return how this process was started; `by` is None where no launcher is known to have done it.

    >>> read_launch({"PMI_RANK": "1", "PMI_SIZE": "4"})
    Launch(by="MPICH's mpirun", rank=1, size=4, local_rank=0)
    """
    for by, rank, size in RANK_AND_SIZE:
        if environment.get(rank, "").isdecimal() and environment.get(size, "").isdecimal():
            local = [environment[name] for name in LOCAL_RANK if environment.get(name, "").isdecimal()]
            return Launch(by, int(environment[rank]), int(environment[size]), int(local[0]) if local else 0)
    return Launch(None, 0, 1)


def belong_together(launch: Launch, library: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the MPI library (its vendor, as mpi4py names it) can be one job under this launcher.

    Where it cannot, MPI_Init would abort the process or make it a job of its own. An `srun` that speaks PMI sets
    the variables of MPICH's mpirun for every MPI.

    >>> belong_together(Launch("MPICH's mpirun", 0, 4), "Open MPI", {})
    False
    """
    if launch.by == OPEN_MPI:
        return library not in KIN_OF_MPICH
    if launch.by == MPICH and "SLURM_STEP_NUM_TASKS" not in environment:
        return library != "Open MPI"
    return True


def survives_failures(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the launcher turned on fault tolerance (`mpirun --with-ft ulfm`).

    The MPI library answers its fault-tolerance calls even where it is off, so only the launcher is asked.
    """
    return environment.get("OMPI_MCA_mpi_ft_enable", "").lower() in {"1", "true", "yes"}


def remove_session_of(pid: int) -> None:
    """Remove the folder that an Open MPI launcher of this process number has left when it was killed.

    A launcher that is given the same number again finds it there and refuses to start. `pid` is this process's own,
    or that of a child that has ended.
    """
    folder = Path(tempfile.gettempdir(), f"ompi.{pid}")
    if folder.is_dir() and folder.lstat().st_uid == os.geteuid():
        shutil.rmtree(folder, ignore_errors=True)  # it does not follow links
