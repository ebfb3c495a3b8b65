"""`python -m distdl.train` with traps: a chosen rank dies, raises, stops or corrupts a number at a chosen point.

The rules come as JSON in DISTDL_SABOTAGE: ``[{"rank": 1, "point": "reduction", "step": 3, "do": "kill"}]``. A rule
fires once, on the rank that the launcher numbered so, when the point is met for the `nth` time (the first, unless
given) in that step (any, if none is given; steps count from 1). The product has no hooks for this: methods are
wrapped here.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from distdl import cli, train
from distdl.job.launcher import read_launch

#: Where a rule can fire: the module and name that is wrapped, whether before or after it.
POINTS = {
    "data": ("distdl.engine.prepare:share_arrays", "before"),
    "data-mapped": ("distdl.parallel.shared:_map", "after"),
    "data-shared": ("distdl.engine.prepare:share_arrays", "after"),
    "step": ("distdl.engine.trainer:Trainer.step", "before"),
    "forward": ("distdl.nn.network:Sequential.forward", "before"),
    "backward": ("distdl.nn.network:Sequential.backward", "after"),
    "reduction": ("distdl.parallel.reduction:TreeReduction.total", "before"),
    "reduced": ("distdl.parallel.reduction:TreeReduction.total", "after"),
    "update": ("distdl.optim:Optimizer.update", "before"),
    "updated": ("distdl.optim:Optimizer.update", "after"),
    "evaluation": ("distdl.engine.trainer:Trainer.evaluate", "before"),
    "checkpoint": ("distdl.engine.coordinator:Coordinator.checkpoint", "before"),
    "checkpoint-written": ("distdl.engine.coordinator:Coordinator.checkpoint", "after"),
    "rename": ("os:rename", "before"),
    "renamed": ("os:rename", "after"),
    "fsync": ("os:fsync", "before"),
    "finished": ("distdl.engine.coordinator:Coordinator.finished", "before"),
    "recovery": ("distdl.parallel.recovery:_act", "before"),
    "shrink": ("distdl.parallel.mpi:MpiCommunicator.shrink", "before"),
    "told": ("distdl.engine.coordinator:Coordinator.finished", "after"),
}


class Trap:
    """One rule, and what it does to the process or to the arrays of the object whose method is wrapped."""

    def __init__(self, rule: dict[str, Any], here: dict[str, int | None]) -> None:
        self.rule = rule
        self.here = here
        self.left = rule.get("nth", 1)

    def met(self, owner: Any) -> None:
        """Count that the point was met; fire when the rule says so."""
        if self.left == 0 or self.rule.get("step") not in {None, self.here["step"]}:
            return
        self.left -= 1
        if self.left == 0:
            self.fire(owner)

    def fire(self, owner: Any) -> None:
        """Do what the rule says."""
        what, _, argument = self.rule["do"].partition(":")
        sys.stderr.write(f"[saboteur] rank {self.rule['rank']}: {self.rule['do']} at {self.rule['point']}\n")
        sys.stderr.flush()
        ACTIONS[what](owner, argument)


def _kill(_owner: Any, _argument: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is on its way


def _kill_soon(_owner: Any, argument: str) -> None:
    """Die some seconds later, wherever this process then is."""
    threading.Timer(float(argument), os.kill, (os.getpid(), signal.SIGKILL)).start()


def _raise(_owner: Any, _argument: str) -> None:
    raise RuntimeError("a defect, put there by a test")


def _memory(_owner: Any, _argument: str) -> None:
    raise MemoryError("no memory, says a test")


def _exit(_owner: Any, argument: str) -> None:
    sys.exit(int(argument))


def _segfault(_owner: Any, _argument: str) -> None:
    ctypes.string_at(0)


def _flip(vector: Any, argument: str) -> None:
    """Flip one bit of a float32 that matters: an element above the average, so that no sum rounds the change away."""
    element, bit = (int(number) for number in argument.split(","))
    candidates = (abs(vector) > abs(vector).mean()).nonzero()[0]
    vector.view("u4")[candidates[element % len(candidates)]] ^= 1 << bit


def _flip_weight(owner: Any, argument: str) -> None:
    _flip(_network(owner).parameters, argument)


def _flip_gradient(owner: Any, argument: str) -> None:
    _flip(_network(owner).gradients, argument)


def _nan_gradient(owner: Any, _argument: str) -> None:
    gradients = _network(owner).gradients
    gradients[gradients.size // 2] = float("nan")


def _nan_weight(owner: Any, _argument: str) -> None:
    parameters = _network(owner).parameters
    parameters[parameters.size // 2] = float("nan")


def _network(owner: Any) -> Any:
    return owner.state.network if hasattr(owner, "state") else owner


ACTIONS: dict[str, Callable[[Any, str], None]] = {
    "kill": _kill,
    "kill-soon": _kill_soon,
    "raise": _raise,
    "memory-error": _memory,
    "exit": _exit,
    "segfault": _segfault,
    "abort": lambda _owner, _argument: os.abort(),
    "stop": lambda _owner, _argument: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda _owner, argument: time.sleep(float(argument)),
    "flip-weight": _flip_weight,
    "flip-gradient": _flip_gradient,
    "nan-gradient": _nan_gradient,
    "nan-weight": _nan_weight,
}


def wrap(place: str, before: list[Trap], after: list[Trap], note: Callable[[Any], None] | None = None) -> None:
    """Replace a function or method by one that meets the traps before and after it."""
    module, _, name = place.partition(":")
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original = getattr(holder, last)

    def wrapped(*arguments: Any, **settings: Any) -> Any:
        owner = arguments[0] if arguments else None
        if note is not None:
            note(owner)
        for trap in before:
            trap.met(owner)
        result = original(*arguments, **settings)
        for trap in after:
            trap.met(owner)
        return result

    setattr(holder, last, wrapped)


def set_traps(rules: list[dict[str, Any]], rank: int) -> None:
    """Wrap what the rules of this rank name. NumPy is loaded by this, with the threads set before."""
    here: dict[str, int | None] = {"step": None}
    by_place: dict[str, tuple[list[Trap], list[Trap]]] = {}
    for rule in rules:
        place, when = POINTS[rule["point"]]
        traps = by_place.setdefault(place, ([], []))
        if rule["rank"] == rank:
            traps[when == "after"].append(Trap(rule, here))

    def note_step(trainer: Any) -> None:
        here["step"] = trainer.state.step + 1

    step = "distdl.engine.trainer:Trainer.step"
    wrap(step, *by_place.pop(step, ([], [])), note=note_step)
    for place, (before, after) in by_place.items():
        if before or after:
            wrap(place, before, after)


if __name__ == "__main__":
    cli.set_blas_threads(1)
    set_traps(json.loads(os.environ["DISTDL_SABOTAGE"]), read_launch().rank)
    sys.exit(cli.run(train.main))
