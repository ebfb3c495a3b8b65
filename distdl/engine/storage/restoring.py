"""Copy the tensors of a checkpoint into arrays of the same names, shapes and dtypes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.engine.storage.checkpoints import Checkpoint
from distdl.errors import UserError


def copy_tensors(checkpoint: Checkpoint, into: list[tuple[str, NDArray[Any]]], name: str) -> None:
    """Copy the tensors into arrays of the same names; raise `UserError` if names, shapes or dtypes differ."""
    wanted = {key: (array.shape, array.dtype) for key, array in into}
    found = {key: (array.shape, array.dtype) for key, array in checkpoint.tensors.items()}
    if wanted != found:
        differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        there, here = (described(arrays.get(differing[0])) for arrays in (checkpoint.tensors, dict(into)))
        what = f"{differing[0]} is {there} there and {here} here"
        raise UserError(f"{name} is a checkpoint of another model or version: {what}")
    for key, array in into:
        np.copyto(array, checkpoint.tensors[key])


def described(array: NDArray[Any] | None) -> str:
    """Return the dtype and shape of a tensor, for a message."""
    return "absent" if array is None else f"{array.dtype} {array.shape}"
