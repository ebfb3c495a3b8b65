"""Steps whose loss or gradient is infinite or NaN: found by all ranks at once, located in a micro-batch.

The sum is the same on every rank. So all ranks see at the same step that it is not finite, before any update. They then
compute the step again, and each rank looks at its micro-batches one by one.
"""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.config import TrainConfig
from distdl.engine.checks import corruption
from distdl.engine.state import TrainingState
from distdl.engine.step import OptimizerStep, StepObserver
from distdl.errors import DivergedError

#: Saved micro-batches of one run.
MOST_SAVED = 10


@dataclass(frozen=True)
class Fault:
    """What was not finite in a step (counted from 1), and the lowest micro-batch and the rank that it came from."""

    step: int
    what: str
    micro_batch: int | None = None
    rank: int | None = None
    #: Everything was finite when it was computed again.
    transient: bool = False
    saved_in: str | None = None

    def __str__(self) -> str:
        text = f"{self.what} at step {self.step}"
        if self.micro_batch is not None:
            saved = "" if self.saved_in is None else f"; the micro-batch is saved in {self.saved_in}"
            return f"{text}, first in micro-batch {self.micro_batch} (computed by rank {self.rank}){saved}"
        if self.transient:
            return f"{text}, but not when computed again: a hardware fault, on an unknown rank"
        return f"{text}, though each micro-batch is finite: their sum overflows"


def file_of(fault: Fault, samples: Mapping[str, NDArray[Any]], folder: Path) -> tuple[Path, bytes] | None:
    """Return the path and content of the file for the micro-batch of a fault; None after `MOST_SAVED` files."""
    path = folder / f"not-finite-step-{fault.step:09d}.npz"
    if len(list(folder.glob("not-finite-*.npz"))) >= MOST_SAVED and not path.exists():
        return None
    arrays: dict[str, Any] = {"step": fault.step, "micro_batch": fault.micro_batch, **samples}
    content = io.BytesIO()
    np.savez(content, **arrays)
    return path, content.getvalue()


class FiniteCheck(StepObserver):
    """Stops the training at a step that is not finite, or skips the update of that step.

    `save` saves the micro-batch of a fault and returns the file's name, the same on all ranks. `fault` is that of the
    latest step, None if the step was finite. A fault that does not occur again when the step is recomputed always stops
    the training: no bit may depend on a hardware fault.
    """

    def __init__(self, config: TrainConfig, state: TrainingState, save: Callable[[Fault], str | None]) -> None:
        self.fault: Fault | None = None
        self._config = config
        self._state = state
        self._save = save

    def allows_update(self, step: OptimizerStep) -> bool:
        """Return whether the sums are finite. Collective if they are not."""
        self.fault = None
        what = what_is_not_finite(step.total)
        if what is None:
            return True
        corruption.compare_replicas(step.communicator, self._state)  # the weights of one rank alone may be at fault
        fault = locate(step, self._state.step + 1, what)
        if fault.transient:
            raise corruption.agreed(f"{fault}; continue")
        if fault.micro_batch is not None:
            fault = replace(fault, saved_in=self._save(fault))
        if self._config.on_nonfinite == "stop":
            raise diverged(str(fault), self._config, self._state)
        self.fault = fault
        return False


def what_is_not_finite(record: Mapping[str, NDArray[Any]]) -> str | None:
    """Return what is not finite in the record of a micro-batch or a step; None if all is.

    >>> what_is_not_finite({"loss_sum": np.array([np.inf]), "gradient": np.zeros(3)})
    'the loss is inf'
    """
    loss_sum = float(record["loss_sum"][0])
    if not math.isfinite(loss_sum):
        return f"the loss is {loss_sum}"
    return None if is_finite(record["gradient"]) else "the gradient is not finite"


def locate(step: OptimizerStep, number: int, what: str) -> Fault:
    """Compute step `number` again; return where the fault came from. `step.total` holds the new sums. Collective."""
    step.network.gradients.fill(0)  # also the padding between parameters, which no backward pass writes
    mine: int | None = None
    step.reduction.begin(step.shards)
    for index, record in step.compute_shard(step.shards[step.communicator.rank]):
        if what_is_not_finite(record) is not None:
            mine = index if mine is None else min(mine, index)
        step.reduction.add(index, record)
    step.total = step.reduction.total()
    found = [(index, rank) for rank, index in enumerate(step.communicator.allgather_json(mine)) if index is not None]
    if found:
        return Fault(number, what, *min(found))
    return Fault(number, what, transient=what_is_not_finite(step.total) is None)


def diverged(what: str, config: TrainConfig, state: TrainingState) -> DivergedError:
    """Return the error for numbers that are not finite. Every rank has the same numbers."""
    if state.step == state.progress.skipped_steps:
        advice = "no update came before it; check the data, the initial weights and the model, not --lr"
    else:
        given = {"--lr": config.lr, "--weight-decay": config.weight_decay, "--l1-decay": config.l1_decay}
        smaller = " or ".join(f"{flag} than {value:g}" for flag, value in given.items() if value)
        advice = f"training has diverged; start a new run with a smaller {smaller}"
    return DivergedError(f"{what}: {advice}", agreed=True)


def is_finite(array: NDArray[Any]) -> bool:
    """Return whether every element is finite. The sum of squares is a fast test; only if it overflows, look at each."""
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())
