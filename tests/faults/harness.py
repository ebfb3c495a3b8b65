"""Start training jobs, disturb them, wait for their end with a time limit, and collect their results and leftovers.

A `Job` is one `mpirun`. All its processes have a mark in their environment. The harness uses it to find them in /proc
with their ranks, and to end all of them. The harness disturbs a job from outside (signals), or by `saboteur.py`, which
runs the unchanged trainer with a fault in one of its ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distdl.job.mpirun_command import environment_for, mpirun_command

SABOTEUR = Path(__file__).with_name("saboteur.py")
#: Only prevents hanging. A run takes a few seconds on idle cores.
SECONDS = 180.0
#: Time limit for all processes of a job to exit after its end, or after a kill of its mpirun.
SECONDS_TO_LEAVE = 5.0
MARK = "DISTDL_FAULTS_JOB"
RANK_NAMES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
#: A small convolutional network on the digits: 10 steps per epoch, a checkpoint in the middle of each epoch.
FLAGS = ("--epochs", "6", "--log-every", "1", "--checkpoint-every", "7", "--kernels", "numpy")
STEPS = 60
#: A job of 300 steps, so that it does not end before the fault.
LONG = ("--epochs", "30", "--log-every", "1", "--checkpoint-every", "7", "--kernels", "numpy")
RECEIPT = re.compile(r"^weights sha256: ([0-9a-f]{64})$", re.MULTILINE)


class Hang(AssertionError):  # noqa: N818  a hang is no error class
    """A job did not end in time."""


@dataclass
class Outcome:
    """The results and leftovers of a job."""

    code: int
    output: str
    errors: str
    folder: Path
    seconds: float
    leftover_processes: list[str] = field(default_factory=list)
    leftover_files: list[str] = field(default_factory=list)

    @property
    def receipt(self) -> str | None:
        """The printed hash of the weights."""
        found = RECEIPT.findall(self.output)
        return found[-1] if found else None

    @property
    def metrics(self) -> bytes:
        """The bytes of metrics.jsonl; empty if the file does not exist."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes() if path.exists() else b""

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json; empty if the file does not exist."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        """The survived failures in the summary."""
        return self.summary.get("recoveries", [])

    @property
    def lost_ranks(self) -> list[int]:
        """The lost ranks in the summary."""
        return sorted(rank for recovery in self.recoveries for rank in recovery["lost_ranks"])

    @property
    def checkpoints(self) -> list[Path]:
        """The files in the checkpoint folder."""
        return sorted((self.folder / "checkpoints").glob("*"))

    def __str__(self) -> str:
        """Return all details that a person needs to understand a failure."""
        listed = (self.folder.exists() and sorted(path.name for path in self.folder.rglob("*"))) or []
        return (
            f"exit code {self.code} after {self.seconds:.1f} s, recoveries {self.recoveries}, "
            f"leftovers: {self.leftover_processes} {self.leftover_files}, in the run folder: {listed}\n"
            f"--- output\n{self.output[-3000:]}\n--- errors\n{self.errors[-6000:]}"
        )


class Job:
    """A training job under `mpirun`. The constructor starts it; the end of the `with` block kills its processes.

    `sabotage` is a list of rules for `saboteur.py`. Without `ranks` it is one process without `mpirun`.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int | None,
        *flags: str,
        sabotage: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, str] | None = None,
        command: Callable[[Sequence[str]], tuple[list[str], Mapping[str, str]]] | None = None,
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp(prefix="distdl-faults-"))
        #: Files in shared memory that processes of this job have used.
        self.shared_files: set[str] = set()
        program = [sys.executable, "-X", "faulthandler", *([str(SABOTEUR)] if sabotage else ["-m", "distdl.train"])]
        program += [*flags, "--run-dir", str(folder)]
        environment = dict(os.environ)
        if ranks is not None:
            launch = mpirun_command(ranks, program)
            program, environment = launch.argv, environment_for(launch)
        if command is not None:
            program, more = command(program)
            environment |= more
        environment |= {
            MARK: self.mark,
            "DISTDL_SABOTAGE": json.dumps(list(sabotage)),
            "TMPDIR": str(self.temporary),
            **(variables or {}),
        }
        self._streams = [(self.temporary / name).open("w+b") for name in ("output.txt", "errors.txt")]
        self._started = time.monotonic()
        self.process = subprocess.Popen(
            program,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._streams[0],
            stderr=self._streams[1],
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for stream in self._streams:
            stream.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def processes(self) -> dict[int, int | None]:
        """Return the pids of all living processes of this job, each with its rank, or None (mpirun, a daemon)."""
        found: dict[int, int | None] = {}
        for pid, environment in _environments():
            if environment.get(MARK) == self.mark:
                ranks = [int(environment[name]) for name in RANK_NAMES if environment.get(name, "").isdecimal()]
                found[pid] = ranks[0] if ranks else None
        return found

    def pids(self) -> dict[int, int]:
        """Return the pid of each living rank."""
        # Child processes of a rank inherit its environment. The oldest process is the rank.
        return {rank: pid for pid, rank in sorted(self.processes().items(), reverse=True) if rank is not None}

    def kill(self, *ranks: int, by: signal.Signals = signal.SIGKILL) -> list[int]:
        """Send a signal to ranks, all at once; return the ranks that received it."""
        pids, hit = self.pids(), []
        for rank in ranks:
            with suppress(ProcessLookupError, KeyError):
                os.kill(pids[rank], by)
                hit.append(rank)
        return hit

    def output(self) -> str:
        """Return the output so far."""
        return (self.temporary / "output.txt").read_text(errors="replace")

    def errors(self) -> str:
        """Return the text of the error stream so far."""
        return (self.temporary / "errors.txt").read_text(errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """Return the complete records of metrics.jsonl so far."""
        with suppress(FileNotFoundError):
            lines = (self.folder / "metrics.jsonl").read_text().split("\n")[:-1]
            return [json.loads(line) for line in lines]
        return []

    def wait_until(
        self, condition: Callable[[], Any], what: str, seconds: float = SECONDS, *, hang: bool = True
    ) -> bool:
        """Wait; return True if the condition holds, False if the job ends before that.

        After the time limit, raise `Hang`, or return False if `hang` is False.
        """
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if condition():
                return True
            if self.process.poll() is not None:
                return bool(condition())
            self._look_at_shared_memory()
            time.sleep(0.005)
        if not hang:
            return False
        raise Hang(f"no {what} within {seconds:.0f} s\n{self._stacks()}\n{self._outcome(-1)}")

    def wait_for_training(self) -> bool:
        """Wait for the banner's line on the batch. It is printed when all ranks are ready to train."""
        return self.wait_until(lambda: "micro-batches of" in self.output(), "banner")

    def wait_for_step(self, step: int) -> bool:
        """Wait for the record of a step; needs ``--log-every 1``."""

        def reached() -> bool:
            records = self.records()
            return bool(records) and records[-1]["step"] >= step

        return self.wait_until(reached, f"record of step {step}")

    def finish(self, seconds: float = SECONDS, *, leave: float = SECONDS_TO_LEAVE) -> Outcome:
        """Wait for the end of the job, and then up to `leave` seconds for the end of its processes; return the outcome.

        Raises `Hang`, with the stacks of all ranks, if the job does not end.
        """
        self.wait_until(lambda: self.process.poll() is not None, "end", seconds)
        return self._outcome(self.process.returncode, leave=leave)

    def _outcome(self, code: int, *, leave: float = 0.0) -> Outcome:
        ends = time.monotonic() + leave
        while self.processes() and time.monotonic() < ends:
            time.sleep(0.02)
        return Outcome(
            code,
            self.output(),
            self.errors(),
            self.folder,
            time.monotonic() - self._started,
            [f"pid {pid} (rank {rank})" for pid, rank in self.processes().items()],
            sorted(name for name in self.shared_files if Path(name).exists())
            + sorted(
                str(Path(folder, name))
                for folder, _, names in os.walk(self.temporary)  # ignores files that vanish meanwhile
                for name in names
                if name not in {"output.txt", "errors.txt"}
            ),
        )

    def _look_at_shared_memory(self) -> None:
        """Record the files in shared memory that the ranks have mapped, to recognize leftovers of this job."""
        if time.monotonic() < getattr(self, "_look_again", 0.0):
            return
        self._look_again = time.monotonic() + 0.3
        for pid in self.processes():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    name = line.partition("/dev/shm/")
                    if name[1] and not line.endswith("(deleted)"):
                        self.shared_files.add("/dev/shm/" + name[2])

    def _stacks(self) -> str:
        """Send SIGABRT to every living rank, so that faulthandler prints its stack."""
        for pid, rank in self.processes().items():
            if rank is not None:
                with suppress(OSError):
                    os.kill(pid, signal.SIGABRT)
        time.sleep(1.0)
        return "(the stacks of the ranks are in the errors below)"


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                yield (
                    int(entry.name),
                    dict(
                        variable.decode(errors="replace").partition("=")[::2]
                        for variable in variables
                        if b"=" in variable
                    ),
                )


@dataclass(frozen=True)
class Undisturbed:
    """The results that a run must have in spite of any fault."""

    receipt: str
    metrics: bytes


def run(folder: Path, ranks: int | None, *flags: str, **settings: Any) -> Outcome:
    """Run a job to its end and return its outcome."""
    with Job(folder, ranks, *flags, **settings) as job:
        return job.finish()


def assert_receipt(outcome: Outcome, expected: Undisturbed) -> None:
    """Assert that the run has succeeded, with the weights and metrics of the undisturbed run."""
    assert outcome.code == 0, str(outcome)
    assert outcome.receipt == expected.receipt, str(outcome)
    assert outcome.metrics == expected.metrics, str(outcome)
    assert outcome.summary["weights_sha256"] == expected.receipt
    assert outcome.leftover_processes == [], str(outcome)


def assert_resumable(folder: Path, flags: Sequence[str], expected: Undisturbed, ranks: int | None) -> None:
    """Resume the run as a user would, and compare it with the undisturbed run."""
    assert_receipt(run(folder, ranks, *flags, "--resume", "auto"), expected)
