"""Learning-rate schedules: pure functions from the step (0, 1, …) to the learning rate."""

from __future__ import annotations

from collections.abc import Callable

from distdl.errors import UserError, unknown_name

Schedule = Callable[[int], float]


def constant(learning_rate: float) -> Schedule:
    """Return the schedule that always gives `learning_rate`."""
    return lambda step: learning_rate  # noqa: ARG005


def step_decay(learning_rate: float, every_steps: int, factor: float) -> Schedule:
    """Return the schedule ``learning_rate · factor^⌊step / every_steps⌋``.

    >>> [step_decay(1.0, every_steps=2, factor=0.5)(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    if every_steps < 1:
        raise UserError(f"a step schedule needs a length of at least 1 step, not {every_steps}")
    return lambda step: learning_rate * factor ** (step // every_steps)


SCHEDULES = ("constant", "step")


def make_schedule(name: str, learning_rate: float, *, every_steps: int, factor: float) -> Schedule:
    """Return the schedule called `name`; raise `UserError` listing the known ones otherwise."""
    if name == "constant":
        return constant(learning_rate)
    if name == "step":
        return step_decay(learning_rate, every_steps, factor)
    raise unknown_name("schedule", name, SCHEDULES)
