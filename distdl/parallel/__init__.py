"""What ranks do together: communicators, the canonical tree, dealing, the reduction, node-shared arrays."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings

from distdl.errors import DistdlError, UserError, one_line
from distdl.job import leftovers
from distdl.job.launcher import belong_together, read_launch
from distdl.job.lifeline import end_with_the_launcher
from distdl.job.streams import say
from distdl.parallel import shared
from distdl.parallel.agreement import die_of_the_host, exit_code_of, from_rank_0, guard, on_rank_0, report, together
from distdl.parallel.communicator import Communicator, CompletedRecovery, OneProcess, hosts
from distdl.parallel.dealing import deal, share
from distdl.parallel.recovery import Position, Survivors, commit, committed, recover, survive
from distdl.parallel.reduction import REDUCTIONS, Field, Layout, Record, Reduction
from distdl.parallel.shared import share_arrays
from distdl.parallel.tree import Shard, contiguous_shards

__all__ = [
    "REDUCTIONS",
    "Communicator",
    "CompletedRecovery",
    "Field",
    "Layout",
    "OneProcess",
    "Position",
    "Record",
    "Reduction",
    "Shard",
    "Survivors",
    "commit",
    "committed",
    "contiguous_shards",
    "deal",
    "die_of_the_host",
    "exit_code_of",
    "from_rank_0",
    "guard",
    "hosts",
    "on_rank_0",
    "recover",
    "report",
    "share",
    "share_arrays",
    "survive",
    "tell_the_others",
    "together",
    "world",
]

INSTALL = "pip install 'distdl-mpi[mpich]'"
#: What a rank has met after the world was made, rank 0 has most often met too, and may say within this time.
SECONDS_FOR_RANK_0 = 1.0

_world: Communicator | None = None


def world() -> Communicator:
    """Return the communicator of all ranks of this job: MPI under a launcher, else one process.

    From then on an exception that nobody catches on any rank ends the whole job, and the end of the launcher ends
    this process. What killed runs have left on this machine is removed. Raises `UserError` where the
    launcher started several processes that MPI does not see as one job: the wrong ``srun --mpi=``, the
    `mpirun` of another MPI, or no mpi4py at all; and, on all ranks, the error of one that has failed before it came
    here (`tell_the_others`). Collective.
    """
    global _world  # noqa: PLW0603  there is one
    _world = _make_world()
    return _world


def tell_the_others(error: DistdlError) -> None:
    """See to it that no rank waits for this one, which leaves with an error that it may have met alone.

    Before the world is made it is made for that: every other rank, when it comes there, raises this error, or that of a
    lower rank. Later the job is ended. Raises `UserError` where no world can be made.
    """
    if _world is None:
        failure = error if isinstance(error, UserError) else UserError(str(error))
        try:
            _make_world(failure)
        except UserError as told:
            if not told.agreed:
                raise
    elif _world.size > 1:
        if _world.rank > 0:
            time.sleep(SECONDS_FOR_RANK_0)
            report(error, _world.rank)
        _world.abort(error.exit_code)


def _make_world(failure: UserError | None = None) -> Communicator:
    launch = read_launch()
    if launch.by is None:
        leftovers.sweep(shared.folders())
        missing = importlib.util.find_spec("mpi4py") is None
        return OneProcess("one process" + (f"; mpi4py is not installed: {INSTALL} for more" if missing else ""))
    end_with_the_launcher()
    try:
        from distdl.parallel import mpi  # noqa: PLC0415  not every machine has an MPI library
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if launch.size == 1:
            return OneProcess(f"one process, without MPI ({reason})")
        raise _not_one_job(
            launch.by,
            launch.size,
            f"mpi4py finds no MPI library here ({reason}): {INSTALL} in this environment",
        ) from error
    if not belong_together(launch, mpi.vendor()):
        if launch.size == 1:
            return OneProcess(f"one process, without MPI ({mpi.vendor()} cannot start under {launch.by})")
        raise _not_one_job(
            launch.by,
            launch.size,
            f"this Python has {mpi.library_name()}: use the mpirun of that library, as python -m distdl.mpirun does",
        )
    with warnings.catch_warnings():
        # The mpirun of another MPI: we say so below, once and not once a rank, and only where it matters.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        communicator = mpi.world_of_mpi(failure)
    leftovers.register(shared.folders())
    if launch.local_rank == 0:
        leftovers.sweep(shared.folders())
    if mpi.ranks_started() == 1 and launch.size > 1:
        raise _not_one_job(
            launch.by,
            launch.size,
            f"each sees {communicator.description} with 1 rank: use the mpirun of that library, "
            "or srun with --mpi=pmi2 for MPICH and --mpi=pmix for Open MPI",
        )
    _end_the_job_on_uncaught_exceptions(communicator)
    return communicator


def _not_one_job(by: str, size: int, why: str) -> UserError:
    return UserError(f"{by} started {size} separate processes instead of {size} ranks of one job: {why}")


def _end_the_job_on_uncaught_exceptions(communicator: Communicator) -> None:
    if communicator.size == 1:
        return

    def end_the_job(_kind: object, error: BaseException, _trace: object) -> None:
        if not getattr(error, "agreed", False):
            report(error, communicator.rank)
            communicator.abort(exit_code_of(error))
        if communicator.rank == 0:
            label = getattr(error, "label", "error: ")
            say(f"distdl: {label}{one_line(str(error))}\n")
        raise SystemExit(exit_code_of(error))  # all ranks are leaving: an ordinary exit, with a code of our choice

    sys.excepthook = end_the_job
