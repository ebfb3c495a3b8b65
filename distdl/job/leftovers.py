"""Files that killed runs have left in shared memory and temporary folders: the next start finds and removes them.

Names and ages do not show whether a file is still used. So the owner of each file of ours keeps it locked (`flock`) as
long as necessary. The kernel releases the lock when the owner ends, for any reason.

For the files of the MPI library, each rank keeps a *register*: a locked file that lists the library's files that the
rank has mapped, and the launchers that the rank descends from. An `mpirun` removes the files of its ranks, so then a
rank removes its register at an ordinary exit. A listed file is removed once no living rank's register lists it; a
session folder once its launcher has ended. Nothing else is touched (`docs/processes.md`, "Leftovers").
"""

import atexit
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict
from fcntl import LOCK_EX, LOCK_NB, flock
from functools import cache
from pathlib import Path

from distdl.job.lifeline import LAUNCHERS, STEP_DAEMONS
from distdl.job.processes import Process, ancestors

MEMORY = "distdl-memory-"
REGISTER = "distdl-rank-"
#: The segments of MPICH and of Open MPI; Open MPI's session folder, whose name holds its launcher's process number.
SEGMENT = re.compile(r"/.*/(mpich_shm_|sm_segment\.|vader_segment\.)[^/]+")
SESSION = re.compile(r"/.*/ompi\.(\d+)")
#: MPICH removes its own segments at an ordinary exit, with or without an `mpirun`.
TIDIED_BY_MPICH = "mpich_shm_"


def create_locked(folder: Path, prefix: str) -> tuple[int, str]:
    """Create a locked file and return its handle and path; no sweep removes it while the handle is open.

    Raises `OSError` if the file cannot be created.
    """
    while True:
        handle, path = tempfile.mkstemp(prefix=prefix, dir=folder)
        try:
            flock(handle, LOCK_EX)
            if os.fstat(handle).st_nlink:
                return handle, path
        except BaseException:
            Path(path).unlink(missing_ok=True)
            os.close(handle)
            raise
        os.close(handle)  # a sweep removed it before it was locked: create another


@cache
def register(folders: tuple[Path, ...]) -> None:
    """Write this rank's register into the first of `folders` in which that succeeds."""
    made = sorted(made_by_mpi(Path("/proc/self/maps").read_text(errors="replace"), folders))
    launchers = [one for one in ancestors() if one.name in LAUNCHERS]
    text = json.dumps({"made": made, "launchers": [asdict(one) for one in launchers]})
    by_library = all(Path(path).name.startswith(TIDIED_BY_MPICH) for path in made)
    tidied = by_library or any(one.name not in STEP_DAEMONS for one in launchers)
    for folder in folders:
        with suppress(OSError):  # a rank can run without a register; then no sweep finds its files
            handle, path = create_locked(folder, REGISTER)
            os.write(handle, text.encode())
            if tidied:
                atexit.register(Path(path).unlink, missing_ok=True)
            return


def made_by_mpi(maps: str, folders: Sequence[Path]) -> set[str]:
    """Return MPI's segments and session folders in `folders`, from the text of ``/proc/self/maps``."""
    found = set()
    for line in maps.splitlines():
        path = (line.split(maxsplit=5) + [""] * 6)[5]
        session = SESSION.match(path)
        if session is not None and path[session.end() :].startswith("/"):
            found.add(session[0])
        elif SEGMENT.fullmatch(path) and not path.endswith(" (deleted)"):
            found.add(path)
    return {path for path in found if Path(path).parent in folders}


def sweep(folders: Iterable[Path]) -> list[str]:
    """Remove the files of this user's dead processes in `folders`, and the files they list; return the paths.

    If two processes sweep at once, each skips the files that the other has locked. The next sweep removes the rest.
    """
    removed: list[str] = []
    living: set[str] = set()
    dead: list[Path] = []
    for path in [path for folder in folders for path in _own_files_in(folder)]:
        with suppress(OSError), _orphaned(path) as orphaned:
            if path.name.startswith(REGISTER):
                dead += [path] if orphaned else []
                living |= set() if orphaned else set(_read(path)[0])
            elif orphaned:
                path.unlink()
                removed.append(str(path))
    for path in dead:
        with suppress(OSError), _orphaned(path) as orphaned:
            if not orphaned:
                continue
            listed, launchers = _read(path)
            remaining = [made for made in listed if not _remove(made, living, launchers, removed)]
            if not remaining:
                path.unlink()
                removed.append(str(path))
    return removed


def _own_files_in(folder: Path) -> list[Path]:
    """Return the files in `folder` that have one of our names and belong to this user."""
    found = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((MEMORY, REGISTER)) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                        found.append(Path(entry.path))
    return found


@contextmanager
def _orphaned(path: Path) -> Iterator[bool]:
    """Yield whether no process has locked the file; if so, lock it inside the ``with`` block."""
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            flock(handle, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield os.fstat(handle).st_nlink > 0
    finally:
        os.close(handle)


def _read(path: Path) -> tuple[list[str], list[Process]]:
    """Return the files and launchers that a register lists; nothing if its owner was killed while it wrote."""
    try:
        written = json.loads(path.read_bytes())
        return written["made"], [Process(**one) for one in written["launchers"]]
    except (ValueError, LookupError, TypeError):
        return [], []


def _remove(path: str, living: Set[str], launchers: Sequence[Process], removed: list[str]) -> bool:
    """Remove a segment or session folder unless a living process uses it; return whether it no longer exists."""
    session = SESSION.fullmatch(path)
    if session:
        in_use = any(one.pid == int(session[1]) and one.lives for one in launchers)
    else:
        in_use = SEGMENT.fullmatch(path) is None  # another file: never remove it
    try:
        found = Path(path).lstat()
        if in_use or path in living or found.st_uid != os.geteuid():
            return False
        if session and stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
        elif stat.S_ISREG(found.st_mode):
            Path(path).unlink()
        else:
            return False
        removed.append(path)
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True
