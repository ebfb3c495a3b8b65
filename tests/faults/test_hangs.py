"""A rank that stops or is slow: it is named, nothing is given up, and what goes on comes to the same receipt."""

from __future__ import annotations

import re
import signal

import pytest
from harness import FLAGS, STEPS, Job, assert_receipt, run

pytestmark = pytest.mark.usefixtures("needs_mpirun")

STALL = "2"


def test_a_stopped_rank_is_named_and_goes_on(row, undisturbed):
    """Nobody is evicted: a machine that swaps, or a job that a scheduler suspends, looks just like this."""
    table = row("SIGSTOP on one rank, later SIGCONT", 2, 20)

    def one(number, folder):
        rng = table.random(number)
        rank = rng.randrange(4)
        with Job(folder, 4, *FLAGS, "--stall-warning", STALL) as job:
            assert job.wait_for_training()
            job.wait_for_step(rng.randrange(1, STEPS // 2))
            job.kill(rank, by=signal.SIGSTOP)
            named = re.compile(rf"has waited for \d+ s, .*rank {rank} \(process \d+, stopped by a signal\)")
            assert job.wait_until(lambda: named.search(job.errors()), "complaint about the stopped rank")
            job.kill(rank, by=signal.SIGCONT)
            outcome = job.finish()
        assert_receipt(outcome, undisturbed(*FLAGS))
        assert outcome.lost_ranks == [], str(outcome)
        return outcome, "named after --stall-warning, goes on; rc 0, receipt and metrics of the undisturbed run"

    table.runs(one)


def test_a_slow_rank_is_waited_for(row, undisturbed):
    table = row("slow rank (6 s in one step)", 2, 20)

    def one(number, folder):
        rng = table.random(number)
        rule = {"rank": rng.randrange(4), "point": "forward", "step": rng.randrange(1, STEPS), "do": "sleep:6"}
        outcome = run(folder, 4, *FLAGS, "--stall-warning", STALL, sabotage=[rule])
        assert_receipt(outcome, undisturbed(*FLAGS))
        assert outcome.lost_ranks == [], str(outcome)
        assert f"[rank {rule['rank']}] has done nothing for" in outcome.errors, str(outcome)
        return outcome, "named after --stall-warning, waited for; rc 0, receipt and metrics of the undisturbed run"

    table.runs(one)
