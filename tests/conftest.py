"""Set one BLAS thread for every test before NumPy is loaded. End all ranks if a test fails on one of them."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

for name in ("OPENBLAS", "OMP", "MKL"):
    os.environ[f"{name}_NUM_THREADS"] = "1"

# Tests start hundreds of processes. They must not each compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Their output is buffered, as on most machines. So a write can also fail when Python exits.
os.environ.pop("PYTHONUNBUFFERED", None)

# Options for this run of pytest, such as paths to ignore, are not for the runs that tests start.
os.environ.pop("PYTEST_ADDOPTS", None)

# Commands that tests start find the package from any folder, whether or not it is installed.
REPOSITORY = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from distdl.job.launched_by import read_launch  # noqa: E402

LAUNCH = read_launch()  # before a test simulates another launcher

if LAUNCH.size > 1:  # all ranks would clean up pytest's own temporary folder at once
    ranks_own = tempfile.mkdtemp(prefix="distdl-tests-")
    os.environ["PYTEST_DEBUG_TEMPROOT"] = ranks_own
    atexit.register(shutil.rmtree, ranks_own, ignore_errors=True)

hypothesis.settings.register_profile("without clocks", deadline=None)
hypothesis.settings.load_profile("without clocks")

MNIST_FOLDERS = (os.environ.get("DISTDL_MNIST_DIR", ""), REPOSITORY.parent / "shared" / "data" / "mnist")


@pytest.fixture(scope="session")
def mnist_dir():
    for folder in MNIST_FOLDERS:
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("the real MNIST is not here: set DISTDL_MNIST_DIR to the folder of its four files")


@pytest.fixture
def signals_at_their_defaults():
    """Handle SIGINT and SIGHUP as at a terminal. In the background, or under nohup, they are ignored."""
    before = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in before.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_fault_outlives_its_test():
    yield
    fault_injection = sys.modules.get("distdl.engine.fault_injection")
    if fault_injection is not None:
        fault_injection.forget()


@pytest.fixture(scope="session")
def needs_mpirun():
    """Skip the test if no job can start: without an mpirun, or in a rank of a job."""
    from distdl.errors import UserError
    from distdl.job.mpirun_command import find_mpirun

    if LAUNCH.by is not None:
        pytest.skip("already under a launcher")
    try:
        find_mpirun()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def survives(needs_mpirun):
    """Return whether jobs of this environment survive the death of a rank."""
    from distdl.job.mpirun_command import mpirun_command

    return "--with-ft" in mpirun_command(2, ["true"]).argv


@pytest.fixture(scope="session")
def ulfm(survives):
    """Skip the test unless the MPI is Open MPI 5 or later."""
    if not survives:
        pytest.skip("survivors continue only with Open MPI 5 and later; other MPIs end the job")


@pytest.fixture(scope="session")
def run_program():
    """Return a function that runs a command line to its end; `timeout` only prevents hanging.

    The program gets a copy of the environment: pytest changes a variable while a thread of `side_by_side` starts one.
    """

    def run(argv, *, timeout, cwd=None, env=None):
        return subprocess.run(
            argv,
            env=os.environ.copy() if env is None else env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def run_job(needs_mpirun, run_program):
    """Return a function that runs a job of `mpirun_command` to its end; `timeout` only prevents hanging."""
    from distdl.job.mpirun_command import environment_for

    def run(launch, *, timeout, cwd=None):
        return run_program(launch.argv, env=environment_for(launch), cwd=cwd, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def run_on_ranks(run_job, run_program):
    """Return a function that runs a command line on ranks, or as one process without `mpirun`."""
    from distdl.job.mpirun_command import mpirun_command

    def run(ranks, argv, *, timeout, cwd=None):
        if ranks == 1:
            return run_program(argv, cwd=cwd, timeout=timeout)
        return run_job(mpirun_command(ranks, argv), cwd=cwd, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def below(tmp_path_factory):
    """Return a function that puts a command line below a pretended launcher: a shell with the launcher's name."""
    folder = tmp_path_factory.mktemp("launchers")

    def command(launcher, argv):
        link = folder / launcher
        if not link.is_symlink():
            link.symlink_to("/bin/sh")
        return [str(link), "-c", '"$@"; exit $?', "sh", *argv]

    return command


#: Runs a program with ``process_vm_readv`` refused, as container runtimes did for years.
REFUSING = """
import ctypes, os, struct, sys
number = {"x86_64": 310, "aarch64": 270}[os.uname().machine]
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
libc = ctypes.CDLL(None, use_errno=True)
rules = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(text)))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, rules, 0, 0):
    sys.exit(f"seccomp: {os.strerror(ctypes.get_errno())}")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="session")
def refusing(run_program):
    """Return the start of a command line under which no process may read the memory of another one."""
    argv = [sys.executable, "-c", REFUSING]
    done = run_program([*argv, shutil.which("true")], timeout=60)
    if done.returncode:
        pytest.skip(done.stderr)
    return argv


@pytest.fixture(scope="module")
def side_by_side(request):
    """Return a function that runs the slow part of a test's cases side by side, one per core at a time.

    ``side_by_side(test, work)`` starts ``work(**parameters)`` for each selected case of that test of this module. It
    returns a function that takes the parameters of one case, waits, and returns or raises the result of `work`.
    """

    def begin(test, work):
        begun = {}

        def result(**parameters):
            key = repr(sorted(parameters.items()))
            if key not in begun:
                begun[key] = pool.submit(work, **parameters)
            return begun[key]

        for item in request.session.items:
            if item.path == request.path and getattr(item, "originalname", None) == test.__name__:
                result(**item.callspec.params)
        return lambda **parameters: result(**parameters).result()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield begin
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def communicator():
    """Return all ranks of this test run: one process unless mpirun started pytest."""
    from distdl.parallel import world

    hook = sys.excepthook
    everyone = world()
    sys.excepthook = hook
    return everyone


@pytest.fixture
def shared_tmp_path(communicator, tmp_path):
    """Return one temporary folder that all ranks see."""
    return Path(communicator.bcast_json(str(tmp_path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """End all ranks after a failed test. Otherwise the others would wait forever in their next collective call."""
    report = yield
    if LAUNCH.size > 1 and report.failed:
        sys.__stderr__.write(f"[rank {LAUNCH.rank}] {item.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
    return report
