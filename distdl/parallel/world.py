"""The world: all ranks of this job under a launcher, otherwise one process.

An error that only one rank has must not leave the other ranks waiting. `world` and `tell_the_others` handle such
errors before and after MPI starts.
"""

import importlib.util
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from distdl.errors import DistdlError, HostError, UserError
from distdl.job import leftovers, limits
from distdl.job.launched_by import Launch, compatible, print_for_all_ranks, read_launch
from distdl.job.lifeline import end_with_the_launcher
from distdl.job.streams import say_line
from distdl.parallel import shared
from distdl.parallel.agreement import end_the_job, exit_code_of
from distdl.parallel.communicator import Communicator, OneProcess
from distdl.parallel.start_checks import checked, not_one_job, prepare_for_mpi

INSTALL = "pip install 'distdl-mpi[mpich]'"
#: Rank 0 usually has the same error. It gets this time to print it before another rank does.
SECONDS_FOR_RANK_0 = 1.0

_world: Communicator | None = None
#: This process, while it runs a callback.
_alone: OneProcess | None = None


def world() -> Communicator:
    """Return the communicator of all ranks of this job: MPI under a launcher, otherwise one process. Collective.

    The first call also removes the files of killed runs on this host. It ties this process to its launcher: if the
    launcher ends, the process ends. From then on an uncaught exception on any rank ends the whole job.

    Raises `UserError` if MPI does not see the started processes as one job. The cause is a wrong ``srun --mpi=``, the
    `mpirun` of another MPI, or a missing mpi4py. Raises the error of `tell_the_others` on all ranks if one rank
    failed before it came here.
    """
    global _world  # noqa: PLW0603  there is one
    if _alone is not None:
        return _alone
    _world = _make_world()
    return _world


@contextmanager
def alone() -> Iterator[None]:
    """Meanwhile, let `world` and `present` return this process alone: it runs a callback, and the other ranks wait."""
    global _alone  # noqa: PLW0603  of this process
    before, _alone = _alone, OneProcess("one process, in a callback")
    try:
        yield
    finally:
        _alone = before


def present(communicator: Communicator) -> Communicator:
    """Return the communicator, or within `alone` this process: the other ranks would not answer."""
    return communicator if _alone is None else _alone


def tell_the_others(error: DistdlError) -> None:
    """Report an error that perhaps only this rank has: no other rank may wait for this one.

    Before the world exists, this function creates it: every other rank then raises this error, or that of a lower
    rank, in its call of `world`. Later it ends the job. Raises `UserError` if no world can be created.
    """
    if _world is None:
        failure = error if isinstance(error, UserError) else UserError(str(error))
        try:
            _make_world(failure)
        except UserError as raised:
            if not raised.agreed:
                raise
    elif _world.size > 1:
        if _world.rank == 0:
            _world.abort(error.exit_code)  # the command has printed the error
        time.sleep(SECONDS_FOR_RANK_0)
        end_the_job(_world, error)


def _make_world(failure: UserError | None = None) -> Communicator:
    launch = read_launch()
    if launch.by is None:
        leftovers.sweep(shared.folders())
        missing = importlib.util.find_spec("mpi4py") is None
        return OneProcess("one process" + (f"; mpi4py is not installed: {INSTALL} for more" if missing else ""))
    end_with_the_launcher()
    try:
        from distdl.parallel import mpi  # noqa: PLC0415  some hosts have no MPI library
    except (ImportError, RuntimeError) as error:
        return _without_mpi(launch, error)
    if not compatible(launch, mpi.vendor()):
        if launch.size == 1:
            return OneProcess(f"one process, without MPI ({mpi.vendor()} cannot start under {launch.by})")
        raise not_one_job(
            launch,
            f"this Python has {mpi.library_name()}: use the mpirun of that library, as python -m distdl.mpirun does",
        )
    prepare_for_mpi(launch, mpi.vendor())
    with warnings.catch_warnings():
        # mpi4py warns about the mpirun of another MPI on each rank. We report it once, below, and only if it matters.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        communicator: Communicator = mpi.world_of_mpi(failure)
    leftovers.register(shared.folders())
    if launch.local_rank == 0:
        leftovers.sweep(shared.folders())
    if mpi.ranks_started() == 1 and launch.size > 1:
        raise not_one_job(
            launch,
            f"each sees {communicator.description} with 1 rank: use the mpirun of that library, "
            "or srun with --mpi=pmi2 for MPICH and --mpi=pmix for Open MPI",
        )
    if communicator.rank == 0:
        print_for_all_ranks()  # the launcher's variables may tell another rank
    if _world is None:
        communicator = checked(communicator)
    _end_the_job_on_uncaught_exceptions(communicator)
    return communicator


def _without_mpi(launch: Launch, error: Exception) -> Communicator:
    """Return one process if MPI cannot be imported; raise `UserError` if the launcher started several ranks."""
    if (reached := limits.explained(error)) is not error:
        raise HostError(str(reached)) from error
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if launch.size == 1:
        return OneProcess(f"one process, without MPI ({reason})")
    why = f"mpi4py finds no MPI library here ({reason}): {INSTALL} in this environment"
    raise not_one_job(launch, why) from error


def _end_the_job_on_uncaught_exceptions(communicator: Communicator) -> None:
    if communicator.size == 1:
        return

    def hook(_kind: object, error: BaseException, _trace: object) -> None:
        if not getattr(error, "agreed", False):
            end_the_job(communicator, error)
        if communicator.rank == 0:
            say_line(f"{getattr(error, 'label', 'error: ')}{error}")
        raise SystemExit(exit_code_of(error))  # every rank exits with this code; no abort is necessary

    sys.excepthook = hook
