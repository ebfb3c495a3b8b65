"""After a signal to mpirun the job stops with a checkpoint and exit code 75. A resume has the undisturbed receipt."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from distdl.engine.stop import SAME_REQUEST_SECONDS
from distdl.job.mpirun_command import environment_for, mpirun_command

FLAGS = ["--model", "mlp", "--epochs", "2", "--kernels", "numpy"]
STEP = 4

#: The main job. In a step, each rank reports that it is there. It continues after the first signal, or never.
PROGRAM = """
import os, pathlib, signal, sys, time
from contextlib import suppress
from distdl import cli, train_command
from distdl.engine.fault_injection import fail_at
from distdl.job.launched_by import read_launch

folder, stuck, rank = pathlib.Path(sys.argv[1]), sys.argv[2] == "stuck", read_launch().rank
signals, writes = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(writes)

def wait(_state):
    (folder / f"there-{{rank}}").touch()
    heard = b""
    while stuck or not heard:
        with suppress(BlockingIOError):
            heard += os.read(signals, 100)
            (folder / f"heard-{{rank}}").touch()
        time.sleep(0.01)

fail_at("step", rank=None, step={step}, action=wait)
sys.exit(cli.run(train_command.main, sys.argv[3:]))
"""


pytestmark = pytest.mark.usefixtures("needs_mpirun", "signals_at_their_defaults")


def wait_for(folder, pattern, count, process):
    ends = time.monotonic() + 60  # prevents hanging
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, f"no {pattern} from all {count} ranks"
        time.sleep(0.01)


def start(tmp_path, ranks, how="free"):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(step=STEP))
    arguments = [sys.executable, str(program), str(tmp_path), how, *FLAGS, "--run-dir", str(tmp_path / "run")]
    launch = mpirun_command(ranks, arguments)
    return subprocess.Popen(
        arguments if ranks == 1 else launch.argv,
        env=environment_for(launch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def receipt(tmp_path, ranks, *flags):
    launch = mpirun_command(ranks, [sys.executable, "-m", "distdl.train", *FLAGS, *flags])
    argv = launch.argv[-len(FLAGS) - len(flags) - 3 :] if ranks == 1 else launch.argv
    subprocess.run(argv, env=environment_for(launch), cwd=tmp_path, capture_output=True, timeout=120, check=True)
    folder = tmp_path / flags[flags.index("--run-dir") + 1]
    summary = json.loads((folder / "summary.json").read_text())
    return summary["weights_sha256"], summary["state_sha256"], (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, needs_mpirun):
    return receipt(tmp_path_factory.mktemp("undisturbed"), 1, "--run-dir", "run")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_signal_to_mpirun_saves_the_step_and_resume_gives_the_undisturbed_receipt(
    tmp_path, survives, undisturbed, ranks, number
):
    if ranks > 1 and survives and number != signal.SIGUSR1:
        pytest.skip("Open MPI's mpirun kills its ranks half a second after SIGTERM and Ctrl-C")
    process = start(tmp_path, ranks)
    wait_for(tmp_path, "there-*", ranks, process)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert f"stopped after step {STEP}; to continue:\n  --resume {tmp_path / 'run'}\n" in out
    told = [line for line in error.splitlines() if line.startswith("distdl: ")]
    assert told == [f"distdl: stopped by {number.name} after step {STEP}, which is saved (exit code 75)"]
    assert "Traceback" not in error
    assert receipt(tmp_path, ranks % 4 + 1, "--run-dir", "run", "--resume", "auto") == undisturbed


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_training_that_loses_its_terminal_saves_the_step(tmp_path, unbuffered):
    master, terminal = os.openpty()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(step=STEP))
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path), "free", *FLAGS, "--run-dir", str(tmp_path / "run")],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        preexec_fn=lambda: os.login_tty(terminal),  # noqa: PLW1509  nothing else runs in this process
    )
    os.close(terminal)
    wait_for(tmp_path, "there-*", 1, process)
    os.close(master)
    assert process.wait(timeout=60) == 75
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == STEP


def test_a_second_signal_ends_the_job_at_once(tmp_path):
    """All ranks are stuck in a step."""
    process = start(tmp_path, 2, "stuck")
    wait_for(tmp_path, "there-*", 2, process)
    process.send_signal(signal.SIGUSR1)
    wait_for(tmp_path, "heard-*", 2, process)
    time.sleep(2 * SAME_REQUEST_SECONDS)  # an earlier signal counts as the same request
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=60)
    assert process.returncode not in {0, 75}
    assert "KeyboardInterrupt: SIGUSR1, the second signal to stop" in error


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_during_start_up_stops_before_the_first_step(tmp_path, run_program, ranks, number):
    """Each rank gets it before NumPy is imported and MPI started."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from distdl import cli, train_command\n\n"
        "def main(arguments):\n"
        f"    os.kill(os.getpid(), {number:d})\n"
        "    assert 'numpy' not in sys.modules\n"
        "    return train_command.main(arguments)\n\n"
        "sys.exit(cli.run(main, trains=True))\n"
    )
    arguments = [sys.executable, str(program), *FLAGS, "--run-dir", str(tmp_path / "run")]
    launch = mpirun_command(ranks, arguments)
    done = run_program(arguments if ranks == 1 else launch.argv, env=environment_for(launch), timeout=60)
    assert done.returncode == 75, done.stderr
    assert done.stderr == (
        f"distdl: stopped by {number.name} before the first step; nothing was saved (exit code 75)\n"
    )
    assert not (tmp_path / "run").exists()
