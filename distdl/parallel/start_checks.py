"""Around the start of MPI (docs/processes.md): checks of this host before it, and of all ranks together after it."""

import os
import threading
from contextlib import suppress
from typing import Any

from distdl.errors import HostError, UserError
from distdl.job import leftovers, limits, probes
from distdl.job.launched_by import (
    KIN_OF_MPICH,
    Launch,
    how_to_unset,
    launcher_is_missing,
    ranks_of_this_host,
    read_launch,
    variables_of,
)
from distdl.job.lifeline import pmi_is_gone
from distdl.job.lost_ranks import Ring
from distdl.job.streams import say_line
from distdl.parallel import shared
from distdl.parallel.agreement import together
from distdl.parallel.alike import check_same_access, check_same_program
from distdl.parallel.communicator import Communicator
from distdl.parallel.recovery import Survivors

#: The comparison of the ranks' programs takes milliseconds. A version of distdl without it never answers.
SECONDS_TO_COMPARE = 20.0


def prepare_for_mpi(launch: Launch, vendor: str) -> None:
    """Set the variables that MPI needs on this host.

    Raises `UserError` if the launcher is gone, and `HostError`, on every rank of a host, if its resources are short.
    """
    if pmi_is_gone():
        raise not_one_job(launch, "start it with mpirun")
    ranks = ranks_of_this_host()
    if few := limits.why_too_few_processes(ranks):
        raise HostError(few)
    if small := limits.why_files_are_too_small():
        raise HostError(small)
    os.environ.update(probes.variables_for_mpi())
    if vendor in KIN_OF_MPICH and probes.why_shared_memory_is_too_small(ranks):
        leftovers.sweep(shared.folders())
        if short := probes.why_shared_memory_is_too_small(ranks):
            raise HostError(short)


def checked(communicator: Communicator) -> Communicator:
    """Return the surviving ranks, with the same program and room to compute; raise `UserError` on all. Collective.

    From then on, the ranks watch each other (`job/lost_ranks.py`).
    """
    survivors = Survivors(communicator)
    late = threading.Timer(SECONDS_TO_COMPARE, _say_that_the_comparison_is_late)
    late.daemon = True
    with suppress(RuntimeError):  # too many threads
        late.start()
    survivors.run(check_same_program)
    survivors.run(check_same_access)
    survivors.run(lambda ranks: together(ranks, limits.check_room_for_blas))
    late.cancel()
    if survivors.communicator.size > 1:
        _form_ring(survivors)
    survivors.communicator.recovery_at_start = next(iter(survivors.recoveries), None)
    return survivors.communicator


def _form_ring(survivors: Survivors) -> None:
    from distdl.parallel import mpi  # noqa: PLC0415  some hosts have no MPI library

    ranks = survivors.communicator

    def exchange(value: Any) -> list[Any]:
        return survivors.run(lambda group: group.allgather_json(value))

    def meet() -> None:
        with suppress(Exception):  # at exit: the command has reported its errors
            if not mpi.is_over():
                ranks.barrier()

    Ring(ranks.world_ranks[ranks.rank], exchange, ranks.abort, None if ranks.survives_failures else meet)


def _say_that_the_comparison_is_late() -> None:
    if read_launch().local_rank == 0:
        say_line(
            f"host {os.uname().nodename} has waited {SECONDS_TO_COMPARE:g} s to compare the versions of distdl: a rank "
            "is stopped, or another host has an older version; install the same version on every host"
        )


def not_one_job(launch: Launch, why: str) -> UserError:
    """Return the error if the started processes are not one job, because of `why`."""
    if launcher_is_missing(launch):
        return UserError(
            f"{variables_of(launch)} say that {launch.by} started this process, but it is not above this process: if "
            f"they are left over from another job, {how_to_unset(launch)}; otherwise {why}"
        )
    return UserError(
        f"{launch.by} started {launch.size} separate processes instead of {launch.size} ranks of one job: {why}"
    )
