"""A schedule is a pure function of the step."""

import math

import pytest

from distdl.errors import UserError
from distdl.schedules import SCHEDULES, constant, cosine, make_schedule, step_decay, warmed_up

STEPS = [0, 1, 6, 7, 8, 13, 14, 21, 10_000]
EXPECTED = {
    "constant": [0.5] * len(STEPS),
    "step": [0.5 * 0.1 ** (step // 7) for step in STEPS],
    "plateau": [0.5] * len(STEPS),  # its reductions depend on validation
    "cosine": [0.25 * (1 + math.cos(math.pi * min(step, 20) / 20)) for step in STEPS],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_gives_the_rate_of_its_formula_in_any_order(name):
    schedule = make_schedule(name, 0.5, every_steps=7, factor=0.1, total_steps=20)
    assert [schedule(step) for step in STEPS] == EXPECTED[name]
    assert [schedule(step) for step in reversed(STEPS)] == EXPECTED[name][::-1]


def test_the_rate_changes_after_every_steps_steps():
    assert [step_decay(8.0, every_steps=3, factor=0.5)(step) for step in range(7)] == [8, 8, 8, 4, 4, 4, 2]
    assert [step_decay(1.0, every_steps=1, factor=2.0)(step) for step in range(4)] == [1, 2, 4, 8]
    assert constant(0.01)(0) == constant(0.01)(10**9) == 0.01


def test_an_unknown_schedule_is_an_error_that_lists_the_known():
    with pytest.raises(
        UserError, match=r"unknown schedule 'stpe': .* constant, cosine, plateau, step; did you mean 'step'\?"
    ):
        make_schedule("stpe", 0.1, every_steps=1, factor=0.1, total_steps=1)


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_below_one_step_is_an_error(length):
    with pytest.raises(UserError, match=f"at least 1 step, not {length}"):
        step_decay(0.1, every_steps=length, factor=0.1)
    with pytest.raises(UserError, match=f"at least 1 step, not {length}"):
        cosine(0.1, total_steps=length)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_rises_evenly_to_the_schedule(name):
    settings = {"every_steps": 3, "factor": 0.1, "total_steps": 20}
    schedule, warm = make_schedule(name, 0.5, **settings), make_schedule(name, 0.5, **settings, warmup_steps=8)
    for step in range(8):
        assert warm(step) == pytest.approx(schedule(step) * (step + 1) / 8)
    assert [warm(step) for step in range(7, 25)] == [schedule(step) for step in range(7, 25)]
    assert warmed_up(constant(1.0), 1)(0) == 1.0


def test_the_cosine_equals_pytorchs():
    torch = pytest.importorskip("torch")
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.3)
    theirs, rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=17), []
    for _ in range(18):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [cosine(0.3, 17)(step) for step in range(18)] == pytest.approx(rates, abs=1e-9)
