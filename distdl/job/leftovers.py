"""Files that killed runs have left in shared memory and temporary folders: the next start finds and removes them.

Names and ages do not show whether a file is still used. So the owner of each file of ours keeps it locked (`flock`) as
long as necessary. The kernel releases the lock when the owner ends, for any reason.

For the files of the MPI library, each rank keeps a *register*: a locked file that lists the library's files that the
rank has mapped, and the launchers that the rank descends from. An `mpirun` removes the files of its ranks, so then a
rank removes its register at an ordinary exit. A listed file is removed once no living rank's register lists it; a
session folder once its launcher has ended. `distdl.mpirun` gives its launcher a register too, with the session folder.
Containers may share a folder: then the lock tells whether the owner of a register lives, and the number of a process
counts only where the register was written. In doubt a file stays (`docs/processes.md`, "Leftovers").
"""

import atexit
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fcntl import LOCK_EX, LOCK_NB, flock
from functools import cache
from pathlib import Path

from distdl.job.lifeline import LAUNCHERS, STEP_DAEMONS
from distdl.job.processes import Process, ancestors, here
from distdl.regular_files import read_regular

MEMORY = "distdl-memory-"
REGISTER = "distdl-rank-"
#: The segments of MPICH and of Open MPI; Open MPI's session folder, whose name holds its launcher's process number.
SEGMENT = re.compile(r"/.*/(mpich_shm_|sm_segment\.|vader_segment\.)[^/]+")
SESSION = re.compile(r"/.*/ompi\.(\d+)")
#: MPICH removes its own segments at an ordinary exit, with or without an `mpirun`.
TIDIED_BY_MPICH = "mpich_shm_"
#: The variable with the path of the launcher's register. Its ranks remove it at an ordinary exit.
OF_LAUNCHER = "DISTDL_LAUNCHER_REGISTER"
#: The number of a session folder that no process number gives.
MORE_THAN_ANY_PROCESS = 10**9


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
    text = json.dumps({"made": made, "launchers": [asdict(one) for one in launchers], "where": here()})
    by_library = all(Path(path).name.startswith(TIDIED_BY_MPICH) for path in made)
    tidied = by_library or any(one.name not in STEP_DAEMONS for one in launchers)
    for folder in folders:
        with suppress(OSError):  # a rank can run without a register; then no sweep finds its files
            handle, path = create_locked(folder, REGISTER)
            os.write(handle, text.encode())
            if tidied:
                for own in (path, os.environ.get(OF_LAUNCHER, "")):
                    if Path(own).name.startswith(REGISTER):
                        atexit.register(Path(own).unlink, missing_ok=True)
            return


def own_session(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for the launcher that this process becomes by an `exec`, after a sweep.

    The launcher inherits a locked register, which lists the session folder that it makes. If there is a folder of that
    name, of a launcher that may live, Open MPI would fail and remove it. So the launcher gets a folder of its own then.
    """
    environment, folder = dict(environment), Path(tempfile.gettempdir())
    sweep([Path("/dev/shm"), folder])  # noqa: S108  where ranks have their registers
    session = folder / f"ompi.{os.getpid()}"
    with suppress(OSError):  # then a later start removes nothing
        handle, register = create_locked(folder, REGISTER)
        os.set_inheritable(handle, True)
        _note_session(handle, session)
        others = [path for path in _own_files_in(folder) if path.name.startswith(REGISTER) and str(path) != register]
        if os.path.lexists(session) or any(str(session) in _read(path).made for path in others):
            session = folder / f"ompi.{MORE_THAN_ANY_PROCESS + secrets.randbelow(MORE_THAN_ANY_PROCESS)}"
            session.mkdir(0o700)
            _note_session(handle, session)
            environment["TMPDIR"] = str(session)
        else:
            environment[OF_LAUNCHER] = register
    return environment


def _note_session(register: int, session: Path) -> None:
    os.ftruncate(register, 0)
    os.pwrite(register, json.dumps({"made": [str(session)], "launchers": [], "where": here()}).encode(), 0)


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
                living |= set() if orphaned else set(_read(path).made)
            elif orphaned:
                path.unlink()
                removed.append(str(path))
    for path in dead:
        with suppress(OSError), _orphaned(path) as orphaned:
            if not orphaned:
                continue
            register = _read(path)
            remaining = [made for made in register.made if not _remove(made, living, register, removed)]
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


@dataclass(frozen=True)
class _Register:
    made: list[str]
    launchers: list[Process]
    where: str
    """See `here`; empty in the register of an earlier version."""

    def may_be_used(self, launcher: int) -> bool:
        """Return whether the launcher with this number may live, if it is one of these."""
        return any(one.pid == launcher and (self.where != here() or one.lives) for one in self.launchers)

    @property
    def is_of_another_machine(self) -> bool:
        """Whether another machine, or this one before its last start, has written it: the lock tells nothing."""
        return self.where.split(" ")[0] != here().split(" ")[0]


def _read(path: Path) -> _Register:
    """Return what a register lists; nothing if its owner was killed while it wrote."""
    try:
        written = json.loads(read_regular(path))
        return _Register(written["made"], [Process(**one) for one in written["launchers"]], written.get("where", ""))
    except (OSError, ValueError, LookupError, TypeError):
        return _Register([], [], "")


def _remove(path: str, living: Set[str], register: _Register, removed: list[str]) -> bool:
    """Remove a segment or session folder unless a living process uses it; return whether it no longer exists."""
    session = SESSION.fullmatch(path)
    in_use = register.is_of_another_machine or (session is not None and register.may_be_used(int(session[1])))
    in_use |= session is None and SEGMENT.fullmatch(path) is None  # another file: never remove it
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
