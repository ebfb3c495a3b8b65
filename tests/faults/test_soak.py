"""For half an hour, ranks and launchers get random signals and kills. Each job that ends early is started again.

The soak is only in the full matrix. DISTDL_FAULTS_SOAK_SECONDS sets another length.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness import Job, Outcome

pytestmark = pytest.mark.usefixtures("needs_mpirun")

SECONDS = float(os.environ.get("DISTDL_FAULTS_SOAK_SECONDS", "1800"))
#: Flags of a round: one training to its end.
FLAGS = ("--epochs", "300", "--checkpoint-every", "50", "--verify-every", "20")
#: Allowed growth of a process: it keeps buffers of a recovery, and the allocator rounds.
MEGABYTES_GAINED = 20.0
DESCRIPTORS_GAINED = 8


@dataclass
class Look:
    """The resident megabytes and open descriptors of a process."""

    megabytes: float
    descriptors: int

    @staticmethod
    def at(pid: int) -> Look | None:
        with suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            # Memory shared with other ranks does not count. It grows when a page is first used.
            shared = int(Path(f"/proc/{pid}/statm").read_text().split()[2])
            megabytes = (pages - shared) * os.sysconf("SC_PAGE_SIZE") / 1e6
            return Look(megabytes, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))
        return None


@dataclass
class Soak:
    """The rounds, and the events and growth in them."""

    rng: random.Random
    ends: float
    survives: bool
    rounds: int = 0
    events: dict[str, int] = field(default_factory=dict)
    gained: list[tuple[float, int]] = field(default_factory=list)
    shared_files: set[str] = field(default_factory=set)

    def disturb(self, job: Job) -> None:
        """Disturb the job until it ends; measure its ranks at the start and at the end."""
        first: dict[int, Look] = {}
        last: dict[int, Look] = {}
        while job.process.poll() is None:
            for pid in job.pids().values():
                look = Look.at(pid)
                if look is not None:
                    first.setdefault(pid, look)
                    last[pid] = look
            if job.wait_until(lambda: job.process.poll() is not None, "end", self.rng.uniform(1, 6), hang=False):
                break
            if time.monotonic() < self.ends:  # a job that runs later is not disturbed
                self._harm(job)
        self.gained += [
            (look.megabytes - first[pid].megabytes, look.descriptors - first[pid].descriptors)
            for pid, look in last.items()
        ]
        self.shared_files |= job.shared_files

    def _harm(self, job: Job) -> None:
        kills = ["kill a rank"] * 6 + ["kill two ranks"] * 2
        event = self.rng.choice([*kills, "warn mpirun", "kill mpirun"])
        self.events[event] = self.events.get(event, 0) + 1
        if event == "warn mpirun":
            job.process.send_signal(signal.SIGUSR1)
        elif event == "kill mpirun":
            job.process.kill()
        else:
            living = sorted(job.pids())
            wanted = 2 if "two" in event else 1
            # Without ULFM one kill ends the job. With it, the last rank is not killed.
            job.kill(*self.rng.sample(living, min(wanted, max(len(living) - 1, 0))))

    def round(self, folder: Path, flags: tuple[str, ...]) -> Outcome:
        """Start a training again and again until it prints its receipt."""
        for _ in range(1000):
            with Job(folder, 4, *flags, "--resume", "auto") as job:
                if job.wait_for_training():
                    self.disturb(job)
                outcome = job.finish()
            assert outcome.leftover_processes == [], str(outcome)
            assert "Traceback" not in outcome.errors, str(outcome)
            if outcome.receipt is not None and outcome.code != 75:
                self.rounds += 1
                return outcome
        raise AssertionError(f"a thousand starts did not end with a receipt: {outcome}")


def test_random_kills_and_restarts_end_with_the_undisturbed_receipts(row, undisturbed, survives):
    table = row("soak: random kills and restarts, 30 minutes", 1, 1)

    def one(number, folder):
        soak = Soak(table.random(number), time.monotonic() + SECONDS, survives)
        while time.monotonic() < soak.ends:
            flags = (*FLAGS, "--seed", str(soak.rounds % 3))
            outcome = soak.round(folder / str(soak.rounds), flags)
            expected = undisturbed(*flags)
            assert outcome.receipt == expected.receipt, str(outcome)
            assert outcome.metrics == expected.metrics, str(outcome)
        megabytes, descriptors = (max(gains) for gains in zip(*soak.gained, strict=True))
        assert megabytes < MEGABYTES_GAINED, sorted(soak.gained)[-10:]
        assert descriptors <= DESCRIPTORS_GAINED, sorted(soak.gained, key=lambda gain: gain[1])[-10:]
        left = [name for name in soak.shared_files if Path(name).exists()]
        happened = ", ".join(f"{count} × {event}" for event, count in sorted(soak.events.items()))
        assert left == [], left
        return outcome, (
            f"{soak.rounds} trainings, each with the receipt of an undisturbed one, after {happened}; a process gained "
            f"at most {megabytes:.1f} MB and {descriptors} descriptors; nothing left in shared memory"
        )

    table.runs(one)
