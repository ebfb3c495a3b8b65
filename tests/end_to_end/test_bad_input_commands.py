"""Give wrong input to real commands, alone and under this environment's mpirun.

For any number of ranks the user reads one line, once. The exit code gives the kind of error. The command ends and
changes no file.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import TINY, TRAIN_LABELS, changes, mnist_files, picture, without_launcher, write_files

from distdl.job.launched_by import read_launch

pytestmark = pytest.mark.skipif(read_launch().size > 1, reason="starts its own mpirun")

TIMEOUT_SECONDS = 60
REPOSITORY = Path(__file__).parents[2]
TRAIN = [sys.executable, "-m", "distdl.train"]
USER, DAMAGED = 2, 3


@pytest.fixture(scope="module")
def library():
    """Return the vendor of this environment's MPI, from another process, because MPI must not start in this one."""
    program = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"
    done = run([sys.executable, "-c", program], REPOSITORY, environment_with())
    if done.returncode:
        pytest.skip(f"no MPI here: {done.stderr}")
    return done.stdout.strip()


def environment_with(**variables):
    """Return the environment without variables of a launcher, with the given ones, and with the package on the path."""
    search = os.pathsep.join(filter(None, [str(variables.pop("first", "")), str(REPOSITORY)]))
    return {**without_launcher(os.environ), "PYTHONPATH": search, **variables}


def launched(ranks, flags):
    from distdl.job.mpirun_command import mpirun_command

    launch = mpirun_command(ranks, [*TRAIN, *flags])
    return launch.argv, launch.environment


def run(argv, folder, environment, **settings):
    return subprocess.run(
        argv,
        check=False,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        **settings,
    )


def started(argv, folder, output):
    """Start a command that prints to a file descriptor, and close that here. Its errors go to a pipe."""
    process = subprocess.Popen(
        argv,
        cwd=folder,
        env=environment_with(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(output)
    return process


def is_used(path):
    """Return whether a living process has locked the file, as the owner of each of our files does."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return True
    return False


def shared_files():
    return set(Path("/dev/shm").glob("distdl-*")) if Path("/dev/shm").is_dir() else set()


def nothing_new_in_shared_memory(before):
    """Return whether all new files are gone again. Jobs that run at the same time use theirs."""
    deadline = time.monotonic() + 5
    new = shared_files() - before
    while new and time.monotonic() < deadline:
        time.sleep(0.05)
        new = {path for path in new & shared_files() if not is_used(path)}
    return not new


SWEEP = "from distdl.job import leftovers; from distdl.parallel import shared; leftovers.sweep(shared.folders())"


def assert_refused_once(argv, folder, code, words, environment=None, *, sweeps=False, **settings):
    """Run a command that must fail with one line that contains the words, and change no file.

    With `sweeps`, files may stay in shared memory until the next start removes them.
    """
    before, shared = picture(folder), shared_files()
    done = run(argv, folder, environment or environment_with(), **settings)
    everything = done.stdout + done.stderr
    assert done.returncode == code, everything
    assert everything.count("distdl: ") == 1, everything
    lines = [line for line in done.stderr.splitlines() if line.startswith("distdl: error: ")]
    assert len(lines) == 1, everything
    assert [word for word in words if word not in lines[0]] == []
    assert "Traceback" not in everything
    assert "Warning" not in everything
    assert "survives failures" not in everything
    assert "micro-batches of" not in everything, "the banner of a run that did not start"
    assert changes(before, picture(folder)) == []
    if sweeps:
        subprocess.run([sys.executable, "-c", SWEEP], env=environment_with(), check=True)
    assert nothing_new_in_shared_memory(shared)
    return done


@pytest.fixture(scope="module")
def used_folder(tmp_path_factory):
    """Return a folder with a small MNIST in ``data``, a finished run in ``run``, and a damaged one in ``torn``."""
    folder = tmp_path_factory.mktemp("commands")
    write_files(folder / "data", mnist_files())
    write_files(folder / "small", mnist_files(height=3, width=3))
    files = mnist_files()
    write_files(folder / "mislabelled", {**files, TRAIN_LABELS: files[TRAIN_LABELS][:-1] + b"\x63"})
    (folder / "file").write_text("x")
    np.savez(folder / "images.npz", images=np.zeros((2, 4, 4), np.uint8))
    (folder / "broken.py").write_text("def net(input_shape, classes):\n    raise ValueError('no weights')\n")
    for name in ("run", "torn"):
        flags = [*TINY, "--epochs=1", "--dataset=mnist", "--data-dir=data", f"--run-dir={name}"]
        assert run([*TRAIN, *flags], folder, environment_with()).returncode == 0
    (checkpoint,) = (folder / "torn" / "checkpoints").iterdir()
    content = bytearray(checkpoint.read_bytes())
    content[-100] ^= 1
    checkpoint.write_bytes(bytes(content))
    return folder


# One process

MNIST = [*TINY, "--dataset=mnist"]
ALONE = {
    "an unknown flag": (["--epocs", "3"], USER, ["--epocs", "--epochs"]),
    "a used run folder": ([*MNIST, "--data-dir=data", "--run-dir=run"], USER, ["run", "--resume"]),
    "damaged labels": ([*MNIST, "--data-dir=mislabelled", "--run-dir=new"], DAMAGED, [TRAIN_LABELS, "99"]),
    "a damaged checkpoint": (["--resume=torn"], DAMAGED, ["step-", "damaged"]),
    "a folder below a file": ([*TINY, "--run-dir=file/new"], USER, ["file/new"]),
}


@pytest.mark.parametrize("what", ALONE)
def test_one_process_reports_it_in_one_line(what, used_folder):
    flags, code, words = ALONE[what]
    assert_refused_once([*TRAIN, *flags], used_folder, code, words)


def test_on_a_terminal_the_line_has_no_colors(used_folder):
    import pty

    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [*TRAIN, "--optimizer=adamant"],
            check=False,
            cwd=used_folder,
            env=environment_with(TERM="xterm-256color", COLUMNS="40"),
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == USER
    assert done.stderr.startswith("distdl: error: unknown optimizer 'adamant': expected one of adagrad, adam, ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.isprintable() or done.stderr[:-1].isprintable()


def test_an_unwritable_run_folder_is_reported_in_one_line(used_folder, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)

    def obey_permissions():
        """Make the permissions of files bind root too: drop its right to override them."""
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)

    probe = run(["mkdir", str(closed / "new")], tmp_path, environment_with(), preexec_fn=obey_permissions)
    if probe.returncode == 0:
        pytest.skip("this user may write everywhere")
    for flags in ([f"--run-dir={closed}"], [f"--run-dir={closed}/new"]):
        argv = [*TRAIN, *TINY, *flags]
        assert_refused_once(argv, used_folder, USER, [str(closed), "ermission"], preexec_fn=obey_permissions)
    assert list(closed.iterdir()) == []


def test_too_little_memory_for_the_network_is_reported_in_one_line(used_folder, tmp_path):
    import resource

    write_files(tmp_path / "large", mnist_files(training=10, test=1, height=1, width=1))
    images = {"train-images-idx3-ubyte": 10, "t10k-images-idx3-ubyte": 1}
    for name, count in images.items():
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 1500, 1500))
        (tmp_path / "large" / name).write_bytes(header)
        os.truncate(tmp_path / "large" / name, 16 + count * 1500 * 1500)
        with (tmp_path / "large" / name).open("r+b") as file:
            for start in range(count):
                file.seek(16 + start * 1500 * 1500)
                file.write(b"\xff")  # otherwise all pixels are equal, which is refused first

    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))

    flags = ["--model=simple_convnet", "--dataset=mnist", f"--data-dir={tmp_path}/large", "--run-dir=new"]
    words = ["memory", "simple_convnet", "1500x1500"]
    assert_refused_once([*TRAIN, *flags], used_folder, USER, words, preexec_fn=little_memory)


def test_a_terminal_without_unicode_does_not_end_a_training(used_folder, tmp_path):
    done = run([*TRAIN, *TINY, "--max-steps=1"], tmp_path, environment_with(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "weights sha256: " in done.stdout


PRINTS_MORE = (
    "import sys; from distdl import cli, train_command; code = cli.run(train_command.main); print(code); sys.exit(code)"
)


@pytest.mark.parametrize("output", ["a closed pipe", "a lost terminal", "closed from the start"])
def test_a_training_continues_without_a_reader(output, tmp_path):
    ours, theirs = os.openpty() if output == "a lost terminal" else os.pipe()
    without_output = ["sh", "-c", 'exec "$@" >&-', "sh"] if output == "closed from the start" else []
    argv = [*without_output, sys.executable, "-c", PRINTS_MORE, *TINY, "--epochs=2", "--run-dir=new"]
    with started(argv, tmp_path, theirs) as process:
        if not without_output:
            assert os.read(ours, 7) == b"distdl "
        os.close(ours)
        said = process.communicate(timeout=TIMEOUT_SECONDS)[1]
    assert (process.returncode, said) == (0, "")
    assert (tmp_path / "new" / "summary.json").is_file()


UNREAD = {
    "bench": ["--model=mlp", "--input=8x8x1", "--steps=2", "--repetitions=1", "--out={out}"],
    "evaluate": ["run", "--data-dir=data", "--json={out}"],
    "predict": ["run", "images.npz", "--data-dir=data", "--csv={out}"],
    "report": ["run", "--data-dir=data", "--out={out}.html"],
    "search": ["--range=lr=0.001:0.01", "--rounds=1", "--trials=2", "--out={out}", "--", *TINY, "--epochs=1"],
    "verify": ["--ranks=1,2", "--", *TINY, "--epochs=1"],
}


@pytest.mark.parametrize("command", UNREAD)
def test_a_command_does_its_work_without_a_reader(command, used_folder, tmp_path, request):
    if command == "report":
        pytest.importorskip("matplotlib")
    if command == "verify":
        request.getfixturevalue("needs_mpirun")
    ours, theirs = os.pipe()
    os.close(ours)
    flags = [flag.format(out=tmp_path / "new") for flag in UNREAD[command]]
    with started([sys.executable, "-m", f"distdl.{command}", *flags], used_folder, theirs) as process:
        said = process.communicate(timeout=TIMEOUT_SECONDS)[1]
    assert (process.returncode, said) == (0, "")
    assert len(list(tmp_path.iterdir())) == (0 if command == "verify" else 1)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_results_are_not_lost_silently_if_the_output_is_closed_from_the_start(command, used_folder, tmp_path):
    """Without a file, nobody would ever see them."""
    *flags, file = [flag.format(out=tmp_path / "new") for flag in UNREAD[command]]
    for given, code in (([], USER), ([file], 0)):
        argv = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", f"distdl.{command}", *flags, *given]
        done = run(argv, used_folder, environment_with())
        assert done.returncode == code, done.stderr
        assert done.stderr.count("\n") == (code != 0)
        assert ("cannot be printed: standard output is closed" in done.stderr) == (code != 0)
    assert (tmp_path / "new").is_file()


# Under mpirun

UNDER_MPIRUN = {
    "an unknown flag": (2, ["--batchsize", "8"], USER, ["--batchsize", "--batch-size"]),
    "a model that raises": (2, [*TINY, "--model=broken.py:net"], USER, ["broken.py:net", "no weights", "line 2"]),
    "no number": (3, ["--epochs", "many"], USER, ["--epochs", "'many'"]),
    "too many ranks": (
        3,
        ["--batch-size=32", "--micro-batch-size=16"],
        USER,
        ["3 ranks", "2 micro-batches", "32", "16"],
    ),
    "no data": (2, [*MNIST, "--data-dir=nowhere"], USER, ["nowhere", "--data-dir"]),
    "a damaged checkpoint": (2, ["--resume=torn"], DAMAGED, ["torn/checkpoints/step-", "damaged"]),
    "a folder below a file": (2, [*TINY, "--run-dir=file/new"], USER, ["file/new"]),
    "small images": (2, [*MNIST, "--data-dir=small", "--model=deep_convnet"], USER, ["maxpool2d_", "larger image"]),
}


@pytest.mark.parametrize("what", UNDER_MPIRUN)
def test_the_ranks_report_it_once(what, used_folder, library):
    ranks, flags, code, words = UNDER_MPIRUN[what]
    argv, variables = launched(ranks, flags)
    assert_refused_once(argv, used_folder, code, words, environment_with(**variables))


# A launcher and an MPI library that do not fit

WRONG_LAUNCHERS = {
    "MPICH": ("prterun", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}),
    "Open MPI": ("hydra_pmi_proxy", {"PMI_RANK": "0", "PMI_SIZE": "4"}),
}


def test_the_mpirun_of_another_mpi_is_named_with_what_to_do(used_folder, library, below):
    if library not in WRONG_LAUNCHERS:
        pytest.skip(f"no other launcher is known for {library}")
    words = ["4 separate processes", library, "use the mpirun of that library"]
    launcher, variables = WRONG_LAUNCHERS[library]
    assert_refused_once(below(launcher, [*TRAIN, *TINY]), used_folder, USER, words, environment_with(**variables))


def test_the_real_mpirun_of_another_mpi_is_named_too(used_folder, library, monkeypatch):
    other = os.environ.get("DISTDL_OTHER_MPIRUN")
    if not other:
        pytest.skip("needs a second MPI: set DISTDL_OTHER_MPIRUN to its mpirun")
    monkeypatch.setattr("distdl.job.mpirun_command.find_mpirun", lambda: Path(other))
    argv, variables = launched(2, TINY)
    words = ["2 separate processes", library, "use the mpirun of that library"]
    assert_refused_once(argv, used_folder, USER, words, environment_with(**variables))


def test_one_process_in_a_batch_script_of_slurm_trains(tmp_path):
    variables = environment_with(SLURM_JOB_ID="17", SLURM_NTASKS="4", SLURM_PROCID="0")
    done = run([*TRAIN, *TINY, "--max-steps=1", "--run-dir=new"], tmp_path, variables)
    assert (done.returncode, done.stderr) == (0, "")


def test_srun_without_the_right_mpi_is_named_with_what_to_do(used_folder, library, below):
    words = ["srun", "4 separate processes", "--mpi=pmi2", "--mpi=pmix"]
    environment = environment_with(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="4")
    # Started by srun alone, Open MPI leaves a segment. The register that lists the segment stays too.
    argv = below("slurmstepd", [*TRAIN, *TINY])
    assert_refused_once(argv, used_folder, USER, words, environment, sweeps=library == "Open MPI")


NO_MPI4PY = """
import sys
from importlib.machinery import PathFinder


class WithoutMpi4py(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "mpi4py" else PathFinder.find_spec(name, path, target)


sys.meta_path = [WithoutMpi4py if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def without_mpi4py(tmp_path):
    """Return a folder that, first on the path, hides mpi4py from Python."""
    return write_files(tmp_path / "first", {"sitecustomize.py": NO_MPI4PY.encode()})


@pytest.fixture
def without_library(tmp_path):
    """Return a folder that, first on the path, holds an mpi4py that finds no MPI library."""
    error = 'raise RuntimeError("cannot load MPI library\\nlibmpi.so.12: cannot open shared object file")\n'
    files = {"__init__.py": b"class rc: ...\n", "MPI.py": error.encode()}
    return write_files(tmp_path / "first" / "mpi4py", files).parent


def test_without_mpi4py_one_process_trains_and_reports_it_once(tmp_path, without_mpi4py):
    done = run([*TRAIN, *TINY, "--max-steps=1", "--run-dir=new"], tmp_path, environment_with(first=without_mpi4py))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("mpi4py is not installed: pip install") == 1
    assert "one process" in done.stdout


def test_without_an_mpi_library_one_process_trains(tmp_path, without_library):
    done = run([*TRAIN, *TINY, "--max-steps=1", "--run-dir=new"], tmp_path, environment_with(first=without_library))
    assert (done.returncode, done.stderr) == (0, "")
    one_rank = environment_with(first=without_library, PMI_RANK="0", PMI_SIZE="1")
    done = run([*TRAIN, *TINY, "--max-steps=1", "--run-dir=again"], tmp_path, one_rank)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("one process, without MPI (cannot load MPI library)") == 1


@pytest.mark.parametrize("missing", ["without_mpi4py", "without_library"])
@pytest.mark.parametrize(
    "by", ["hydra_pmi_proxy PMI_RANK PMI_SIZE", "prterun OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE"]
)
def test_without_mpi_four_ranks_are_refused_with_a_package_to_install(by, missing, used_folder, request, below):
    launcher, rank, size = by.split()
    environment = environment_with(first=request.getfixturevalue(missing), **{rank: "0", size: "4"})
    words = ["4 separate processes", "no MPI library", "pip install"]
    assert_refused_once(below(launcher, [*TRAIN, *TINY]), used_folder, USER, words, environment)


def test_the_other_ranks_of_a_refused_job_print_nothing(used_folder, without_mpi4py, below):
    environment = environment_with(first=without_mpi4py, PMI_RANK="3", PMI_SIZE="4")
    done = run(below("hydra_pmi_proxy", [*TRAIN, *TINY]), used_folder, environment)
    assert (done.returncode, done.stdout, done.stderr) == (USER, "", "")


LEFT_OVER = {
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"},
    "MPICH": {"PMI_RANK": "1", "PMI_SIZE": "4"},
    "MPICH, with a connection": {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_FD": "77"},
    "MPICH, in a batch script": {"PMI_RANK": "1", "PMI_SIZE": "4"},
    "srun": {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
    "srun, in a batch script": {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_TASK_PID": "4194305"},
}


@pytest.mark.parametrize("of", LEFT_OVER)
def test_variables_left_over_from_another_job_are_named_with_the_line_that_removes_them(
    of, used_folder, library, below
):
    rank, size = list(LEFT_OVER[of].items())[:2]
    words = [f"{'='.join(rank)} and {'='.join(size)} say", "left over", "unset $(env | grep -oE '^("]
    argv = below("slurmstepd", [*TRAIN, *TINY]) if "script" in of else [*TRAIN, *TINY]
    environment = environment_with(**LEFT_OVER[of])
    done = assert_refused_once(argv, used_folder, USER, words, environment, sweeps=library == "Open MPI")
    unset = re.search(r"unset .*?'\)", done.stderr)[0]
    # Stop before the first step: the shell is no launcher, and the variables are gone.
    again = run(["bash", "-c", f'{unset}; "$@"', "bash", *TRAIN, *TINY, "--dry-run"], used_folder, environment)
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.parametrize("flags", [["--epochs=x"], ["--data-dir=nowhere", *MNIST]], ids=" ".join)
def test_with_left_over_variables_any_other_error_is_printed_too(flags, used_folder, library):
    environment = environment_with(**LEFT_OVER["Open MPI"])
    assert_refused_once([*TRAIN, *flags], used_folder, USER, [], environment, sweeps=library == "Open MPI")


def test_with_the_left_over_variables_of_another_launcher_the_ranks_of_a_real_one_report_once(used_folder, library):
    other = {"PMI_RANK": "2", "PMI_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}
    argv, variables = launched(2, ["--epochs=x"])
    assert_refused_once(argv, used_folder, USER, ["--epochs"], environment_with(**variables, **other))


def test_a_process_that_ends_because_its_launcher_is_gone_says_so(used_folder):
    variables = {**LEFT_OVER["Open MPI"], "PMIX_SERVER_URI41": "prterun-host-1@0.0;tcp4://127.0.0.1:9"}
    done = run([*TRAIN, *TINY], used_folder, environment_with(**variables))
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.count("\n") == 1
    assert "has ended" in done.stderr
    assert "unset $(env | grep" in done.stderr
