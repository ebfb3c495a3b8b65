"""A stopped or slow rank is named, or evicted if --detect-hangs asks for it. The receipt is the same."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress

import pytest
from harness import FLAGS, STEPS, Job, assert_receipt, assert_resumable, run

pytestmark = pytest.mark.usefixtures("needs_mpirun")

STALL = "2"
#: Of `--detect-hangs`; a stopped rank must end within three times this.
SECONDS = 2.0


def test_a_stopped_rank_is_named_and_continues(row, undisturbed):
    """Without --detect-hangs no rank is evicted, because a swapping machine looks the same."""
    table = row("SIGSTOP on one rank, later SIGCONT", 2, 20)

    def one(number, folder):
        rng = table.random(number)
        rank = rng.randrange(4)
        with Job(folder, 4, *FLAGS, "--stall-warning", STALL) as job:
            assert job.wait_for_training()
            job.wait_for_step(rng.randrange(1, STEPS // 2))
            job.kill(rank, by=signal.SIGSTOP)
            named = re.compile(rf"has waited for \d+ s, .*rank {rank} \(process \d+, stopped by a signal\)")
            assert job.wait_until(lambda: named.search(job.errors()), "message about the stopped rank")
            job.kill(rank, by=signal.SIGCONT)
            outcome = job.finish()
        assert_receipt(outcome, undisturbed(*FLAGS))
        assert outcome.lost_ranks == [], str(outcome)
        return outcome, "named after --stall-warning, continues; rc 0, receipt and metrics of the undisturbed run"

    table.runs(one)


def test_the_others_wait_for_a_slow_rank(row, undisturbed):
    table = row("slow rank (6 s in one step)", 2, 20)

    def one(number, folder):
        rng = table.random(number)
        rule = {"rank": rng.randrange(4), "phase": "forward", "step": rng.randrange(1, STEPS), "do": "sleep:6"}
        outcome = run(folder, 4, *FLAGS, "--stall-warning", STALL, sabotage=[rule])
        assert_receipt(outcome, undisturbed(*FLAGS))
        assert outcome.lost_ranks == [], str(outcome)
        assert f"[rank {rule['rank']}] has done nothing for" in outcome.errors, str(outcome)
        return outcome, "named after --stall-warning, waited for; rc 0, receipt and metrics of the undisturbed run"

    table.runs(one)


def bytes_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_stopped_rank_is_evicted_with_detect_hangs(row, undisturbed, survives):
    """A later SIGCONT finds no process, and no file changes after the end."""
    table = row("SIGSTOP on one rank, --detect-hangs, later SIGCONT", 2, 20)

    def one(number, folder):
        rng = table.random(number)
        rank = number % 4  # every rank, also the coordinator
        with Job(folder, 4, *FLAGS, "--detect-hangs", str(SECONDS)) as job:
            assert job.wait_for_training()
            job.wait_for_step(rng.randrange(1, STEPS // 2))
            pid = job.pids()[rank]
            stopped = time.monotonic()
            job.kill(rank, by=signal.SIGSTOP)
            assert job.wait_until(lambda: pid not in job.processes(), "death of the stopped rank")
            seconds = time.monotonic() - stopped
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            outcome = job.finish()
        assert SECONDS / 2 < seconds < 3 * SECONDS, str(outcome)
        killed = rf"^distdl: rank {rank} \(process {pid}, host \S+\) has given no sign of life for 2 s and is killed$"
        assert re.search(killed, outcome.errors, re.MULTILINE), str(outcome)
        written = bytes_of(folder)
        if survives:
            assert_receipt(outcome, undisturbed(*FLAGS))
            assert outcome.lost_ranks == [rank], str(outcome)
            time.sleep(1.0)
            assert bytes_of(folder) == written
            return outcome, "evicted within 3 times the seconds; rc 0, receipt and metrics of the undisturbed run"
        assert outcome.code != 0, str(outcome)
        assert outcome.leftover_processes == [], str(outcome)
        assert_resumable(folder, FLAGS, undisturbed(*FLAGS), 4)
        return outcome, "killed within 3 times the seconds, the job ends; resumed to the same receipt"

    table.runs(one)


def test_a_slow_rank_is_not_evicted(row, undisturbed):
    table = row("slow rank (6 s in one step), --detect-hangs", 2, 20)

    def one(number, folder):
        rng = table.random(number)
        rule = {"rank": rng.randrange(4), "phase": "forward", "step": rng.randrange(1, STEPS), "do": "sleep:6"}
        outcome = run(folder, 4, *FLAGS, "--detect-hangs", str(SECONDS), sabotage=[rule])
        assert "[saboteur]" in outcome.errors, str(outcome)
        assert_receipt(outcome, undisturbed(*FLAGS))
        assert outcome.lost_ranks == [], str(outcome)
        return outcome, "not evicted; rc 0, receipt and metrics of the undisturbed run"

    table.runs(one)
