"""The limits of a process (``ulimit``) and of its container: which one is behind an error, and how to raise it."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distdl.errors import DistdlError, UserError
from distdl.host_memory import available_to_this_process
from distdl.job.lifeline import LAUNCHERS
from distdl.job.processes import ancestors, look_at

#: Python and NumPy start with less address space than this, but OpenBLAS ends the process without an exception.
LEAST_ADDRESS_SPACE = 170_000 * 1024
#: The threads and helper processes of a rank, at most at a time (measured: two ranks need 18 to 20).
THREADS_PER_RANK = 9
#: With a limit that is larger by so many, nobody counts.
MANY_THREADS = 2000
#: MPI libraries keep shared memory in files, which count (measured: 16 MB for a rank of Open MPI).
LEAST_FILE_SIZE = 64_000 * 1024
#: The address space of a thread, with its stack and its own memory pool; of the buffer of OpenBLAS (measured: 33 MB).
BYTES_OF_A_THREAD, BYTES_OF_BLAS = 80_000_000, 36_000_000
#: What the loader of shared libraries says.
NO_ROOM_FOR_LIBRARY = ("failed to map segment", "cannot allocate memory", "cannot map zero-fill pages")


@dataclass(frozen=True)
class Limit:
    """A limit with the letter of ``ulimit`` and the bytes or pieces of its unit."""

    number: int
    letter: str
    what: str
    unit: int = 1
    unit_name: str = ""

    @property
    def found(self) -> str | None:
        """The limit and how to raise it; None if there is none."""
        soft, hard = resource.getrlimit(self.number)
        if soft == resource.RLIM_INFINITY:
            return None
        now = soft // self.unit
        if hard == resource.RLIM_INFINITY:
            remedy = f"raise it with ulimit -{self.letter} unlimited"
        elif hard > soft:
            remedy = f"raise it with ulimit -{self.letter} {hard // self.unit}, or further as root"
        else:
            remedy = (
                "it is a hard limit, so raise it where it is set: in the batch script, the container or limits.conf"
            )
        return f"the limit of {self.what} is too small (ulimit -{self.letter} is {now}{self.unit_name}): {remedy}"


MEMORY = (
    Limit(resource.RLIMIT_AS, "v", "address space", 1024, " kB"),
    Limit(resource.RLIMIT_DATA, "d", "data", 1024, " kB"),
)
PROCESSES = (Limit(resource.RLIMIT_NPROC, "u", "processes and threads of this user"),)
FILES = (Limit(resource.RLIMIT_NOFILE, "n", "open files"),)
FILE_SIZE = (Limit(resource.RLIMIT_FSIZE, "f", "the size of a file", 1024, " kB"),)


def explained(error: BaseException) -> BaseException:
    """Return a `UserError` that names the limit behind an error; the error itself if none is known."""
    if isinstance(error, DistdlError):
        return error
    for one in _chain(error):
        for limit in _limits_behind(one):
            if limit.found is not None:
                return UserError(f"{limit.found} ({_short(error)})")
        if _is_of_processes(one) and (pids := _pids_of_container()) is not None:
            return UserError(
                f"the limit of processes and threads of this container is too small (pids.max is {pids}): raise it, "
                f"with Docker and Podman by --pids-limit ({_short(error)})"
            )
    return error


def check_address_space() -> None:
    """Raise `UserError` if NumPy would end this process, without an exception, for lack of address space."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft < LEAST_ADDRESS_SPACE:
        raise UserError(f"{MEMORY[0].found}; expected at least {LEAST_ADDRESS_SPACE // 1024} kB")


def check_room_for_blas() -> None:
    """Raise `UserError` if the first product would end this process, without an exception, for lack of memory."""
    room = available_to_this_process()
    if room < BYTES_OF_BLAS:
        found = next(limit.found for limit in MEMORY if limit.found is not None)
        raise UserError(
            f"{found}; {room / 1e6:.0f} MB are left, and products of matrices need {BYTES_OF_BLAS / 1e6:.0f}"
        )


def why_too_few_processes(ranks: int) -> str | None:
    """Return why this number of ranks cannot start on this host, with the remedy; None if they can or nobody knows.

    MPI ends a rank without an exception if it cannot start a thread.
    """
    (limit,) = PROCESSES
    soft, _ = resource.getrlimit(limit.number)
    needed = ranks * THREADS_PER_RANK
    if os.geteuid() == 0 or soft == resource.RLIM_INFINITY or soft > needed + MANY_THREADS:
        return None
    used = _threads_of_others()
    if used + needed <= soft:
        return None
    return f"{limit.found}; expected at least {used + needed}, for {ranks} ranks and {used} other threads of this user"


def why_files_are_too_small() -> str | None:
    """Return why MPI cannot make its files of shared memory, with the remedy; None if it can.

    MPICH ends a rank by its own messages if it cannot.
    """
    (limit,) = FILE_SIZE
    soft, _ = resource.getrlimit(limit.number)
    if soft == resource.RLIM_INFINITY or soft >= LEAST_FILE_SIZE:
        return None
    return f"{limit.found}; several ranks need at least {LEAST_FILE_SIZE // 1024} kB"


def _threads_of_others(proc: Path = Path("/proc")) -> int:
    """Return the number of this user's threads on this host, without the processes below the launcher."""
    launcher = next((process.pid for process in ancestors() if process.name in LAUNCHERS), os.getpid())
    below, count = {launcher}, 0
    for folder in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        with suppress(OSError):
            if folder.stat().st_uid != os.geteuid():
                continue
            process = look_at(int(folder.name))
            if process is None or process.parent in below or process.pid in below:
                below.add(int(folder.name))
            else:
                count += sum(1 for _ in (folder / "task").iterdir())
    return count


def _chain(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__


def _limits_behind(error: BaseException) -> tuple[Limit, ...]:
    """Return the limits that can be the cause of an error."""
    number = error.errno if isinstance(error, OSError) else None
    if _is_of_processes(error):
        return PROCESSES if available_to_this_process() > BYTES_OF_A_THREAD else MEMORY
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return MEMORY
    if any(words in str(error).lower() for words in NO_ROOM_FOR_LIBRARY):
        return MEMORY
    if number == errno.EFBIG:
        return FILE_SIZE
    return FILES if number == errno.EMFILE else ()


def _is_of_processes(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return "can't start new thread" in str(error)
    return isinstance(error, BlockingIOError) and error.errno == errno.EAGAIN


def _pids_of_container() -> int | None:
    """Return the limit of processes of this control group (version 2, as containers see it), if there is one."""
    try:
        text = Path("/sys/fs/cgroup/pids.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
