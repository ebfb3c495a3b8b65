"""Errors that all ranks share: all ranks raise, or none does (docs/exit-codes.md).

Work that can fail on one rank runs inside `together`; any other exception ends the job (`guard`). If a rank is lost
while the ranks exchange an error, only some of them may have received it. Then no rank raises that error.
"""

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from distdl import errors
from distdl.job.limits import explained
from distdl.job.streams import say
from distdl.parallel.communicator import Communicator
from distdl.parallel.recovery import commit

T = TypeVar("T")


def together(communicator: Communicator, work: Callable[[], T]) -> T:
    """Call `work` on every rank and return its result. Collective.

    If it raises a `UserError` on any rank, all ranks raise the error of the lowest such rank.
    For work of rank 0 alone use `on_rank_0` or `from_rank_0`.
    """
    failure: list[str] | None = None
    try:
        result = work()
    except errors.UserError as error:
        failure = [type(error).__name__, str(error)]
    failures = communicator.allgather_json(failure)
    commit(communicator)
    for found in failures:
        if found is not None:
            raised: errors.UserError = getattr(errors, found[0], errors.UserError)(found[1])
            raised.agreed = True
            raise raised
    return result


def on_rank_0(communicator: Communicator, work: Callable[[], T]) -> T | None:
    """Call `work` on rank 0 and return its result there, None elsewhere. Collective.

    If `work` raises a `UserError`, all ranks raise it. `from_rank_0` sends the result to all ranks.
    """
    return together(communicator, lambda: work() if communicator.rank == 0 else None)


def from_rank_0(communicator: Communicator, work: Callable[[], T]) -> T:
    """Call `work` on rank 0 and return its result, a plain JSON value, on all ranks. Collective.

    If `work` raises a `UserError`, all ranks raise it.
    """
    result: T = communicator.bcast_json(on_rank_0(communicator, work))
    return result


@contextmanager
def guard(communicator: Communicator) -> Iterator[None]:
    """End the whole job at once if the body raises an exception that the other ranks do not raise.

    Agreed errors pass through, and so does every exception in a world of one rank.
    """
    try:
        yield
    except BaseException as error:
        if communicator.size == 1 or getattr(error, "agreed", False):
            raise
        end_the_job(communicator, error)


def end_the_job(communicator: Communicator, error: BaseException) -> NoReturn:
    """Print the error with this rank's number, and end every process of the job with the error's exit code."""
    print_error(error := explained(error), communicator.rank)
    communicator.abort(exit_code_of(error))


def end_rank_after_host_fault(communicator: Communicator, error: BaseException) -> None:
    """End this rank after a fault of its host alone, such as a lack of memory; return if the others cannot continue.

    The rank ends by a signal: the launcher treats a signal as a lost rank, and any other end as a defect.
    """
    if communicator.survives_failures and communicator.size > 1:
        print_error(explained(error), communicator.world_ranks[communicator.rank])
        os.kill(os.getpid(), signal.SIGKILL)


def print_error(error: BaseException, rank: int) -> None:
    """Print the error to the error stream in one piece; each line starts with the rank."""
    if isinstance(error, errors.DistdlError | KeyboardInterrupt | SystemExit):
        lines = [f"{type(error).__name__}: {error}" if str(error) else type(error).__name__]
    else:
        lines = "".join(traceback.format_exception(error)).splitlines()
    say("".join(f"[rank {rank}] {line}\n" for line in lines))


def exit_code_of(error: BaseException) -> int:
    """Return the exit code for an exception that ends the job; never 0."""
    if isinstance(error, errors.DistdlError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return errors.EXIT_INTERRUPTED
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code:
        return error.code
    return errors.EXIT_DEFECT
