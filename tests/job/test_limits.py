"""An error behind which a limit of the process is found is one line that names the limit and raises it."""

import errno
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from distdl import cli
from distdl.errors import DamagedFileError, UserError
from distdl.job import limits
from distdl.job.processes import Process

FINITE = {
    resource.RLIMIT_AS: (400_000 * 1024, resource.RLIM_INFINITY),
    resource.RLIMIT_NPROC: (20, 50),
    resource.RLIMIT_NOFILE: (64, 64),
    resource.RLIMIT_FSIZE: (1000 * 1024, resource.RLIM_INFINITY),
}


@pytest.fixture
def limited(monkeypatch):
    """Pretend that these limits are set, and that there is room for a thread."""
    monkeypatch.setattr(
        resource, "getrlimit", lambda number: FINITE.get(number, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    )
    monkeypatch.setattr(limits, "available_to_this_process", lambda: 10**9)
    monkeypatch.setattr(limits, "_pids_of_container", lambda: None)


def import_error():
    return ImportError("NumPy cannot be imported\n\nOriginal error: libstdc++.so.6: failed to map segment from file")


ERRORS = {
    "a thread": (RuntimeError("can't start new thread"), "ulimit -u is 20", "ulimit -u 50"),
    "a process": (BlockingIOError(errno.EAGAIN, "fork"), "ulimit -u is 20", "ulimit -u 50"),
    "memory": (MemoryError(), "ulimit -v is 400000", "ulimit -v unlimited"),
    "a mapping": (OSError(errno.ENOMEM, "mmap"), "ulimit -v is 400000", "ulimit -v unlimited"),
    "a library": (import_error(), "ulimit -v is 400000", "ulimit -v unlimited"),
    "a file": (OSError(errno.EMFILE, "open"), "ulimit -n is 64", "hard limit"),
    "a large file": (OSError(errno.EFBIG, "write"), "ulimit -f is 1000 kB", "ulimit -f unlimited"),
}


@pytest.mark.parametrize("what", ERRORS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "as the cause of another"])
@pytest.mark.usefixtures("limited")
def test_the_limit_behind_an_error_is_one_line_with_the_line_that_raises_it(what, wrapped, capsys):
    error, limit, remedy = ERRORS[what]

    def command(_):
        if wrapped:
            raise RuntimeError("cannot start") from error
        raise error

    assert cli.run(command, []) == 2
    printed = capsys.readouterr().err
    assert limit in printed
    assert remedy in printed
    assert printed.count("\n") == 1


@pytest.mark.usefixtures("limited")
def test_without_room_for_a_thread_the_limit_of_memory_is_named(monkeypatch):
    monkeypatch.setattr(limits, "available_to_this_process", lambda: 10**6)
    assert "ulimit -v is 400000" in str(limits.explained(RuntimeError("can't start new thread")))


def test_the_limit_of_a_container_is_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(limits, "_pids_of_container", lambda: 30)
    assert "pids.max is 30" in str(limits.explained(RuntimeError("can't start new thread")))


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), RuntimeError("x"), OSError(errno.ENOSPC, "full"), DamagedFileError("x"), KeyboardInterrupt()],
)
@pytest.mark.usefixtures("limited")
def test_any_other_error_stays_what_it_is(error):
    assert limits.explained(error) is error


def test_without_a_limit_an_error_stays_what_it_is(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    error = MemoryError()
    assert limits.explained(error) is error


@pytest.mark.parametrize("kilobytes", [60_000, 150_000])
def test_a_process_with_little_address_space_is_refused_in_one_line(kilobytes, tmp_path):
    """NumPy cannot be imported with 60 MB; OpenBLAS ends the process with 150 MB."""
    done = subprocess.run(
        ["bash", "-c", f'ulimit -v {kilobytes}; exec "$@"', "bash", sys.executable, "-m", "distdl.train"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"ulimit -v is {kilobytes}" in done.stderr


@pytest.mark.parametrize(("kilobytes", "fits"), [(10, False), (63_999, False), (64_000, True), (-1, True)])
def test_several_ranks_need_files_of_some_size(kilobytes, fits, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (kilobytes * 1024 if kilobytes >= 0 else -1, -1))
    why = limits.why_files_are_too_small()
    assert (why is None) == fits
    if why is not None:
        assert f"(ulimit -f is {kilobytes} kB): raise it with ulimit -f unlimited; several ranks need at least" in why


def test_a_dataset_that_no_file_can_hold_names_the_limit(tmp_path):
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 10; exec "$@"', "bash", sys.executable, "-m", "distdl.train"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # Python 3.11 keeps a cut file of byte code
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "ulimit -f is 10 kB" in done.stderr


@pytest.mark.parametrize(("room", "fits"), [(30e6, False), (40e6, True), (float("inf"), True)])
@pytest.mark.usefixtures("limited")
def test_products_need_room_for_their_buffer(room, fits, monkeypatch):
    monkeypatch.setattr(limits, "available_to_this_process", lambda: room)
    if fits:
        limits.check_room_for_blas()
    else:
        with pytest.raises(UserError, match=r"ulimit -v is 400000.*30 MB are left"):
            limits.check_room_for_blas()


@pytest.mark.parametrize(("others", "ranks", "fits"), [(2, 2, True), (3, 2, False), (0, 3, False), (0, 0, True)])
@pytest.mark.usefixtures("limited")
def test_the_threads_of_all_ranks_are_counted_before_they_start(others, ranks, fits, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(limits, "_threads_of_others", lambda: others)
    why = limits.why_too_few_processes(ranks)
    assert (why is None) is fits
    if why is not None:
        assert f"expected at least {others + 9 * ranks}, for {ranks} ranks" in why


def test_the_threads_of_this_job_are_not_those_of_others(monkeypatch, tmp_path):
    parents, threads = {10: 1, 11: 10, 12: 11, 20: 1, 21: 20}, {10: 2, 11: 3, 12: 4, 20: 7, 21: 1}
    for pid, count in threads.items():
        for task in range(count):
            (tmp_path / str(pid) / "task" / str(task)).mkdir(parents=True)
    monkeypatch.setattr(limits, "look_at", lambda pid: Process(pid, "sh", "S", parents[pid], 0))
    monkeypatch.setattr(limits, "ancestors", lambda: iter([Process(10, "mpirun", "S", 1, 0)]))
    assert limits._threads_of_others(tmp_path) == 8
    monkeypatch.setattr(limits, "ancestors", lambda: iter([]))
    assert limits._threads_of_others(tmp_path) == 17


def test_root_has_no_limit_of_processes(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (1, 1))
    assert limits.why_too_few_processes(100) is None


def test_numba_is_not_used_if_llvm_would_end_the_process(monkeypatch):
    from distdl.nn.kernels import choice

    if choice.obstacle() is not None:
        pytest.skip("no compiled kernels here")
    monkeypatch.setattr(choice, "available_to_this_process", lambda: 200e6)
    monkeypatch.setattr(choice, "sys", SimpleNamespace(modules={}))
    assert "leaves 200 MB: raise it with ulimit -v" in choice.obstacle()
