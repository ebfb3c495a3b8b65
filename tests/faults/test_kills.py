"""Ranks are killed. The survivors finish the same step and continue to the receipt of the undisturbed run."""

from __future__ import annotations

import time

import pytest
from harness import FLAGS, STEPS, Job, Outcome, Undisturbed, assert_receipt, run

from distdl.engine.storage import checkpoints

pytestmark = pytest.mark.usefixtures("ulfm")

SURVIVED = "rc 0, receipt and metrics of the undisturbed run"
#: Ranks are killed up to this number of seconds after a step: before, in or after the next step.
SECONDS_OF_A_STEP = 0.03
#: A rank is killed up to this number of seconds after it starts to create the new group: before, during or after the
#: creation.
SECONDS_OF_A_SHRINK = 0.003
#: All other methods that have a state or draw random numbers in a step: BatchNorm's running statistics, augmentation,
#: the moments of AdamW, warm-up and cosine, clipping, early stopping.
EVERY_METHOD = (
    *FLAGS,
    *("--kernels", "auto"),  # NumPy kernels take several times as long for the next network
    *("--model", "resnet20", "--augment", "rotate=10,shift=1,scale=0.1,brightness=0.1"),
    *("--optimizer", "adamw", "--weight-decay", "0.01", "--l1-decay", "1e-5", "--clip-norm", "1"),
    *("--schedule", "cosine", "--warmup-steps", "5", "--early-stopping", "6"),
)


def assert_undisturbed(outcome: Outcome, expected: Undisturbed) -> None:
    assert_receipt(outcome, expected)
    assert outcome.checkpoints, str(outcome)
    for path in outcome.checkpoints:
        checkpoints.read(path)  # raises if it is not intact, or is a temporary file


def assert_recoveries_reported(outcome: Outcome, lost: list[int]) -> None:
    """Assert that the summary reports the lost ranks with step and seconds, and that the log reports a loss."""
    assert outcome.lost_ranks == sorted(lost), str(outcome)
    for recovery in outcome.recoveries:
        assert 0 <= recovery["step"] <= STEPS
        assert 0 <= recovery["seconds"] < 60
    assert "lost" in outcome.output + outcome.errors, str(outcome)


def trained_to_the_end(job: Job) -> bool:
    return any(record["step"] == STEPS for record in job.records())


def killed(rng, folder, ranks: int, kills: list[list[int]], pauses: list[float | None], flags=FLAGS) -> Outcome:
    """Run a job and kill its ranks in turn at random moments; repeat it if a moment was after the last step."""
    for attempt in range(10):
        with Job(folder.with_name(f"{folder.name}-{attempt}"), ranks, *flags) as job:
            assert job.wait_for_training()
            step, hit, late = 0, [], False
            for victims, pause in zip(kills, pauses, strict=True):
                if pause is None:  # wait for another step
                    step = rng.randrange(step, STEPS - 1)
                    job.wait_for_step(step)
                time.sleep(rng.random() * SECONDS_OF_A_STEP if pause is None else pause)
                hit += job.kill(*victims)
                late = late or trained_to_the_end(job)
            outcome = job.finish()
        if sorted(hit) == sorted(rank for victims in kills for rank in victims) and not late:
            assert_recoveries_reported(outcome, hit)
            return outcome
    raise AssertionError(f"each of ten jobs ended before all its victims were killed: {outcome}")


def test_the_others_survive_a_random_rank_killed_at_a_random_moment(row, undisturbed):
    table = row("SIGKILL, random rank, random moment, 4 ranks", 20, 300)
    expected = undisturbed(*FLAGS)

    def one(number, folder):
        rng = table.random(number)
        outcome = killed(rng, folder, 4, [[rng.randrange(4)]], [None])
        assert_undisturbed(outcome, expected)
        return outcome, SURVIVED

    table.runs(one)


def test_the_others_survive_two_kills_with_batch_norm_augmentation_and_every_other_method(row, undisturbed):
    table = row("2 kills, BatchNorm, augmentation, AdamW, cosine, clipping; 4 ranks", 2, 20)
    expected = undisturbed(*EVERY_METHOD)

    def one(number, folder):
        rng = table.random(number)
        outcome = killed(rng, folder, 4, [[rank] for rank in rng.sample(range(4), 2)], [None, None], EVERY_METHOD)
        assert_undisturbed(outcome, expected)
        return outcome, SURVIVED

    table.runs(one)


#: Points of a step before its commit, and after it.
IN_A_STEP = ({"phase": "forward"}, {"phase": "reduction"}, {"phase": "reduction", "when": "after"})
AFTER_THE_COMMIT = ({"phase": "update"}, {"phase": "update", "when": "after"})
#: The coordinator dies after it has printed the receipt.
TOLD = {"phase": "finish", "when": "after"}


def killed_in_a_recovery(rng, folder) -> Outcome:
    """Kill one rank in a step, and a second one before an action of the recovery.

    The action "refuse" is left out, because not every recovery has it.
    """
    first, second = rng.sample(range(4), 2)
    rules = [
        {"rank": first, **rng.choice(IN_A_STEP), "step": rng.randrange(1, STEPS)},
        {"rank": second, "phase": rng.choice(["shrink", "compare", "rebuild", "agree"])},
    ]
    outcome = run(folder, 4, *FLAGS, sabotage=rules)
    assert outcome.errors.count("[saboteur]") == 2, str(outcome)
    assert_recoveries_reported(outcome, [first, second])
    return outcome


def test_the_others_survive_two_or_three_kills_together_or_during_recovery(row, undisturbed):
    table = row("2 or 3 kills, together or during recovery, 4 ranks", 10, 200)
    expected = undisturbed(*FLAGS)

    def one(number, folder):
        rng = table.random(number)
        victims = rng.sample(range(4), rng.choice([2, 3]))
        if number % 3 == 0:  # together
            outcome = killed(rng, folder, 4, [victims], [None])
        elif number % 3 == 1:  # one by one within a few milliseconds, the duration of a recovery
            pauses = [None, *(rng.random() * 0.02 for _ in victims[1:])]
            outcome = killed(rng, folder, 4, [[rank] for rank in victims], pauses)
        else:
            outcome = killed_in_a_recovery(rng, folder)
        assert_undisturbed(outcome, expected)
        return outcome, SURVIVED

    table.runs(one)


def test_the_others_survive_a_kill_while_the_new_group_is_created(row, undisturbed):
    """Open MPI 5.0.11 sometimes crashes here in all surviving ranks (docs/reliability.md)."""
    table = row("a second rank killed while the group of survivors is created, 4 ranks", 5, 200)
    expected = undisturbed(*FLAGS)

    def one(number, folder):
        rng = table.random(number)
        first, second = rng.sample(range(4), 2)
        rules = [
            {"rank": first, "phase": "reduction", "step": rng.randrange(1, STEPS)},
            {"rank": second, "phase": "shrink", "do": f"kill-soon:{rng.random() * SECONDS_OF_A_SHRINK}"},
        ]
        outcome = run(folder, 4, *FLAGS, sabotage=rules)
        assert_recoveries_reported(outcome, [first, second])
        assert_undisturbed(outcome, expected)
        return outcome, SURVIVED

    table.runs(one)


@pytest.mark.parametrize("ranks", [4, 2])
def test_the_last_rank_continues_alone(row, undisturbed, ranks):
    table = row(f"{ranks} ranks to 1, one by one", 2, 25)
    expected = undisturbed(*FLAGS)

    def one(number, folder):
        rng = table.random(number)
        victims = rng.sample(range(ranks), ranks - 1)
        outcome = killed(rng, folder, ranks, [[rank] for rank in victims], [None] * len(victims))
        assert_undisturbed(outcome, expected)
        return outcome, SURVIVED

    table.runs(one)


#: Some points of each phase at which the coordinator dies. Steps count from 1; an epoch has 10 steps.
PHASES = {
    "distributing data": [
        {"phase": "data"},
        {"phase": "mmap.mmap", "when": "after"},
        {"phase": "data", "when": "after"},
    ],
    "in a step": [
        {**point, "step": step} for step in (1, 24) for point in ({"phase": "step"}, *IN_A_STEP, *AFTER_THE_COMMIT)
    ],
    "in validation": [
        *({"phase": "validation", "nth": nth} for nth in (1, 3)),
        {"phase": "validation", "nth": 3, "do": "kill-soon:0.003"},
    ],
    # Before the first checkpoint, the run writes two files; each takes two calls of fsync and one of rename.
    "in a checkpoint": [
        *({"phase": "checkpoint", "when": when, "nth": nth} for nth in (1, 4) for when in ("before", "after")),
        *({"phase": "checkpoint-write", "when": when, "nth": nth} for nth in (1, 4) for when in ("before", "after")),
        *({"phase": "os.rename", "when": when, "nth": nth} for nth in (1, 3, 5) for when in ("before", "after")),
        *({"phase": "os.fsync", "nth": nth} for nth in (1, 5, 6, 7, 8, 11)),
    ],
    "at the very end": [{"phase": "finish"}, TOLD],
}


def test_the_others_survive_the_coordinator_killed_in_each_phase(row, undisturbed):
    table = row("rank 0 killed: data, step, validation, checkpoint, very end; 4 ranks", 5, 100)
    expected = undisturbed(*FLAGS)

    def one(number, folder):
        points = list(PHASES.values())[number % len(PHASES)]
        rng = table.random(number)
        point = points[rng.randrange(len(points))]
        with Job(folder, 4, *FLAGS, sabotage=[{"rank": 0, **point}]) as job:
            outcome = job.finish()
        assert "[saboteur]" in outcome.errors, str(outcome)
        assert_undisturbed(outcome, expected)
        if point != TOLD:
            assert_recoveries_reported(outcome, [0])
        return outcome, SURVIVED

    table.runs(one)
