"""Run `python -m distdl.train` with faults: a given rank dies, raises, stops or changes a number at a given point.

The rules are JSON in DISTDL_SABOTAGE: ``[{"rank": 1, "phase": "reduction", "step": 3, "do": "kill"}]``. A rule acts
once, on the rank with that number at the start. Its other fields are those of `fail_at`, which lists the points of a
run: `phase`, `when` (default "before"), `step` and `nth`. Three further points are calls of the operating system:
"os.rename", "os.fsync" and "mmap.mmap".
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distdl import cli, train_command
from distdl.job.launched_by import read_launch

SYSTEM_CALLS = ("os.rename", "os.fsync", "mmap.mmap")


def _kill(_owner: Any, _argument: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # until the signal arrives


def _kill_soon(_owner: Any, argument: str) -> None:
    """Die some seconds later, at any place."""
    threading.Timer(float(argument), os.kill, (os.getpid(), signal.SIGKILL)).start()


def _raise(_owner: Any, _argument: str) -> None:
    raise RuntimeError("a defect injected by a test")


def _memory(_owner: Any, _argument: str) -> None:
    raise MemoryError("no memory, simulated by a test")


def _os_error(_owner: Any, argument: str) -> None:
    raise OSError(int(argument), os.strerror(int(argument)))


def _lose_a_peer(_owner: Any, _argument: str) -> None:
    """Raise `PeerLost` on this rank although no other rank has died."""
    from distdl.errors import PeerLost

    raise PeerLost("a rank was lost, simulated by a test")


def _exit(_owner: Any, argument: str) -> None:
    sys.exit(int(argument))


def _segfault(_owner: Any, _argument: str) -> None:
    ctypes.string_at(0)


def _flip(vector: Any, argument: str) -> None:
    """Flip one bit of an element above the average, so that the change does not vanish by rounding in a sum."""
    element, bit = (int(number) for number in argument.split(","))
    candidates = (abs(vector) > abs(vector).mean()).nonzero()[0]
    vector.view("u4")[candidates[element % len(candidates)]] ^= 1 << bit


def _flip_weight(state: Any, argument: str) -> None:
    _flip(state.network.parameters, argument)


def _flip_gradient(owner: Any, argument: str) -> None:
    _, record = owner
    _flip(record["gradient"], argument)


def _nan_gradient(owner: Any, _argument: str) -> None:
    _, record = owner
    record["gradient"][record["gradient"].size // 2] = float("nan")


def _nan_weight(state: Any, _argument: str) -> None:
    parameters = state.network.parameters
    parameters[parameters.size // 2] = float("nan")


#: The actions of rules. "do" is the name of an action, or name:argument.
ACTIONS: dict[str, Callable[[Any, str], None]] = {
    "kill": _kill,
    "kill-soon": _kill_soon,
    "raise": _raise,
    "memory-error": _memory,
    "os-error": _os_error,
    "lose-a-peer": _lose_a_peer,
    "exit": _exit,
    "segfault": _segfault,
    "abort": lambda _owner, _argument: os.abort(),
    "signal": lambda _owner, argument: signal.raise_signal(signal.Signals[argument]),
    "sleep": lambda _owner, argument: time.sleep(float(argument)),
    "flip-weight": _flip_weight,  # at the point "step"
    "flip-gradient": _flip_gradient,  # after "backward"
    "nan-gradient": _nan_gradient,  # after "backward"
    "nan-weight": _nan_weight,  # at the point "step"
}


class SystemCall:
    """A replacement for a call of the operating system. It runs actions before and after some of the calls."""

    def __init__(self, name: str) -> None:
        module, _, function = name.partition(".")
        self._holder = importlib.import_module(module)
        self._original = getattr(self._holder, function)
        self._rules: list[dict[str, Any]] = []
        #: The step that this rank is in.
        self.step: int | None = None
        setattr(self._holder, function, self)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        due = [rule for rule in self._rules if rule["step"] in {None, self.step} and self._counted(rule)]
        for rule in due:
            if rule["when"] == "before":
                rule["action"](None)
        result = self._original(*arguments, **named)
        for rule in due:
            if rule["when"] == "after":
                rule["action"](None)
        return result

    def fail_at(
        self, *, action: Callable[[Any], object], when: str = "before", step: int | None = None, nth: int = 1
    ) -> None:
        """Call `action` before or after the `nth` call, in that step if one is given."""
        self._rules.append({"action": action, "when": when, "step": step, "left": nth})

    def _counted(self, rule: dict[str, Any]) -> bool:
        rule["left"] -= 1
        return rule["left"] == 0


def set_faults(rules: Sequence[Mapping[str, Any]]) -> None:
    """Register the faults of this rank. This loads NumPy, so the number of threads must be set before."""
    from distdl.engine.fault_injection import fail_at

    rank = read_launch().rank
    calls: dict[str, SystemCall] = {}

    def note_step(state: Any) -> None:
        for call in calls.values():
            call.step = state.step + 1

    for rule in rules:
        point = {name: value for name, value in rule.items() if name not in {"rank", "phase", "do"}}
        phase, action = rule["phase"], _action(rule)
        if phase not in SYSTEM_CALLS:
            fail_at(phase, rank=rule["rank"], action=action, **point)
        elif rule["rank"] == rank:
            if phase not in calls:
                calls[phase] = SystemCall(phase)
            calls[phase].fail_at(action=action, **point)
    if calls:
        fail_at("step", rank=rank, nth=None, action=note_step)


def _action(rule: Mapping[str, Any]) -> Callable[[Any], None]:
    do = rule.get("do", "kill")
    name, _, argument = do.partition(":")

    def act(owner: Any) -> None:
        sys.stderr.write(f"[saboteur] rank {rule['rank']}: {do} {rule.get('when', 'before')} {rule['phase']}\n")
        sys.stderr.flush()
        ACTIONS[name](owner, argument)

    return act


if __name__ == "__main__":
    cli.set_blas_threads(1)
    set_faults(json.loads(os.environ["DISTDL_SABOTAGE"]))
    sys.exit(cli.run(train_command.main))
