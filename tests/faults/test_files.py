"""Real processes are killed in any system call of a checkpoint. Real disks are full, read-only or gone.

Training continues, or ends in one line. `--resume auto` then leads to the receipt of the undisturbed run. By default a
few of the system calls are tested, with ``DISTDL_FULL=1`` all of them.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import without_launcher
from injected import write_checkpoints_at_once
from small_runs import small_run

from distdl.engine.fault_injection import fail_at
from distdl.engine.storage import checkpoints, files
from distdl.errors import UserError
from distdl.job.launched_by import read_launch
from distdl.parallel import OneProcess

pytestmark = pytest.mark.skipif(read_launch().size > 1, reason="starts its own processes")

FULL = os.environ.get("DISTDL_FULL") == "1" or os.environ.get("DISTDL_FAULTS") == "full"

#: Number of tests that share all system calls of a run. Without `FULL` only the first of them runs.
PARTS = 12

#: Trains on a part of the digits: 6 steps, a checkpoint after each. `{hook}` runs before the training.
PROGRAM = """
import ctypes, hashlib, json, os, signal, subprocess, sys
from pathlib import Path
sys.path.insert(0, {end_to_end!r})
import pytest
from injected import write_checkpoints_at_once
from small_runs import small_run
from distdl.engine.storage import checkpoints, files
from distdl.engine.fault_injection import fail_at, forget
from distdl.errors import DistdlError
from distdl.parallel import OneProcess

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
{hook}
try:
    weights, state, metrics = small_run(OneProcess(), folder, **settings)
    print(json.dumps([weights, state, hashlib.sha256(metrics).hexdigest()]))
except DistdlError as error:
    print(f"distdl: error: {{error}}", file=sys.stderr)
    if "look" in globals():
        look()
    sys.exit(error.exit_code)
"""

#: Ends the process by SIGKILL instead of the n-th system call for files.
KILL_AT = """
class Killing:
    made = 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("open", "writev", "fsync", "close", "rename", "unlink", "listdir", "fdopen", "fstat"):
            return real

        def call(*arguments, **named):
            Killing.made += 1
            if Killing.made == {at}:
                if name == "writev":
                    part = b"".join(arguments[1])
                    os.write(arguments[0], part[: len(part) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

files.os = checkpoints.os = Killing()
if {at} == 0:
    import atexit
    atexit.register(lambda: print(Killing.made, file=sys.stderr))
"""


def command(hook, folder, **settings):
    program = PROGRAM.format(end_to_end=str(Path(__file__).parents[1] / "end_to_end"), hook=hook)
    settings = {"checkpoint_every": 1, "keep_checkpoints": 2, "record_hashes": True, **settings}
    return [sys.executable, "-c", program, str(folder), json.dumps(settings)]


def run(argv):
    return subprocess.run(
        argv,
        env={**without_launcher(os.environ), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,  # prevents hanging
        check=False,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the results of a run without faults."""
    return small_run(OneProcess(), tmp_path_factory.mktemp("undisturbed") / "run")


def digests(proof):
    return [proof[0], proof[1], hashlib.sha256(proof[2]).hexdigest()]


@pytest.fixture(scope="module")
def calls(tmp_path_factory, undisturbed):
    """Return the number of system calls of a run for its files."""
    done = run(command(KILL_AT.format(at=0), tmp_path_factory.mktemp("counted") / "run"))
    assert json.loads(done.stdout.splitlines()[-1]) == digests(undisturbed)
    assert int(done.stderr) > 100, "six checkpoints of more than fifteen calls each"
    return int(done.stderr)


@pytest.mark.parametrize("part", range(PARTS) if FULL else [0])
def test_a_run_killed_in_any_system_call_of_a_checkpoint_continues_from_the_old_or_the_new(
    tmp_path, undisturbed, calls, part
):
    found = set()
    for at in range(1 + part, calls + 1, PARTS):
        folder = tmp_path / f"killed {at}"
        done = run(command(KILL_AT.format(at=at), folder))
        if done.returncode == 0:
            continue  # this run makes fewer calls than the counted one: one removal less
        assert done.returncode == -signal.SIGKILL, done.stderr
        newest = checkpoints.newest_intact(folder / "checkpoints")
        if newest is not None:
            found.add(newest[1].header["step"])
            assert newest[2] == [], "a checkpoint is damaged"
        resumed = small_run(OneProcess(), folder, resume="auto", record_hashes=True)
        assert resumed == undisturbed, f"killed in call {at} of {calls}"
        assert not list(folder.rglob(f"*{files.TEMPORARY_SUFFIX}"))
        shutil.rmtree(folder)
    assert len(found) >= 4


# --------------------------------------------------------------------------------------------------- mounted disks


def namespace():
    """Return the words in front of a command that hide its mounts from other processes; or skip the test."""
    for words in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        tried = (
            subprocess.run(
                [*words, "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"], capture_output=True, check=False
            )
            if shutil.which("unshare")
            else None
        )
        if tried is not None and tried.returncode == 0:
            return words
    pytest.skip("mounting a disk is not permitted here")


def mounted(size, script):
    """Return a hook that mounts a small disk under the run folder, and runs `script` (with `step`) in each step."""
    return f"""
folder.parent.mkdir(parents=True, exist_ok=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size={size}", "none", str(folder.parent)], check=True)
filler = folder.parent / "filler"

def fill():
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

def change_the_disk(state):
    step = state.step + 1
{script}

write_checkpoints_at_once(pytest.MonkeyPatch())  # one checkpoint, then the disk changes
fail_at("step", rank=0, nth=None, action=change_the_disk)
"""


def names_and_receipt(done):
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.may_skip
def test_training_continues_on_a_full_disk_that_has_room_again_in_time(tmp_path, undisturbed):
    script = "    fill() if step == 2 else filler.unlink() if step == 4 else None"
    done = run([*namespace(), *command(mounted("4m", script), tmp_path / "disk" / "run")])
    assert done.returncode == 0, done.stderr
    assert names_and_receipt(done) == digests(undisturbed)
    missed = [line for line in done.stderr.splitlines() if "cannot write the checkpoint" in line]
    assert len(missed) == 2
    assert all("No space left on device" in line and line.endswith("training continues") for line in missed)


@pytest.mark.may_skip
def test_a_disk_that_stays_full_ends_the_run_in_one_line_and_earlier_checkpoints_are_intact(tmp_path, undisturbed):
    # The resume runs on the same disk, which vanishes with its namespace.
    script = "    fill() if step == 3 else None"
    after = """
def look():
    filler.unlink()
    found = checkpoints.newest_intact(folder / "checkpoints")
    forget()
    weights, state, metrics = small_run(OneProcess(), folder, resume="auto", record_hashes=True)
    print(json.dumps([found[1].header["step"], found[2], [weights, state, hashlib.sha256(metrics).hexdigest()]]))
"""
    done = run([*namespace(), *command(mounted("4m", script) + after, tmp_path / "disk" / "run")])
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("distdl: error: ")]
    assert "No space left on device; the checkpoints before it are intact: make room and use --resume" in line
    step, complaints, resumed = names_and_receipt(done)
    assert (step, complaints) == (2, [])
    assert resumed == digests(undisturbed)


@pytest.mark.may_skip
def test_training_continues_if_a_folder_is_read_only_for_a_while(tmp_path, undisturbed):
    script = """
    if step == 2:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder / "checkpoints")], check=True)
    if step == 4:
        subprocess.run(["umount", str(folder / "checkpoints")], check=True)
"""
    done = run([*namespace(), *command(mounted("50m", script), tmp_path / "disk" / "run")])
    assert done.returncode == 0, done.stderr
    assert names_and_receipt(done) == digests(undisturbed)
    missed = [line for line in done.stderr.splitlines() if "cannot write the checkpoint" in line]
    assert len(missed) == 2
    assert all("Read-only file system" in line for line in missed)


@pytest.mark.may_skip
def test_a_read_only_disk_is_refused_before_training(tmp_path):
    hook = """
folder.parent.mkdir(parents=True, exist_ok=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder.parent)], check=True)
"""
    done = run([*namespace(), *command(hook, tmp_path / "disk" / "run")])
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "cannot use the run folder" in line
    assert "Read-only file system" in line


# ------------------------------------------------------------------------------------------------ vanishing folders


def while_training(monkeypatch, actions):
    """Run an action in each of the given steps, after the checkpoint of the previous step is written."""
    write_checkpoints_at_once(monkeypatch)
    for step, action in actions.items():
        fail_at("step", rank=0, step=step, action=lambda _, action=action: action())


def test_training_continues_if_checkpoints_vanish_for_a_while(tmp_path, undisturbed, monkeypatch, capsys):
    inside, away = tmp_path / "run" / "checkpoints", tmp_path / "away"
    while_training(monkeypatch, {2: lambda: inside.rename(away), 4: lambda: away.rename(inside)})
    assert small_run(OneProcess(), tmp_path / "run", checkpoint_every=1) == undisturbed
    missed = [line for line in capsys.readouterr().err.splitlines() if "cannot write the checkpoint" in line]
    assert len(missed) == 2
    assert all(os.strerror(errno.ENOENT) in line for line in missed)
    assert checkpoints.steps_in(inside) == [4, 5, 6]


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_folder_that_vanishes_for_good_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys, every):
    while_training(monkeypatch, {2: lambda: shutil.rmtree(tmp_path / "run")})
    with pytest.raises(UserError, match=r"cannot write the checkpoint after step .*No such file or directory"):
        small_run(OneProcess(), tmp_path / "run", checkpoint_every=every)
    assert not (tmp_path / "run").exists()
    assert all(line.startswith("distdl: warning: ") for line in capsys.readouterr().err.splitlines())
