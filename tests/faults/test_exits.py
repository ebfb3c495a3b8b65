"""One rank raises, exits or crashes, or the launcher gets a signal. The job ends as documented, and loses no work."""

from __future__ import annotations

import signal
import time

import pytest
from harness import FLAGS, LONG, SECONDS_TO_LEAVE, Job, assert_resumable, run
from test_kills import SURVIVED, assert_recoveries_reported, assert_undisturbed

pytestmark = pytest.mark.usefixtures("needs_mpirun")

#: Fault, its action in `saboteur.py`, and whether the rank dies by a signal, which the others survive.
FAULTS = {
    "raise": ("raise", False),
    "sys.exit(7)": ("exit:7", False),
    "segfault": ("segfault", True),
    "os.abort": ("abort", True),
    "MemoryError": ("memory-error", True),
}
#: The exit codes of mpirun without fault tolerance. With it, a signal ends the job, and the exit code is always 1.
CODES = {"raise": {1}, "sys.exit(7)": {7}, "MemoryError": {1}}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_is_survived_or_ends_the_job(row, undisturbed, survives, fault):
    do, survivable = FAULTS[fault]
    table = row(f"{fault} on one rank", 1, 10)

    def one(number, folder):
        rng = table.random(number)
        rule = {"rank": rng.randrange(3), "phase": "backward", "when": "after", "step": rng.randrange(2, 50), "do": do}
        outcome = run(folder, 3, *FLAGS, sabotage=[rule])
        assert "[saboteur]" in outcome.errors, str(outcome)
        assert outcome.leftover_processes == [], str(outcome)
        if survives and survivable:
            assert_undisturbed(outcome, undisturbed(*FLAGS))
            assert_recoveries_reported(outcome, [rule["rank"]])
            return outcome, SURVIVED
        assert outcome.receipt is None, str(outcome)
        assert outcome.code in ({1} if survives else CODES.get(fault, {outcome.code} - {0, 2, 3, 75})), str(outcome)
        if fault in CODES:
            assert f"[rank {rule['rank']}] " in outcome.errors, str(outcome)
        return outcome, f"the job ends, exit code {outcome.code}"

    table.runs(one)


def test_after_a_warning_signal_to_mpirun_all_ranks_stop_with_a_checkpoint(row, undisturbed):
    """All ranks stop after the same step with a checkpoint of it, so no step is lost."""
    table = row("SIGUSR1 to mpirun", 2, 20)

    def one(number, folder):
        rng = table.random(number)
        with Job(folder, 4, *LONG) as job:
            assert job.wait_for_training()
            job.wait_for_step(rng.randrange(1, 40))
            time.sleep(rng.random() * 0.03)
            job.process.send_signal(signal.SIGUSR1)
            outcome = job.finish()
        assert outcome.code == 75, str(outcome)
        assert outcome.leftover_processes == [], str(outcome)
        last = max(record["step"] for record in job.records())
        assert outcome.checkpoints[-1].stem == f"step-{last:09d}", str(outcome)
        assert_resumable(folder, LONG, undisturbed(*LONG), rng.randrange(1, 5))
        return outcome, "exit code 75, a checkpoint of the last step; resumed to the same receipt"

    table.runs(one)


def test_no_rank_outlives_a_killed_launcher(row, undisturbed):
    table = row("kill -9 of mpirun", 2, 20)

    def one(number, folder):
        rng = table.random(number)
        with Job(folder, 4, *LONG) as job:
            assert job.wait_for_training()
            job.wait_for_step(rng.randrange(1, 40))
            job.process.kill()
            outcome = job.finish()
        assert outcome.leftover_processes == [], f"{SECONDS_TO_LEAVE} s later: {outcome}"
        assert_resumable(folder, LONG, undisturbed(*LONG), rng.randrange(1, 5))
        return outcome, f"no process left after {SECONDS_TO_LEAVE:.0f} s; resumed to the same receipt"

    table.runs(one)
