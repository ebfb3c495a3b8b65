"""Errors that all ranks share: either all raise, or none does.

A rank that raises alone leaves the others waiting for ever in their next collective call. So work that can
fail on one rank only is done `together`, and whatever else is raised ends the job: that is what `guard` does.
`PeerLost` is not among them: it passes through `together`, to whoever can go on without the rank that was lost, and
an error that some ranks have heard of and others have not, because one was lost just then, is raised on none.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from distdl import errors
from distdl.job.streams import say
from distdl.parallel.communicator import Communicator
from distdl.parallel.recovery import commit

T = TypeVar("T")


def together(communicator: Communicator, work: Callable[[], T]) -> T:
    """Do `work` on every rank; if it raises a `UserError` on any, raise that of the lowest such rank on all.

    For work of rank 0 alone use `on_rank_0` or `from_rank_0`. Collective.
    """
    failure: list[str] | None = None
    try:
        result = work()
    except errors.UserError as error:
        failure = [type(error).__name__, str(error)]
    everyone = communicator.allgather_json(failure)
    commit(communicator)
    for reported in everyone:
        if reported is not None:
            raised: errors.UserError = getattr(errors, reported[0], errors.UserError)(reported[1])
            raised.agreed = True
            raise raised
    return result


def on_rank_0(communicator: Communicator, work: Callable[[], T]) -> T | None:
    """Do `work` on rank 0 and return its result there, None elsewhere; raise its `UserError` on all ranks. Collective.

    The result stays on rank 0. `from_rank_0` sends it to all ranks.
    """
    return together(communicator, lambda: work() if communicator.rank == 0 else None)


def from_rank_0(communicator: Communicator, work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return its result, a plain JSON value, on all ranks. Collective.

    If `work` raises a `UserError`, all ranks raise it.
    """
    result: T = communicator.bcast_json(on_rank_0(communicator, work))
    return result


@contextmanager
def guard(communicator: Communicator) -> Iterator[None]:
    """End the whole job at once if the code inside raises on this rank what the others do not raise too.

    In a world of one rank, and for errors that were agreed, the exception passes as it is.
    """
    try:
        yield
    except BaseException as error:
        if communicator.size == 1 or getattr(error, "agreed", False):
            raise
        report(error, communicator.rank)
        communicator.abort(exit_code_of(error))


def die_of_the_host(communicator: Communicator, error: BaseException) -> None:
    """Die of a fault of this host alone, such as a lack of memory, where the other ranks go on; else return.

    The launcher takes a signal for the loss of a rank, and any other end for a defect of the program.
    """
    if communicator.survives_failures and communicator.size > 1:
        report(error, communicator.world_ranks[communicator.rank])
        os.kill(os.getpid(), signal.SIGKILL)


def report(error: BaseException, rank: int) -> None:
    """Print what was raised to the error stream, each line with the rank in front, in one piece."""
    if isinstance(error, errors.DistdlError | KeyboardInterrupt | SystemExit):
        lines = [f"{type(error).__name__}: {error}" if str(error) else type(error).__name__]
    else:
        lines = "".join(traceback.format_exception(error)).splitlines()
    say("".join(f"[rank {rank}] {line}\n" for line in lines))


def exit_code_of(error: BaseException) -> int:
    """Return the exit code that an exception stands for; never 0, since the job did not end as it should."""
    if isinstance(error, errors.DistdlError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return errors.EXIT_INTERRUPTED
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code:
        return error.code
    return errors.EXIT_DEFECT
