"""The signature of a network: the meaning of its inputs and outputs. With it a checkpoint can be used without its data.

Every checkpoint stores it as JSON. Anyone can write a file, so `Signature.from_json` trusts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from distdl.data.normalization import Normalization
from distdl.errors import UserError
from distdl.image_options import Resize

Task = Literal["classification", "segmentation", "regression"]


def default_loss(task: Task) -> str:
    """Return the name of the loss for a task."""
    return "mean_squared_error" if task == "regression" else "cross_entropy"


@dataclass(frozen=True)
class Signature:
    """The meaning of a network's inputs and outputs."""

    task: Task
    """A label for each image, a label for each pixel, or numbers for each image."""
    outputs: int
    """The number of classes; for regression of numbers."""
    names: tuple[str, ...] | None
    """The user's names of the classes, or of the numbers; None: they have only their index."""
    image_shape: tuple[int, int, int]
    """Height, width and channels of an image."""
    pixels: Literal["uint8", "float32"]
    mean: tuple[float, ...]
    """By channel: ``(pixel - mean) / deviation`` is the input."""
    deviation: tuple[float, ...]
    resize: str | None = None
    """How images of other sizes become images of this size, as `--resize` says; None: they are refused."""
    target_mean: tuple[float, ...] | None = None
    """By number, for regression with standardized targets: ``target_deviation · output + target_mean`` is the number in
    the units of the user. None: an output is that number."""
    target_deviation: tuple[float, ...] | None = None

    def name_of(self, output: int) -> str:
        """Return the name of a class or number.

        >>> Signature("classification", 2, ("cat", "dog"), (8, 8, 1), "uint8", (0.0,), (1.0,)).name_of(1)
        'dog'
        """
        return str(output) if self.names is None else self.names[output]

    @property
    def channels_of_files(self) -> int | None:
        """The channels of an image file as the network takes it; None: it takes no image files."""
        channels = self.image_shape[2]
        return channels if self.pixels == "uint8" and channels in {1, 3} else None

    @property
    def normalization(self) -> Normalization:
        """The normalization of the images."""
        return Normalization(np.array(self.mean, np.float32), np.array(self.deviation, np.float32))

    @property
    def target_normalization(self) -> Normalization | None:
        """The normalization of the numbers to predict; None: they are not standardized."""
        if self.target_mean is None or self.target_deviation is None:
            return None
        return Normalization(np.array(self.target_mean, np.float32), np.array(self.target_deviation, np.float32))

    def loss_named(self, name: str) -> str:
        """Return the name of the loss that ``--loss name`` selects."""
        return default_loss(self.task) if name == "auto" else name

    def to_json(self) -> dict[str, Any]:
        """Return the signature as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Signature:
        """Return the signature that `to_json` gave; raise `ValueError` if a value is missing or cannot be used.

        The values of a later version that this version does not know are ignored.
        """
        try:
            given = ["image_shape", "mean", "deviation"]
            given += [name for name in ("target_mean", "target_deviation") if values.get(name) is not None]
            lists = {name: tuple(values[name]) for name in given}
            names = None if values["names"] is None else tuple(values["names"])
            known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
            found = cls(**{**known, **lists, "names": names})
        except (LookupError, TypeError) as error:
            raise ValueError(f"the signature is incomplete: {error}") from None
        target_mean, target_deviation = found.target_mean or (), found.target_deviation or ()
        sizes, deviations = (*found.image_shape, found.outputs), (*found.deviation, *target_deviation)
        if not (
            found.task in get_args(Task)
            and found.pixels in ("uint8", "float32")
            and len(found.image_shape) == 3
            and all(type(size) is int and size > 0 for size in sizes)
            and len(found.mean) == len(found.deviation) == found.image_shape[2]
            and len(target_mean) == len(target_deviation)
            and len(target_mean) in {0, found.outputs if found.task == "regression" else 0}
            and all(type(one) is float and math.isfinite(one) for one in (*found.mean, *target_mean, *deviations))
            and all(deviation > 0 for deviation in deviations)
            and (found.resize is None or _is_resize(found.resize))
        ):
            raise ValueError("the signature has a value that is not valid")
        if names is not None and (len(names) != found.outputs or not all(isinstance(name, str) for name in names)):
            raise ValueError(f"the signature does not name {found.outputs} outputs")
        return found


def _is_resize(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(Resize.parse(value))
    except UserError:
        return False
