"""A wrong number on one rank is found, and the rank is named. All ranks decide the same in the same step."""

from __future__ import annotations

import re

import pytest
from harness import FLAGS, STEPS, assert_resumable, run

pytestmark = pytest.mark.usefixtures("needs_mpirun")

#: Bits of a float32 whose flip survives the rounding of a sum and does not make the number infinite.
BITS = range(18, 28)
CORRUPTION = 4
VERIFY_EVERY = 5


def named_ranks(outcome) -> list[int]:
    (line,) = [line for line in outcome.errors.splitlines() if line.startswith("distdl: error:")]
    return [int(rank) for rank in re.findall(r"(\d+) \(host ", line)]


def test_a_flipped_bit_in_the_weights_of_one_rank_is_found_and_the_rank_named(row, undisturbed):
    """The next comparison finds it before a checkpoint contains it, so a resume ends with the same receipt."""
    table = row("one flipped bit in one rank's weights, --verify-every 5", 5, 50)

    def one(number, folder):
        rng = table.random(number)
        rank, step = rng.randrange(4), rng.randrange(1, STEPS - 1)
        rule = {
            "rank": rank,
            "phase": "step",
            "step": step,
            "do": f"flip-weight:{rng.randrange(10**6)},{rng.choice(BITS)}",
        }
        flags = (*FLAGS, "--verify-every", str(VERIFY_EVERY))
        outcome = run(folder, 4, *flags, sabotage=[rule])
        assert outcome.code == CORRUPTION, str(outcome)
        assert named_ranks(outcome) == [rank], str(outcome)
        due = -(-step // VERIFY_EVERY) * VERIFY_EVERY
        found = int(re.search(r"after step (\d+)", outcome.errors)[1])
        assert step <= found <= due, str(outcome)
        assert outcome.leftover_processes == [], str(outcome)
        assert_resumable(folder, flags, undisturbed(*FLAGS), None)
        return outcome, "found at the next comparison, rank named, exit code 4; resumed to the same receipt"

    table.runs(one)


def test_a_flipped_bit_in_the_gradient_of_one_rank_is_found_in_that_step(row, undisturbed):
    table = row("one flipped bit in one rank's gradient, --cross-check 1", 5, 50)

    def one(number, folder):
        rng = table.random(number)
        rank, step = rng.randrange(4), rng.randrange(1, STEPS - 1)
        rule = {"rank": rank, "phase": "backward", "when": "after", "step": step, "nth": rng.choice([1, 2])}
        rule["do"] = f"flip-gradient:{rng.randrange(10**6)},{rng.choice(BITS)}"
        flags = (*FLAGS, "--cross-check", "1")
        outcome = run(folder, 4, *flags, sabotage=[rule])
        assert outcome.code == CORRUPTION, str(outcome)
        assert named_ranks(outcome) == [rank], str(outcome)
        assert f"step {step} " in outcome.errors, str(outcome)
        assert outcome.leftover_processes == [], str(outcome)
        assert_resumable(folder, flags, undisturbed(*FLAGS), None)
        return outcome, "found in that step, rank named, exit code 4; resumed to the same receipt"

    table.runs(one)


def last_step(outcome) -> int:
    steps = re.findall(rb'"step": (\d+)', outcome.metrics)
    return int(steps[-1]) if steps else 0


def test_a_nan_on_one_rank_stops_all_ranks_before_the_update(row, undisturbed):
    """A gradient is NaN once, with and without skipping; or a weight on one rank stays NaN."""
    table = row("NaN on one rank", 3, 20)

    def one(number, folder):
        rng = table.random(number)
        rank, step = rng.randrange(4), rng.randrange(1, STEPS - 1)
        kind = ("once, stop", "once, skip", "for good, stop")[number % 3]
        point = (
            {"phase": "step", "do": "nan-weight"}
            if kind == "for good, stop"
            else {"phase": "backward", "when": "after", "do": "nan-gradient"}
        )
        rule = {"rank": rank, "step": step, **point}
        flags = (*FLAGS, "--on-nonfinite", kind.split()[-1])
        outcome = run(folder, 4, *flags, sabotage=[rule])
        assert outcome.leftover_processes == [], str(outcome)
        assert outcome.code == CORRUPTION, str(outcome)
        (line,) = [line for line in outcome.errors.splitlines() if line.startswith("distdl: error:")]
        when = f"after step {step - 1}" if kind == "for good, stop" else f"at step {step}, but not when computed again"
        assert when in line, str(outcome)
        assert "Traceback" not in outcome.errors, str(outcome)
        assert last_step(outcome) == step - 1, str(outcome)
        if kind == "for good, stop":
            assert named_ranks(outcome) == [rank], str(outcome)
        assert_resumable(folder, flags, undisturbed(*FLAGS), None)
        return outcome, "all stop before that step's update, exit code 4; resumed to the same receipt"

    table.runs(one)
