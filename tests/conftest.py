"""One BLAS thread for every test, set before NumPy is loaded; and a failure on one rank ends all of them."""

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

# The processes that tests start, hundreds of them, need not compile the package each anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# And they print as they do on most machines: what is left in a buffer may fail when Python ends.
os.environ.pop("PYTHONUNBUFFERED", None)

# Commands that tests start find the package from any folder, whether or not it is installed.
REPOSITORY = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from distdl.job.launcher import read_launch  # noqa: E402

LAUNCH = read_launch()  # before a test pretends another

if LAUNCH.size > 1:  # pytest's own temporary folder would be tidied by all ranks at once
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
    """Let SIGINT and SIGHUP do what they do at a terminal; in the background, or under nohup, they are ignored."""
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
    """Skip where no job can be started: without an mpirun, or in a rank of a job."""
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
    """Whether jobs of this environment survive the death of a rank."""
    from distdl.job.mpirun_command import mpirun_command

    return "--with-ft" in mpirun_command(2, ["true"]).argv


@pytest.fixture(scope="session")
def ulfm(survives):
    """Only for Open MPI 5 and later."""
    if not survives:
        pytest.skip("survivors go on under Open MPI 5 and later only; other MPIs end the job")


@pytest.fixture(scope="session")
def run_program():
    """Run a command line to its end; `timeout` is against hanging."""

    def run(argv, *, timeout, cwd=None, env=None):
        return subprocess.run(
            argv,
            env=env,
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
    """Run a job, as `mpirun_command` gives it, to its end; `timeout` is against hanging."""
    from distdl.job.mpirun_command import environment_for

    def run(launch, *, timeout, cwd=None):
        return run_program(launch.argv, env=environment_for(launch), cwd=cwd, timeout=timeout)

    return run


@pytest.fixture(scope="module")
def side_by_side(request):
    """Do the slow part of one test's cases side by side, as many at a time as there are cores.

    ``side_by_side(test, work)`` begins ``work(**parameters)`` for each chosen case of that test of this module, and
    returns a function that waits for one of them: its parameters in, what `work` returned or raised out.
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
    """All ranks of this test run; one process where pytest was not started by mpirun."""
    from distdl.parallel import world

    hook = sys.excepthook
    everyone = world()
    sys.excepthook = hook
    return everyone


@pytest.fixture
def shared_tmp_path(communicator, tmp_path):
    """One temporary folder that all ranks see."""
    return Path(communicator.bcast_json(str(tmp_path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A test that fails on one rank would leave the others waiting for ever in their next collective call."""
    report = yield
    if LAUNCH.size > 1 and report.failed:
        sys.__stderr__.write(f"[rank {LAUNCH.rank}] {item.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
    return report
