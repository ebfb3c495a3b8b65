"""The lock of a run folder: only one run at a time may write there. `--lock` chooses one of two ways.

- ``flock``: the kernel locks the file ``lock`` until its owner ends, for any reason. Only users who may write to the
  file can open it. So nobody who can only read the folder holds the lock.
- ``link``, for file systems that refuse flock: the file ``owner`` names the owner's host and process. A hard link
  creates it, so one process alone succeeds, also over NFS. If its owner was killed, the file stays. A start on the same
  host removes it. On another host nobody can know, so the user decides.

Each way also respects the other. Imports neither NumPy nor MPI.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from distdl.errors import UserError, one_line
from distdl.job.processes import Process, here, look_at
from distdl.json_files import fits
from distdl.regular_files import opened, read_regular

LOCK, OWNER = "lock", "owner"
#: The modes of both files before the umask. A reader of ``lock`` could lock it.
LOCK_MODE, OWNER_MODE = 0o620, 0o664
READABLE_BY_OTHERS = 0o044
#: The kernel may take this long to release the locks of a process that just died.
SECONDS_TO_RELEASE = 10.0
PAUSE_SECONDS = 0.01
#: After this time no process still removes the new ``owner`` in the belief that it is the old one.
SECONDS_TO_SETTLE = 0.05
LARGEST_OWNER_BYTES = 2**12
OWNER_VALUES = {"host": str, "where": str, "pid": int, "started": int, "since": str}


class InUseError(UserError):
    """Another process has locked the folder."""


class FolderLock:
    """A lock that lasts until it is closed."""

    def __init__(self, *release: Callable[[], None]) -> None:
        self._release = release

    @property
    def closed(self) -> bool:
        """Whether the folder is unlocked again."""
        return not self._release

    def close(self) -> None:
        """Unlock the folder."""
        release, self._release = self._release, ()
        for one in release:
            one()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock_folder(folder: Path, way: str = "flock", *, owner_died: bool = False) -> FolderLock:
    """Lock the folder until `FolderLock.close`, at the latest until the end of this process.

    If its owner has just died, wait until the kernel releases the lock. Raises `InUseError` if another process holds
    it, `UserError` if the file system refuses such locks, and `OSError`.
    """
    deadline = time.monotonic() + (SECONDS_TO_RELEASE if owner_died else 0.0)
    while True:
        try:
            return _locked(folder, way, owner_died=owner_died)
        except InUseError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE_SECONDS)


def _locked(folder: Path, way: str, *, owner_died: bool) -> FolderLock:
    handle = _flocked(folder, must=way == "flock")
    try:
        _remove_ended_owner(folder, owner_died=owner_died)
        if way == "flock":
            return FolderLock(lambda: os.close(handle))
        mine = _own(folder)
        return FolderLock(lambda: _disown(folder, mine), lambda: os.close(handle))
    except BaseException:
        os.close(handle)
        raise


def is_locked(folder: Path) -> bool:
    """Return whether a process is known to hold the lock of a folder. Changes nothing."""
    with suppress(OSError):
        handle = opened(folder / LOCK, os.O_WRONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
    owner = _owner_of(folder)
    return owner is not None and owner.lives is True


# ---------------------------------------------------------------------------------------------------------------- flock


def _flocked(folder: Path, *, must: bool) -> int:
    """Return a handle of the locked file ``lock``; without `must`, also if the file system refuses locks."""
    path = folder / LOCK
    is_new = not path.exists()
    while True:
        handle = opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, LOCK_MODE)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(handle)
            if os.path.samestat(found, path.lstat()):
                return handle if not found.st_mode & READABLE_BY_OTHERS else _replaced(path, handle)
        except BlockingIOError:
            holder = _holder(handle, path)
            os.close(handle)
            raise InUseError(
                f"the run folder {folder} is in use by another run{holder}: wait for it, or give another --run-dir"
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if not must:
                return handle
            os.close(handle)
            if is_new:
                path.unlink(missing_ok=True)
            raise UserError(
                f"cannot lock {path}: the file system refuses flock ({errno.errorcode.get(error.errno or 0)}: "
                f"{error.strerror}), as some network file systems do; give --lock link, or another --run-dir"
            ) from None
        os.close(handle)  # a failed run removed the file before this lock: lock the next one


def _replaced(path: Path, handle: int) -> int:
    """Replace a locked file that others can read, as earlier versions made it; return a handle of the new one."""
    new = path.with_name(f"{LOCK}.{secrets.token_hex(8)}.distdl-partial")
    try:
        other = opened(new, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, LOCK_MODE)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(path)
    except OSError:
        return handle
    os.close(handle)
    return other


def _holder(handle: int, path: Path) -> str:
    """Return, for a message, the process of this host that holds the lock; nothing if it is not known."""
    inode = str(os.fstat(handle).st_ino)
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].split(":")[2] == inode and int(words[4]) > 0:
                user = Path("/proc", words[4]).stat().st_uid
                return f" (process {words[4]} of user {user}; if that is no run, remove {path})"
    return ""


# ----------------------------------------------------------------------------------------------------------------- link


@dataclass(frozen=True)
class _Owner:
    """The content of the file ``owner``."""

    host: str
    where: str
    """See `here`."""
    pid: int
    started: int
    since: str

    @property
    def lives(self) -> bool | None:
        """Whether the process lives; None if that cannot be known here."""
        if not here() or self.where != here():
            return None
        return Process(self.pid, "", "", 0, self.started).lives

    def __str__(self) -> str:
        return one_line(f"process {self.pid} of host {self.host} since {self.since}")


def _owner_of(folder: Path) -> _Owner | None:
    """Return the owner of a folder; None without one. An unreadable file has an owner about which nothing is known."""
    try:
        values = json.loads(read_regular(folder / OWNER, most=LARGEST_OWNER_BYTES))
        if fits(values, OWNER_VALUES):
            return _Owner(**{name: values[name] for name in OWNER_VALUES})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        pass
    return _Owner("unknown", "", 0, 0, "unknown")


def _remove_ended_owner(folder: Path, *, owner_died: bool) -> None:
    """Remove the file ``owner`` of a process that has ended; raise `InUseError` if it may live."""
    while (owner := _owner_of(folder)) is not None:
        lives = owner.lives
        if lives is None and owner_died:
            lives = False
        if lives is not False:
            unknown = "" if lives else f"; if that process has ended, remove {folder / OWNER}"
            raise InUseError(
                f"the run folder {folder} is in use by {owner}: wait for it, or give another --run-dir{unknown}"
            )
        aside = folder / f"{OWNER}.{secrets.token_hex(8)}.distdl-partial"
        with suppress(FileNotFoundError):  # another process was faster
            (folder / OWNER).rename(aside)
            aside.unlink()


def _own(folder: Path) -> _Owner:
    """Create the file ``owner``; raise `InUseError` if another process is faster."""
    process = look_at(os.getpid())
    mine = _Owner(
        socket.gethostname(),
        here(),
        os.getpid(),
        0 if process is None else process.started,
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
    )
    with _written(folder, json.dumps(asdict(mine)).encode()) as written:
        try:
            with suppress(FileExistsError):
                os.link(written, folder / OWNER)
        except OSError as error:
            raise UserError(
                f"cannot make {folder / OWNER}: the file system refuses hard links "
                f"({errno.errorcode.get(error.errno or 0)}: {error.strerror}); give another --run-dir"
            ) from None
        time.sleep(SECONDS_TO_SETTLE)
    if (owner := _owner_of(folder)) != mine:
        raise InUseError(f"the run folder {folder} is in use by {owner}: wait for it, or give another --run-dir")
    return mine


@contextmanager
def _written(folder: Path, content: bytes) -> Iterator[Path]:
    path = folder / f"{OWNER}.{secrets.token_hex(8)}.distdl-partial"
    handle = opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_MODE)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _disown(folder: Path, mine: _Owner) -> None:
    with suppress(OSError):
        if _owner_of(folder) == mine:
            (folder / OWNER).unlink()
