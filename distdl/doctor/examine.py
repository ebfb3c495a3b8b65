"""The whole examination, in the order of its stages: this rank alone, then MPI, then all ranks together."""

import time
from dataclasses import dataclass
from pathlib import Path

from distdl.doctor.examination import Facts, of_libraries
from distdl.doctor.supervisor import Tell


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """The flags of the command."""

    ranks: int | None = None
    """Number of ranks that the job should have; without it, the number that the launcher tells."""
    run_dir: Path = Path("runs")
    """The run folder of the training to come: checked for space, locks, and access from all hosts."""
    timeout: int = 120
    """End with a message if a rank waits for this many seconds, for example for another rank."""
    json: bool = False
    """Print the findings as one line of JSON."""


def examine(options: DoctorOptions, own: Facts, tell: Tell, local_rank: int) -> None:
    """Examine this rank and the job, and tell the facts. Collective. Raises `DistdlError` and `ImportError`."""
    tell.stage("Python's libraries to load")
    from distdl.doctor import meeting  # noqa: PLC0415  it imports NumPy
    from distdl.parallel import world  # noqa: PLC0415

    own = own | _library() | of_libraries(fingerprint=local_rank == 0)
    tell.facts(ranks=[own])
    others = own["expected"] - 1
    tell.stage(f"{others} other rank{'s' if others > 1 else ''} to start MPI" if others else "MPI to start")
    communicator = world()
    host = communicator.host()
    size, rank = communicator.size, communicator.rank

    tell.stage(f"the records of {size} ranks")
    leader = host.bcast_json(rank)
    communicator.barrier()
    ranks = meeting.gathered(communicator, own | {"rank": rank, "leader": leader, "clock": time.time()})
    tell.facts(size=size, is_first=rank == 0, survives_failures=communicator.survives_failures)
    if rank == 0:
        tell.facts(ranks=ranks)

    tell.stage(f"the {host.size} ranks of {own['host']}")
    found: Facts = {"memory_access": meeting.memory_access(host), "within": None}
    if host.size > 1:
        found["within"] = meeting.seconds_of_reductions(host)
    between = None
    if host.size < size:
        tell.stage("a reduction between the hosts")
        between = meeting.seconds_of_reductions(communicator)
    tell.stage(f"the disk of {options.run_dir}")
    folder, found["sees_folder"] = meeting.check_folder(communicator, host, options.run_dir)
    of_ranks = meeting.gathered(communicator, found)
    if rank == 0:
        tell.facts(of_ranks=of_ranks, between=between, folder=folder)


def _library() -> Facts:
    """Return the name of the MPI library that mpi4py finds; MPI need not start for that."""
    try:
        from distdl.parallel import mpi  # noqa: PLC0415  some hosts have no MPI library
    except (ImportError, RuntimeError) as error:
        return {"library": None, "no_library": str(error).splitlines()[0] if str(error) else type(error).__name__}
    return {"library": mpi.library_name()}
