"""Start a job again when it fails, from its last checkpoint: the `--restarts` of `launch/local.sh`.

| the job ended with             | another start                                                                |
|--------------------------------|------------------------------------------------------------------------------|
| 0 and its ``summary.json``     | no: done                                                                     |
| 2, 3                           | no: what the user gave, or a file, would be wrong again                      |
| 4                              | no: a host computes wrongly, and somebody has to look at it first            |
| 75, 130                        | no: a scheduler, or Ctrl-C, wanted it to stop                                |
| any code, after a signal to us | no: signals are passed on to `mpirun`, and whoever sent one wants an end     |
| 0 without ``summary.json``     | yes: Open MPI calls it well when all ranks have been killed, fault-tolerant  |
| anything else                  | yes: a rank or the launcher was killed, the host failed, a rank had an error |

Exit code 1, a defect, is among the last: what a failing host or network does to MPI looks like one.

The launcher runs in a process group of its own, so that Ctrl-C reaches it once and not twice, and reads nothing; it
is told to end should this process be killed.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

from distdl.config import flag_of, run_folder_of
from distdl.errors import (
    EXIT_CORRUPTION,
    EXIT_DAMAGED,
    EXIT_DEFECT,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USER,
    UserError,
)
from distdl.job import streams
from distdl.job.launcher import remove_session_of
from distdl.job.processes import send_when_the_parent_dies

FINAL = frozenset({0, EXIT_USER, EXIT_DAMAGED, EXIT_CORRUPTION, EXIT_STOPPED, EXIT_INTERRUPTED})
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
#: Where a run gets its folder if it was given none, below the folder it was started in.
RUNS = Path("runs")
#: How long a rank may outlive its launcher and hold the run folder; it should be a second.
SECONDS_TO_LET_GO = 60.0
#: How long `mpirun` may take to end at a second signal.
SECONDS_TO_END = 20.0

#: Returns the command line and the environment that start a job with the given flags of the program.
CommandOf = Callable[[Sequence[str]], tuple[Sequence[str], dict[str, str]]]


def run_until_done(command_of: CommandOf, flags: Sequence[str], restarts: int) -> int:
    """Run the job, and again up to `restarts` times while it fails; return its exit code."""
    folder_of_runs_is_new = not RUNS.exists()
    folder, chosen = run_folder(flags)
    job = _Job()
    flags_now = [*flags, f"--run-dir={folder}"] if chosen else list(flags)
    for attempt in itertools.count(1):
        before = _identity(folder / "summary.json")
        code = job.run(*command_of(flags_now))
        unfinished = code == 0 and _identity(folder / "summary.json") in {None, before}
        if job.stopping:
            code = EXIT_INTERRUPTED if unfinished else code  # mpirun may call it well
            break
        if unfinished:
            code, what = EXIT_DEFECT, "without a summary"
        else:
            what = f"with exit code {code}" if code < 128 else f"by {_signal_name(code - 128)}"
        if code in FINAL:
            break
        if attempt > restarts:
            streams.say_line(f"the job ended {what}, {attempt} times in all; --run-dir {folder} --resume auto goes on")
            break
        _wait_until_let_go(folder, job)
        if job.stopping:
            break
        goes_on = "from the start"
        if (folder / "config.toml").is_file():
            goes_on = f"--run-dir {folder} --resume auto"
            flags_now = [*flags, f"--run-dir={folder}", "--resume=auto"]
        streams.say_line(f"the job ended {what}: restart {attempt} of {restarts}, {goes_on}")
    if chosen:
        with suppress(OSError):  # it holds a run
            folder.rmdir()
            if folder_of_runs_is_new:
                RUNS.rmdir()
    return code


def run_folder(flags: Sequence[str]) -> tuple[Path, bool]:
    """Return the folder of the run that these flags start, and whether it had to be chosen, and made, here."""
    given, resumed = _value_of("run_dir", flags), _value_of("resume", flags)
    if given is not None:
        return Path(given), False
    if resumed is not None:
        return run_folder_of(Path(resumed)) or Path(resumed), False
    for number in itertools.count(1):
        folder = RUNS / (f"{datetime.now():%Y-%m-%d-%H%M%S}" + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}; give a --run-dir") from None
    return folder, True


def _value_of(name: str, flags: Sequence[str]) -> str | None:
    """Return the value of the last ``--name value`` or ``--name=value``."""
    value = None
    for position, word in enumerate(flags):
        flag, equals, after = word.partition("=")
        if flag.replace("_", "-") == flag_of(name):
            value = after if equals else next(iter(flags[position + 1 :]), value)
    return value


class _Job:
    """One `mpirun` at a time, and the signals that this process gets meanwhile."""

    def __init__(self) -> None:
        self.stopping = False
        self._told_twice: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: list[int] = []
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._pass_on)

    def run(self, argv: Sequence[str], environment: dict[str, str]) -> int:
        """Run the command to its end; return its exit code, 128 and more for a signal."""
        us = os.getpid()

        def tie() -> None:
            send_when_the_parent_dies(signal.SIGKILL)  # ranks end with it; at SIGTERM they would finish their step
            if os.getppid() != us:
                os._exit(EXIT_DEFECT)
            remove_session_of(os.getpid())

        self._process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=tie,  # noqa: PLW1509  this process has one thread
        )
        while self._pending:  # came while it was started
            self._process.send_signal(self._pending.pop())
        code = self._ended(self._process)
        remove_session_of(self._process.pid)
        self._process = None
        return code if code >= 0 else 128 - code

    def _ended(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end; kill an `mpirun` that a second signal has not ended, as happens to a busy Open MPI."""
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                if self._told_twice is not None and time.monotonic() > self._told_twice + SECONDS_TO_END:
                    process.kill()

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        if self.stopping and self._told_twice is None:
            self._told_twice = time.monotonic()
        self.stopping = True
        if self._process is None:
            self._pending.append(number)
        else:
            self._process.send_signal(number)


def _wait_until_let_go(folder: Path, job: _Job) -> None:
    """Return when no rank holds the run folder any more."""
    deadline = time.monotonic() + SECONDS_TO_LET_GO
    while time.monotonic() < deadline and not job.stopping:
        try:
            with (folder / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            break  # there is none; whatever else is wrong with the folder, the next start says


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from one that has taken its place."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"exit code {128 + number}"
