"""What killed runs have left in shared memory and in temporary folders, and how the next start finds and removes it.

A killed process removes nothing: a file of ours that not every rank had mapped yet (`shared.py`), the MPI library's
own segments, Open MPI's session folder. Names and ages do not tell whether a file is still used, so each of ours is
*held*: locked (`flock`) by its owner as long as that needs it. The kernel lets go of the lock when the owner ends,
however it ends; a file that can be locked has no owner any more.

For what the MPI library makes, each rank holds a register: a file that lists what of it the rank has mapped, and the
launchers it descends from. It is removed at an ordinary end where there is an `mpirun`, which removes what its ranks
have made; without one Open MPI leaves its segments, and the register stays to tell of them. What the register of a dead
rank lists is removed once no living rank's register lists it (a session folder: once its launcher is gone), and then
the register itself.

Nothing else is touched: neither what other programs leave, nor what belongs to another user, nor anything on hosts on
which no run is started.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from functools import cache
from pathlib import Path

from distdl.job.lifeline import LAUNCHERS, STEP_DAEMONS
from distdl.job.processes import Process, ancestors

MEMORY = "distdl-memory-"
REGISTER = "distdl-rank-"
#: The segments of MPICH and of Open MPI, and Open MPI's session folder, which is named after its launcher's number.
SEGMENT = re.compile(r"/.*/(mpich_shm_|sm_segment\.|vader_segment\.)[^/]+")
SESSION = re.compile(r"/.*/ompi\.(\d+)")
#: MPICH removes its own segments at an ordinary end, whoever has started it.
TIDIED_BY_MPICH = "mpich_shm_"


def create_locked(folder: Path, prefix: str) -> tuple[int, str]:
    """Create a file that nobody sweeps as long as the returned handle is open; return that and the path.

    Raises `OSError` where the folder has none of it.
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
        os.close(handle)  # swept before it was locked: make another


@cache
def register(folders: tuple[Path, ...]) -> None:
    """List what the MPI library has made for this rank in a file in the first of `folders` that takes it."""
    made = sorted(made_by_mpi(Path("/proc/self/maps").read_text(errors="replace"), folders))
    launchers = [one for one in ancestors() if one.name in LAUNCHERS]
    text = json.dumps({"made": made, "launchers": [asdict(one) for one in launchers]})
    by_library = all(Path(path).name.startswith(TIDIED_BY_MPICH) for path in made)
    tidied = by_library or any(one.name not in STEP_DAEMONS for one in launchers)
    for folder in folders:
        with suppress(OSError):  # a rank without a register runs as well; what it leaves is not found
            handle, path = create_locked(folder, REGISTER)
            os.write(handle, text.encode())
            if tidied:
                atexit.register(Path(path).unlink, missing_ok=True)
            return


def made_by_mpi(maps: str, folders: Sequence[Path]) -> set[str]:
    """Return the paths of MPI's segments and session folders in `folders` that ``/proc/self/maps`` shows."""
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
    """Remove what dead processes of this user have left in `folders` and what it lists, and return the paths.

    Of two that sweep at once each leaves alone what the other holds; what both leave is for the next.
    """
    removed: list[str] = []
    living: set[str] = set()
    dead: list[Path] = []
    for path in [path for folder in folders for path in _ours_in(folder)]:
        with suppress(OSError), _orphaned(path) as orphaned:
            if path.name.startswith(REGISTER):
                dead += [path] if orphaned else []
                living |= set() if orphaned else set(_read(path).made)
            elif orphaned:
                path.unlink()
                removed.append(str(path))
    for path in dead:
        with suppress(OSError), _orphaned(path) as orphaned:
            if not orphaned:
                continue
            listed = _read(path)
            still_there = [made for made in listed.made if not _gone(made, living, listed, removed)]
            if not still_there:
                path.unlink()
                removed.append(str(path))
    return removed


def _ours_in(folder: Path) -> list[Path]:
    """Return the files in `folder` that have a name of ours and belong to this user."""
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
    """Say whether nobody holds the file; if so, it is held inside of the block."""
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


@dataclass(frozen=True)
class _Register:
    made: Sequence[str] = ()
    launchers: Sequence[Process] = ()


def _read(path: Path) -> _Register:
    """Return what a register lists: nothing where its owner was killed before it had written all of it."""
    try:
        written = json.loads(path.read_bytes())
        return _Register(written["made"], [Process(**one) for one in written["launchers"]])
    except (ValueError, LookupError, TypeError):
        return _Register()


def _gone(path: str, living: Set[str], listed: _Register, removed: list[str]) -> bool:
    """Remove a segment or session folder that nothing alive uses, and say whether it is gone."""
    session = SESSION.fullmatch(path)
    if session:
        in_use = any(one.pid == int(session[1]) and one.lives for one in listed.launchers)
    else:
        in_use = SEGMENT.fullmatch(path) is None  # not by us; it is none of ours to remove
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
