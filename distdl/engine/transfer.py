"""Transfer learning: a run that begins with the weights of another one, and parameters that stay as they are.

What `--init-from` names is read when a new run begins and never again: from there on the weights are the run's own,
in its own checkpoints. What `--freeze` names is not updated. Source: section 8.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distdl.engine.storage.checkpoints import described
from distdl.engine.storage.run_folder import find_checkpoint
from distdl.errors import UserError, unknown_name
from distdl.nn import Sequential

#: Of tensors that a line names one by one.
MOST_NAMED = 8


@dataclass(frozen=True)
class Taken:
    """What a run has taken from a checkpoint, by name, and what begins as it would have without one."""

    path: Path
    names: Sequence[str]
    anew: Sequence[str]
    complaints: Sequence[str]
    """What was wrong with newer checkpoints."""

    def __str__(self) -> str:
        count = len(self.names) + len(self.anew)
        return f"begins with {len(self.names)} of {count} tensors from {self.path}; anew: {_listed(self.anew)}"


def take(given: str, network: Sequential, model: str) -> Taken:
    """Copy a checkpoint's tensors (of a run folder, the newest intact one's) to where name, shape and dtype agree.

    Parameters and buffers are taken, the optimizer's vectors are not. Raises `UserError` where there is no checkpoint,
    or nothing agrees with the network of `model`, `DamagedFileError` for a damaged one.
    """
    try:
        path, checkpoint, complaints = find_checkpoint(Path(given), f"--init-from {given}")
    except OSError as error:
        raise UserError(f"cannot look into {error.filename}: {error.strerror}; give another --init-from") from None
    own = [*network.named_parameters(), *network.named_buffers()]
    taken, anew = [], []
    for name, array in own:
        found = checkpoint.tensors.get(name)
        if found is None or (found.shape, found.dtype) != (array.shape, array.dtype):
            anew.append(name)
        else:
            np.copyto(array, found)
            taken.append(name)
    if not taken:
        such_as = "".join(
            f": {name} is {described(checkpoint.tensors.get(name))} there and {described(array)} here"
            for name, array in own[:1]
        )
        raise UserError(
            f"--init-from {path} has no tensor with the name and shape of one in --model {model}{such_as}; give the "
            "run of a network that has such layers"
        )
    return Taken(path, taken, anew, complaints)


def frozen_slices(network: Sequential, freeze: str | None) -> list[slice]:
    """Return the parts of the flat vectors that are frozen: of parameters, and of all below layers, of these names.

    Raises `UserError` for a name that is none, and where nothing is left to train.

    >>> from distdl.nn import Affine
    >>> frozen_slices(Sequential([Affine(3), Affine(2)], (4,)), "affine_1")
    [slice(0, 12, None), slice(16, 19, None)]
    """
    if freeze is None:
        return []
    given = [name.strip() for name in freeze.split(",")]
    parts = [name.split(".") for name in network.slices]
    known = {".".join(names[:end]) for names in parts for end in range(1, len(names) + 1)}
    for name in given:
        if name not in known:
            raise unknown_name("layer or parameter of --freeze", name, known)
    frozen = [where for name, where in network.slices.items() if any(f"{name}.".startswith(f"{one}.") for one in given)]
    if len(frozen) == len(network.slices):
        raise UserError(f"--freeze {freeze} leaves nothing to train: leave out one of {', '.join(given)}")
    return frozen


def _listed(names: Sequence[str]) -> str:
    """Return the names, or the first of many and how many more there are.

    >>> _listed(["affine_2.weight", "affine_2.bias"]), _listed([])
    ('affine_2.weight, affine_2.bias', 'none')
    >>> _listed([f"affine_{number}.weight" for number in range(50)]).split(", ")[-2:]
    ['affine_7.weight', 'and 42 more']
    """
    more = [f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return ", ".join([*names[:MOST_NAMED], *more]) or "none"
