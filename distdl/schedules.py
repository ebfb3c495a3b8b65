"""Learning-rate schedules: pure functions from the step (0, 1, …) to the learning rate."""

import math
from collections.abc import Callable

from distdl import elementary
from distdl.elementary import power
from distdl.errors import UserError, unknown_name

Schedule = Callable[[int], float]


def constant(learning_rate: float) -> Schedule:
    """Return the schedule that is always `learning_rate`, as in all training runs of the book (section 4.5)."""
    return lambda step: learning_rate  # noqa: ARG005


def step_decay(learning_rate: float, every_steps: int, factor: float) -> Schedule:
    """Return the schedule ``learning_rate · factor^⌊step / every_steps⌋``.

    Sources: the book mentions learning-rate decay (section 8.1.2); in steps: He et al. 2015.

    >>> [step_decay(1.0, every_steps=2, factor=0.5)(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    if every_steps < 1:
        raise UserError(f"a step schedule needs a length of at least 1 step, not {every_steps}")
    return lambda step: learning_rate * power(factor, step // every_steps)


def cosine(learning_rate: float, total_steps: int) -> Schedule:
    """Return the schedule ``learning_rate · (1 + cos(π · step / total_steps)) / 2``, from the full rate down to 0.

    Sources: the book mentions learning-rate decay (section 8.1.2); Loshchilov and Hutter 2017, *SGDR*, no restarts.

    >>> [round(cosine(1.0, total_steps=4)(step), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if total_steps < 1:
        raise UserError(f"a cosine schedule needs a length of at least 1 step, not {total_steps}")
    return lambda step: learning_rate * 0.5 * (1 + elementary.cosine(math.pi * min(step, total_steps) / total_steps))


def warmed_up(schedule: Schedule, steps: int) -> Schedule:
    """Return `schedule` with its first n = `steps` rates multiplied by 1/n, 2/n … n/n.

    Not in the book. Source: Goyal et al. 2017, *Accurate, large minibatch SGD*, section 2.2 of the paper.

    >>> [warmed_up(constant(1.0), 4)(step) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return lambda step: schedule(step) * min(step + 1, steps) / steps if step < steps else schedule(step)


SCHEDULES = ("constant", "step", "cosine", "plateau")


def make_schedule(
    name: str, learning_rate: float, *, every_steps: int, factor: float, total_steps: int, warmup_steps: int = 0
) -> Schedule:
    """Return the schedule called `name`; raise `UserError`, listing the known ones, for an unknown name.

    `every_steps` and `factor` belong to the step schedule; `total_steps` is the length of the cosine. The plateau
    schedule is constant here: its reductions depend on validation, so the trainer multiplies them in.
    """
    if name in {"constant", "plateau"}:
        schedule = constant(learning_rate)
    elif name == "step":
        schedule = step_decay(learning_rate, every_steps, factor)
    elif name == "cosine":
        schedule = cosine(learning_rate, total_steps)
    else:
        raise unknown_name("schedule", name, SCHEDULES)
    return warmed_up(schedule, warmup_steps) if warmup_steps else schedule
