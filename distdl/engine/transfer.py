"""Transfer learning: start with the weights of another run or of PyTorch, and freeze parameters.

A new run reads `--init-from` once. From then on its weights are in its own checkpoints. `--freeze` names parameters
that are not updated. Source: section 8.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distdl.engine.pytorch_weights import in_our_layouts, read_state_dict
from distdl.engine.storage.restoring import described
from distdl.engine.storage.run_folder import find_checkpoint
from distdl.errors import UserError, unknown_name
from distdl.nn import Sequential

#: The most tensors that a message names.
MOST_NAMED = 8


@dataclass(frozen=True)
class Transfer:
    """The tensors that a run copied from a checkpoint, by name, and the others, which stay initialized by the seed."""

    path: Path
    copied: Sequence[str]
    initialized: Sequence[str]
    complaints: Sequence[str]
    """The damage of newer checkpoints."""

    def __str__(self) -> str:
        copied, count = len(self.copied), len(self.copied) + len(self.initialized)
        return f"begins with {copied} of {count} tensors from {self.path}; initialized: {_listed(self.initialized)}"


def copy_weights(given: str, network: Sequential, model: str) -> Transfer:
    """Copy the parameters and buffers of a checkpoint into the network, if name, shape and dtype agree.

    `given` is a checkpoint, a run folder with its newest intact one, or a state dict of PyTorch. Raises `UserError` if
    there is none, or if no tensor agrees with the network of `model`; `DamagedFileError` if the file is damaged.
    """
    path, complaints = Path(given), list[str]()
    try:
        if (state_dict := read_state_dict(path)) is None:
            path, checkpoint, complaints = find_checkpoint(path, f"--init-from {given}")
    except OSError as error:
        raise UserError(f"cannot access {error.filename}: {error.strerror}; give another --init-from") from None
    tensors = checkpoint.tensors if state_dict is None else in_our_layouts(state_dict, network, model, path)
    own = [*network.named_parameters(), *network.named_buffers()]
    copied, initialized = [], []
    for name, array in own:
        found = tensors.get(name)
        if found is None or (found.shape, found.dtype) != (array.shape, array.dtype):
            initialized.append(name)
        else:
            np.copyto(array, found)
            copied.append(name)
    if not copied:
        such_as = "".join(
            f": {name} is {described(tensors.get(name))} there and {described(array)} here" for name, array in own[:1]
        )
        raise UserError(
            f"--init-from {path} has no tensor with the name and shape of one in --model {model}{such_as}; give the "
            "run of a network that has such layers"
        )
    return Transfer(path, copied, initialized, complaints)


def frozen_slices(network: Sequential, freeze: str | None) -> list[slice]:
    """Return the slices of the flat vectors that are frozen: the named parameters, and all parameters of named layers.

    Raises `UserError` for an unknown name, and if nothing remains to train.

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
    """Return the names; of many the first, and the number of the others.

    >>> _listed(["affine_2.weight", "affine_2.bias"]), _listed([])
    ('affine_2.weight, affine_2.bias', 'none')
    >>> _listed([f"affine_{number}.weight" for number in range(50)]).split(", ")[-2:]
    ['affine_7.weight', 'and 42 more']
    """
    more = [f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return ", ".join([*names[:MOST_NAMED], *more]) or "none"
