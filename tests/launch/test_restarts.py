"""`launch/local.sh --restarts`: a job that fails is restarted, and ends with the receipt of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trapped_training import (
    REPOSITORY,
    WAIT_FOREVER,
    are_gone,
    ended,
    needs_mpirun,
    ranks_of,
    receipt_of,
    start,
    undisturbed_receipt,
    until,
)

from distdl.engine.stop import SAME_REQUEST_SECONDS
from distdl.job.restarts import run_folder

pytestmark = pytest.mark.usefixtures("signals_at_their_defaults")

#: Runs a job of one process; its starts end as listed in `ends`, one after the other.
DRIVER = """
import json, os, sys
from distdl import cli
from distdl.job.restarts import run_until_done

def command_of(flags):
    return [sys.executable, "job.py", *flags], dict(os.environ)

sys.exit(cli.run(lambda flags: run_until_done(command_of, flags[1:], int(flags[0]))))
"""
JOB = """
import json, os, pathlib, signal, sys
ends = json.loads(pathlib.Path("ends").read_text())
pathlib.Path("ends").write_text(json.dumps(ends[1:]))
with open("starts", "a") as starts:
    starts.write(json.dumps(sys.argv[1:]) + "\\n")
folder = pathlib.Path([flag for flag in sys.argv if flag.startswith("--run-dir=")][-1].partition("=")[2])
if ends[0] == "refused":
    sys.exit(2)
if ends[0] != "before it began":
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").touch()
if ends[0] == "killed after it began":
    (folder / "summary.json").unlink(missing_ok=True)
if ends[0] == 0:
    (folder / "summary.json.partial").touch()
    (folder / "summary.json.partial").rename(folder / "summary.json")
if isinstance(ends[0], str) and ends[0].startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, ends[0]))
sys.exit(ends[0] if isinstance(ends[0], int) else 0)
"""


def run_scripted(folder, ends, *flags, restarts=3):
    (folder / "ends").write_text(json.dumps(ends))
    (folder / "job.py").write_text(JOB)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(restarts), *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    starts = [json.loads(line) for line in (folder / "starts").read_text().splitlines()]
    return done.returncode, starts, done.stderr.splitlines()


def test_a_job_that_fails_continues_from_its_checkpoint_until_it_is_done(tmp_path):
    code, starts, said = run_scripted(tmp_path, ["SIGKILL", 9, 1, 0], "--epochs=3", "--run-dir=run")
    assert code == 0
    assert starts == [["--epochs=3", "--run-dir=run"]] + 3 * [
        ["--epochs=3", "--run-dir=run", "--run-dir=run", "--resume=auto"]
    ]
    assert [line.partition(": restart")[0] for line in said] == [
        "distdl: the job ended by SIGKILL",
        "distdl: the job ended with exit code 9",
        "distdl: the job ended with exit code 1",
    ]
    assert "restart 3 of 3, --run-dir run --resume auto" in said[2]


@pytest.mark.parametrize("code", [0, 2, 3, 4, 75, 130])
def test_an_end_that_was_wanted_or_would_repeat_is_not_restarted(tmp_path, code):
    assert run_scripted(tmp_path, [code, 0], "--run-dir=run") == (code, [["--run-dir=run"]], [])


def test_no_more_restarts_than_allowed_and_the_last_exit_code(tmp_path):
    code, starts, said = run_scripted(tmp_path, [9, 9, 15, 0], "--run-dir=run", restarts=2)
    assert code == 15
    assert len(starts) == 3
    assert said[-1] == (
        "distdl: the job ended with exit code 15; it was started 3 times; continue with --run-dir run --resume auto"
    )


@pytest.mark.parametrize("end", ["killed", "killed after it began"])
def test_exit_code_0_without_a_new_summary_is_a_failure(tmp_path, end):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").touch()  # of an earlier end of the run
    code, starts, said = run_scripted(tmp_path, [end, end], "--run-dir=run", restarts=1)
    assert code == 1
    assert len(starts) == 2
    assert all(line.startswith("distdl: the job ended without a summary") for line in said)


def test_a_job_that_fails_before_the_run_began_restarts_with_the_same_flags(tmp_path):
    """With `--resume auto` a run that continues another folder's run would start from nothing."""
    flags = ["--resume=other", "--run-dir=run"]
    code, starts, said = run_scripted(tmp_path, ["before it began", 0], *flags)
    assert (code, starts) == (0, [flags, flags])
    assert said == ["distdl: the job ended without a summary: restart 1 of 3, from the start"]


def test_a_run_folder_is_chosen_once_if_none_is_given(tmp_path):
    code, starts, _ = run_scripted(tmp_path, ["SIGKILL", 0])
    assert code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    given = f"--run-dir=runs/{folder.name}"
    assert starts == [[given], [given, "--resume=auto"]]


def test_a_wrong_flag_leaves_no_chosen_folder(tmp_path):
    code, starts, _ = run_scripted(tmp_path, ["refused", 0], "--epochs=none")
    assert code == 2
    assert [flag.partition("=")[0] for flag in starts[0]] == ["--epochs", "--run-dir"]
    assert not (tmp_path / "runs").exists()


def test_folders_chosen_in_the_same_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({run_folder([])[0] for _ in range(3)}) == 3


def test_a_resumed_run_keeps_its_folder(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").touch()
    checkpoint = run / "checkpoints" / "step-1.safetensors"
    checkpoint.touch()
    assert run_folder(["--resume", str(run)]) == (run, False)
    assert run_folder([f"--resume={checkpoint}"]) == (run, False)
    assert run_folder(["--resume", "auto", "--run_dir", "a", "--run-dir=b"]) == (Path("b"), False)


# From here on with the real mpirun.

TRAPS = {
    "a rank": 'if rank == 1:\n    pathlib.Path("sprung").touch()\n    os.kill(os.getpid(), signal.SIGKILL)',
    "all ranks": 'pathlib.Path("sprung").touch()\nos.kill(os.getpid(), signal.SIGKILL)',
    "the launcher": """
if rank == 1:
    pathlib.Path("sprung").touch()
    launcher = [one for one in ancestors() if one.name in ("mpirun", "prterun", "mpiexec.hydra")][0]
    os.kill(launcher.pid, signal.SIGKILL)
    time.sleep(600)
""",
}


@needs_mpirun
@pytest.mark.parametrize("killed", TRAPS)
def test_a_killed_job_ends_with_the_receipt_of_the_undisturbed_one(tmp_path, killed):
    code, printed, errors = ended(start(tmp_path, TRAPS[killed], "--restarts", "2"))
    assert code == 0, errors
    assert receipt_of(printed) == undisturbed_receipt()
    assert (tmp_path / "sprung").exists()
    if killed != "a rank":  # the survivors may continue without a restart
        assert errors.count(": restart 1 of 2, --run-dir runs/") == 1
    assert "restart 2 of 2" not in errors
    assert are_gone(ranks_of(tmp_path))


@needs_mpirun
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_job_and_the_restarts(tmp_path, number):
    process = start(tmp_path, WAIT_FOREVER, "--restarts", "2", flags=["--run-dir", "run"])
    until(lambda: len(list(tmp_path.glob("waits-*"))) == 3)
    process.send_signal(number)
    time.sleep(2 * SAME_REQUEST_SECONDS)  # the first signal asks to stop after the step, which never ends here
    process.send_signal(number)
    code, _, errors = ended(process)
    assert code != 0
    assert "restart" not in errors
    until(lambda: are_gone(ranks_of(tmp_path)))


#: Runs a launcher, sends it SIGTERM a number of times, and prints the exit code of the job.
SUPERVISOR = """
import os, pathlib, signal, sys, threading, time
from distdl.job import restarts

if sys.argv[2]:
    restarts.SECONDS_TO_END = float(sys.argv[2])

def send():
    for number in range(int(sys.argv[1])):
        while not pathlib.Path(f"ready-{number}").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=send).start()
print(restarts._Job().run([sys.executable, "-c", sys.argv[3]], dict(os.environ)))
"""
#: Ends some seconds after a number of signals, with exit code 7; with -1, never.
LAUNCHER = """
import pathlib, signal, time
heard = []

def hear(*_):
    heard.append(True)
    pathlib.Path(f"ready-{{len(heard)}}").touch()

signal.signal(signal.SIGTERM, hear)
pathlib.Path("ready-0").touch()
while len(heard) != {signals}:
    time.sleep(0.01)
time.sleep({seconds})
raise SystemExit(7)
"""


@pytest.mark.parametrize(
    ("sent", "to_end", "signals", "seconds", "code"),
    [
        pytest.param(2, "1", -1, 0, 128 + signal.SIGKILL, id="one that never ends is killed"),
        pytest.param(2, "", 2, 3, 7, id="one that ends some seconds after the second signal is not"),
        pytest.param(1, "1", 1, 2, 7, id="nor is one that got one signal, however long it takes"),
    ],
)
def test_a_launcher_that_hangs_at_a_second_signal_is_killed(tmp_path, sent, to_end, signals, seconds, code):
    """A busy launcher may take seconds to end all ranks, and a rank to write its checkpoint."""
    launcher = LAUNCHER.format(signals=signals, seconds=seconds)
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, str(sent), to_end, launcher],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == f"{code}\n"


@needs_mpirun
def test_a_signal_to_the_supervisor_reaches_every_rank(tmp_path):
    trap = (
        """
def warned(*_):
    pathlib.Path(f"warned-{rank}").touch()
    raise SystemExit(75)
signal.signal(signal.SIGUSR1, warned)
"""
        + WAIT_FOREVER
    )
    process = start(tmp_path, trap, "--restarts", "2", flags=["--run-dir", "run"])
    until(lambda: len(list(tmp_path.glob("waits-*"))) == 3)
    process.send_signal(signal.SIGUSR1)
    code, _, errors = ended(process)
    assert code != 0
    assert "restart" not in errors
    assert list(tmp_path.glob("warned-*"))


@needs_mpirun
def test_a_killed_supervisor_takes_the_job_with_it(tmp_path):
    process = start(tmp_path, WAIT_FOREVER, "--restarts", "2", flags=["--run-dir", "run"])
    until(lambda: len(list(tmp_path.glob("waits-*"))) == 3)
    process.kill()
    ended(process)
    until(lambda: are_gone(ranks_of(tmp_path)))
