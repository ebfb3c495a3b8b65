"""The folder with the machine code of kernels: ``~/.cache/distdl/kernels``, or below ``XDG_CACHE_HOME``.

A subfolder belongs to one version of the sources and libraries, and to one kind of CPU; its name is a hash of them.
Each file has the code of one kernel, and begins with its own sha256. A reader accepts only a file that belongs to the
user, that no other user can write, and whose hash is right. Anything else is compiled again. Files appear by renaming.
So a killed compiler, two jobs at the same time, or a damaged disk leave no wrong code.

If a folder cannot be used or the disk is full, the temporary folder of the host is used instead.
"""

import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm

from distdl.errors import quoted

#: Subfolders that are kept, the newest ones. A host may have several versions of distdl, a home several kinds of CPU.
KEPT = 8
SUFFIX = ".kernel"
FOLDER_MODE, FILE_MODE = 0o700, 0o600
#: Variables of numba that say nothing about the code.
NOT_ABOUT_CODE = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS"}
#: A temporary file that is older was left by a killed compiler.
SECONDS_OF_A_WRITE = 3600.0
_DIGEST_BYTES = 32
#: No user of this folder may be another one; a group or everyone may not write.
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class KernelCache:
    """The machine code of one version on one kind of CPU, in the first of several folders that can keep it.

    `complaints` says what went wrong, in words for the user.
    """

    def __init__(self, roots: Sequence[Path], version_name: str) -> None:
        self.complaints: list[str] = []
        self._folders = [root / version_name for root in roots]
        self._pruned = False

    def read(self, kernel: str) -> bytes | None:
        """Return the code of a kernel; None if no folder has it."""
        for folder in self._folders:
            path = folder / _file_name(kernel)
            try:
                content = _read_own(path)
            except _NotOwnError as error:
                self._complain(f"the kernel cache is not used: {error}")
                continue
            except OSError:
                continue
            if hashlib.sha256(content[_DIGEST_BYTES:]).digest() == content[:_DIGEST_BYTES]:
                return content[_DIGEST_BYTES:]
            self._complain(f"{quoted(path)} in the kernel cache is damaged: the kernel is compiled again")
        return None

    def write(self, kernel: str, content: bytes) -> bytes:
        """Save the code of a kernel in the first folder in which that succeeds; return the code."""
        failures = []
        for folder in self._folders:
            try:
                _make_own(folder.parent)
                _make_own(folder)
                _write_own(folder / _file_name(kernel), hashlib.sha256(content).digest() + content)
            except OSError as error:
                failures.append(f"{quoted(folder.parent)}: {error.strerror or error}")
                continue
            if failures:
                self._complain(f"compiled kernels are kept in {quoted(folder.parent)}, because of {failures[0]}")
            if not self._pruned:
                _remove_old(folder)
                self._pruned = True
            return content
        self._complain(f"no folder can keep compiled kernels ({'; '.join(failures)}): every start compiles them again")
        return content

    def _complain(self, text: str) -> None:
        if text not in self.complaints:
            self.complaints.append(text)


@cache
def kernel_cache() -> KernelCache:
    """Return the cache of this process."""
    digest = hashlib.sha256()
    for text in (*_versions(), _cpu(), *_variables()):
        digest.update(text.encode() + b"\0")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return KernelCache(list(_roots()), digest.hexdigest()[:24])


def _cpu() -> str:
    """Return the name and the features of this CPU."""
    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"


def _versions() -> list[str]:
    return [f"{sys.implementation.cache_tag} {sys.abiflags}", *(version(one) for one in ("numba", "llvmlite", "numpy"))]


def _variables() -> list[str]:
    names = sorted(name for name in os.environ if name.startswith("NUMBA_") and name not in NOT_ABOUT_CODE)
    return [f"{name}={os.environ[name]}" for name in names]


def _roots() -> Iterator[Path]:
    given = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(given) if given.startswith("/") else Path("~/.cache")
    with suppress(RuntimeError):  # no home folder
        yield home.expanduser() / "distdl" / "kernels"
    yield Path(tempfile.gettempdir()) / f"distdl-kernels-{os.geteuid()}"


def _file_name(kernel: str) -> str:
    name = kernel.partition("(")[0]
    return f"{name}-{hashlib.sha256(kernel.encode()).hexdigest()[:24]}{SUFFIX}"


def _read_own(path: Path) -> bytes:
    """Return the content of a file; raise `OSError` if it is not the user's own."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        _check_own(path, os.fstat(file.fileno()), stat.S_ISREG)
        return file.read()


def _make_own(folder: Path) -> None:
    """Make a folder, or raise `OSError` if that fails or if it is not the user's own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(FOLDER_MODE)
    _check_own(folder, folder.lstat(), stat.S_ISDIR)


class _NotOwnError(OSError):
    """A file or folder is not the user's alone."""


def _check_own(path: Path, found: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    if not is_kind(found.st_mode):
        raise _NotOwnError(f"{quoted(path)} is not what it should be")
    if found.st_uid != os.geteuid():
        raise _NotOwnError(f"{quoted(path)} belongs to another user")
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise _NotOwnError(f"{quoted(path)} can be written by other users")


def _write_own(path: Path, content: bytes) -> None:
    """Replace a file by a new one with this content, or raise `OSError` and leave it as it was."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}.partial")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def _remove_old(folder: Path) -> None:
    """Remove all subfolders beside `folder` but the newest ones, and the remains of killed compilers in it."""
    with suppress(OSError):
        for path in folder.glob("*.partial"):
            if time.time() - path.stat().st_mtime > SECONDS_OF_A_WRITE:
                path.unlink()
        others = [one for one in folder.parent.iterdir() if one != folder and one.is_dir() and not one.is_symlink()]
        for old in sorted(others, key=lambda one: one.stat().st_mtime, reverse=True)[KEPT - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
