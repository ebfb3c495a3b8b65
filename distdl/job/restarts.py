"""Start a job again from its last checkpoint if it fails: the `--restarts` of `launch/local.sh`.

A job with one of the `FINAL_EXIT_CODES` is not started again, nor is any job after a signal to this process:
signals are passed on to `mpirun`, and the sender wants the job to end. Any other end leads to a restart, also a defect
(1), because a failing host can make MPI end like that, and exit code 0 without a ``summary.json``, because
fault-tolerant Open MPI returns 0 even if all ranks were killed.

The launcher runs in a process group of its own, so Ctrl-C reaches it once and not twice. It reads no input. It ends if
this process is killed.
"""

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

from distdl.config import expand_home, flag_of, run_folder_of
from distdl.errors import EXIT_DEFECT, EXIT_INTERRUPTED, FINAL_EXIT_CODES, UserError
from distdl.job import leftovers, streams
from distdl.job.folder_lock import is_locked
from distdl.job.processes import send_when_the_parent_dies
from distdl.job.slow_start import SlowStart

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
#: The parent of the run folder if the flags name none; relative to the working folder.
RUNS = Path("runs")
#: The time that a rank may outlive its launcher and keep the run folder locked; normally a second.
SECONDS_TO_RELEASE = 60.0
#: The time that `mpirun` may take to end after a second signal.
SECONDS_TO_END = 20.0

#: A function that returns the command line and the environment for given flags of the program.
CommandOf = Callable[[Sequence[str]], tuple[Sequence[str], dict[str, str]]]


def run_until_done(command_of: CommandOf, flags: Sequence[str], restarts: int) -> int:
    """Run the job; while it fails, restart it up to `restarts` times; return its last exit code."""
    folder_of_runs_is_new = not RUNS.exists()
    folder, chosen = run_folder(flags)
    job = _Job()
    flags_now = [*flags, f"--run-dir={folder}"] if chosen else list(flags)
    for attempt in itertools.count(1):
        before = _identity(folder / "summary.json")
        code = job.run(*command_of(flags_now))
        unfinished = code == 0 and _identity(folder / "summary.json") in {None, before}
        if job.stopping:
            code = EXIT_INTERRUPTED if unfinished else code  # mpirun may return 0
            break
        if unfinished:
            code, what = EXIT_DEFECT, "without a summary"
        else:
            what = f"with exit code {code}" if code < 128 else f"by {_signal_name(code - 128)}"
        if code in FINAL_EXIT_CODES:
            break
        if attempt > restarts:
            advice = f"continue with --run-dir {folder} --resume auto"
            streams.say_line(f"the job ended {what}; it was started {attempt} times; {advice}")
            break
        _wait_for_the_lock(folder, job)
        if job.stopping:
            break
        how = "from the start"
        if (folder / "config.toml").is_file():
            how = f"--run-dir {folder} --resume auto"
            flags_now = [*flags, f"--run-dir={folder}", "--resume=auto"]
        streams.say_line(f"the job ended {what}: restart {attempt} of {restarts}, {how}")
    if chosen:
        with suppress(OSError):  # not empty: it holds a run
            folder.rmdir()
            if folder_of_runs_is_new:
                RUNS.rmdir()
    return code


def run_folder(flags: Sequence[str]) -> tuple[Path, bool]:
    """Return the folder of the run that these flags start, and whether this call has chosen and created it."""
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
    """Return the path of the last ``--name value`` or ``--name=value``."""
    value = None
    for position, word in enumerate(flags):
        flag, equals, after = word.partition("=")
        if flag.replace("_", "-") == flag_of(name):
            value = after if equals else next(iter(flags[position + 1 :]), value)
    return None if value is None else expand_home(flag_of(name), value)


class _Job:
    """Runs one `mpirun` at a time, and passes on the signals that this process gets."""

    def __init__(self) -> None:
        self.stopping = False
        self._second_signal_at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: list[int] = []
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, self._pass_on)

    def run(self, argv: Sequence[str], environment: dict[str, str]) -> int:
        """Run the command to its end; return its exit code, or 128 + the number of the signal that ended it."""
        us = os.getpid()

        def become_the_launcher() -> None:
            send_when_the_parent_dies(signal.SIGKILL)  # its ranks end too; at SIGTERM they would finish their step
            if os.getppid() != us:
                os._exit(EXIT_DEFECT)
            os.execve(argv[0], list(argv), leftovers.own_session(environment))  # noqa: S606  no shell is wanted

        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=become_the_launcher,  # noqa: PLW1509  this process has one thread
        )
        while self._pending:  # signals that came during the start
            self._process.send_signal(self._pending.pop())
        code = self._ended(self._process, SlowStart(self._process.pid, argv))
        self._process = None
        return code if code >= 0 else 128 - code

    def _ended(self, process: subprocess.Popen[bytes], slow_start: SlowStart) -> int:
        """Wait for the end; kill an `mpirun` that ignores a second signal, as a busy Open MPI sometimes does."""
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                slow_start.look()
                if self._second_signal_at is not None and time.monotonic() > self._second_signal_at + SECONDS_TO_END:
                    process.kill()

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        if self.stopping and self._second_signal_at is None:
            self._second_signal_at = time.monotonic()
        self.stopping = True
        if self._process is None:
            self._pending.append(number)
        else:
            self._process.send_signal(number)


def _wait_for_the_lock(folder: Path, job: _Job) -> None:
    """Return once no rank locks the run folder any longer."""
    deadline = time.monotonic() + SECONDS_TO_RELEASE
    while time.monotonic() < deadline and not job.stopping and is_locked(folder):
        time.sleep(0.1)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return a value that changes if another file replaces this one; None if the file does not exist."""
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"exit code {128 + number}"
