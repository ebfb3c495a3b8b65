"""Initial weights from PyTorch: a state dict in a safetensors file, without pickle.

Its tensors have torchvision's names, if the model is one of `TORCHVISION`, or the names that `distdl.export` writes.
`distdl.nn.pytorch_layouts` has the layouts. Anyone can write a file, so nothing in it is trusted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors
from numpy.typing import NDArray

from distdl.engine.storage.checkpoints import LARGEST_HEADER_BYTES
from distdl.errors import DamagedFileError, UserError
from distdl.host_memory import available_bytes, available_to_this_process
from distdl.json_files import parsed_json
from distdl.nn import Flatten, LocalResponseNorm, Sequential
from distdl.nn.models.googlenet import MODULES
from distdl.nn.pytorch_layouts import LaidOut, all_laid_out
from distdl.regular_files import open_regular

#: The files that torch.save writes begin like this: a zip archive, or in old versions a pickle.
PICKLED = (b"PK\x03\x04", b"\x80\x02")
#: The epsilon of BatchNorm in torchvision's GoogLeNet, and the names of its classifiers that we do not have.
GOOGLENET_EPSILON = 0.001
AUXILIARY = ("aux1.", "aux2.")

StateDict: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Of each tensor the dtype, shape and bytes, as `safetensors.deserialize` returns them."""


@dataclass(frozen=True)
class Source:
    """The tensors of a state dict from which one of ours comes."""

    names: tuple[str, ...]
    combined: Callable[..., NDArray[np.float32] | None] | None = None
    """Computes our tensor, in PyTorch's layout, from these, or None if they do not fit. None: it is the only one."""
    weight: str | None = None
    """Our name of the weight that a folded bias belongs to: it is of no use with another weight."""


def read_state_dict(path: Path) -> StateDict | None:
    """Return the state dict in a safetensors file; None for anything else, such as a checkpoint of distdl.

    Raises `UserError` for a pickled state dict, `DamagedFileError` if the file is damaged, and `OSError`.
    """
    if not path.is_file():
        return None
    with open_regular(path, follow=True) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8 + LARGEST_HEADER_BYTES)
        if start.startswith(PICKLED):
            raise UserError(
                f"--init-from {path} is a pickled file of PyTorch, which could run any code: in PyTorch, write it with "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)"
            )
        if not _is_state_dict(start):
            return None
        if 3 * size > (room := min(available_bytes(), available_to_this_process())):
            raise DamagedFileError(f"{path} is damaged, or too large: {size} bytes, and {room:.0f} are available")
        data = start + file.read(max(0, size - len(start)))
    try:
        return dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None


def _is_state_dict(start: bytes) -> bool:
    """Return whether a file begins like a safetensors file that is no checkpoint of distdl, damaged or not."""
    header = start[8 : 8 + int.from_bytes(start[:8], "little")]
    if b"distdl checkpoint" in header:
        return False
    try:
        entries = parsed_json(header)
    except (ValueError, RecursionError):
        return False
    if not isinstance(entries, dict):
        return False
    metadata = entries.get("__metadata__")
    return not (isinstance(metadata, dict) and "distdl" in metadata)


def in_our_layouts(state_dict: StateDict, network: Sequential, model: str, path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a state dict by our names and in our layouts, also those of another shape than ours.

    Raises `UserError` if no name is known, if the file is of another model, or if a tensor is not finite float32.
    """
    layouts = dict(all_laid_out(network.stack))
    of_torchvision, exported = torchvision_sources(model, network, layouts), exported_sources(layouts)
    sources = exported
    if any(one in state_dict for source in of_torchvision.values() for one in source.names):
        sources = of_torchvision
        _refuse_another_model(state_dict, sources, model, path)
    found = {}
    for name, source in sources.items():
        if all(one in state_dict for one in source.names):
            arrays = [_array(state_dict, one, path) for one in source.names]
            theirs = arrays[0] if source.combined is None else source.combined(*arrays)
            if theirs is not None and theirs.ndim == layouts[name].array.ndim:
                found[name] = layouts[name].from_pytorch(_finite(theirs, source.names[0], path))
    if not found:
        known = [next(iter(one.values())).names[0] for one in (of_torchvision, exported) if one]
        raise UserError(
            f"--init-from {path} has no tensor of a name that is known for --model {model}: it has "
            f"{min(state_dict, default='none at all')}, expected names such as {' (torchvision) or '.join(known)} "
            "(distdl.export); rename the tensors, or give another file"
        )

    def fits(name: str) -> bool:
        return name in found and found[name].shape == layouts[name].array.shape

    return {name: one for name, one in found.items() if (weight := sources[name].weight) is None or fits(weight)}


def _array(state_dict: StateDict, name: str, path: Path) -> NDArray[np.float32]:
    """Return a tensor; raise `UserError` if it is not finite float32, or a variance below 0."""
    tensor = state_dict[name]
    if tensor["dtype"] != "F32":
        raise UserError(
            f"--init-from {path} has {name} in {tensor['dtype']}, expected F32: convert the weights, in PyTorch by "
            ".float()"
        )
    array = _finite(np.frombuffer(tensor["data"], "<f4").reshape(tensor["shape"]), name, path)
    if name.endswith("running_var") and array.size and array.min() < 0:
        raise UserError(f"--init-from {path} has a variance below 0 in {name}: give another file")
    return array


def _finite(array: NDArray[np.float32], name: str, path: Path) -> NDArray[np.float32]:
    if not np.isfinite(array).all():
        raise UserError(f"--init-from {path} has NaN or infinite numbers in {name}: give another file")
    return array


def _refuse_another_model(state_dict: StateDict, sources: Mapping[str, Source], model: str, path: Path) -> None:
    """Raise `UserError` if the file has a convolution that torchvision's model of this name has not.

    Names such as ``features.3.weight`` are those of several models. Other tensors, such as those of another head, are
    left out like any that we do not have.
    """
    known = {one for source in sources.values() for one in source.names}
    for name, tensor in state_dict.items():
        if len(tensor["shape"]) == 4 and name not in known and not name.startswith(AUXILIARY):
            raise UserError(
                f"--init-from {path} is not of torchvision's {model}: it has {name}, which that model has not; "
                f"give the weights of {model}, or another --model"
            )


def exported_sources(layouts: Mapping[str, LaidOut]) -> dict[str, Source]:
    """Return where each of our tensors comes from in a file of `distdl.export`."""
    return {name: Source((f"{name.rpartition('.')[0]}.{one.name}",)) for name, one in layouts.items()}


def torchvision_sources(model: str, network: Sequential, layouts: Mapping[str, LaidOut]) -> dict[str, Source]:
    """Return where each of our tensors comes from in torchvision's model of this name; none for another model."""
    if model not in TORCHVISION:
        return {}
    modules, found = dict(TORCHVISION[model](network)), {}
    for name, layout in layouts.items():
        theirs = modules[name.rpartition(".")[0]]
        if model == "googlenet" and theirs != "fc":
            found[name] = _folded(theirs, name)
        else:
            found[name] = Source((f"{theirs}.{layout.name}",))
    return found


def _folded(module: str, name: str) -> Source:
    """Return the source of our tensor `name`: the convolution does the work of one without bias and a BatchNorm.

    ``weight = their weight gamma / sigma`` and ``bias = beta - mean gamma / sigma``, with ``sigma = sqrt(variance +
    epsilon)``.
    """
    moments = (f"{module}.bn.weight", f"{module}.bn.running_var")
    layer, _, own = name.rpartition(".")
    if own == "weight":
        return Source((f"{module}.conv.weight", *moments), _folded_weight)
    return Source((f"{module}.bn.bias", f"{module}.bn.running_mean", *moments), _folded_bias, f"{layer}.weight")


def _folded_weight(weight: NDArray[np.float32], *of_norm: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Return the folded weight; `of_norm` are gamma and variance."""
    if weight.ndim != 4 or not _are_vectors(of_norm, len(weight)):
        return None
    return _product(weight, _scale(*of_norm).reshape(-1, 1, 1, 1))


def _folded_bias(beta: NDArray[np.float32], *of_norm: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Return the folded bias; `of_norm` are mean, gamma and variance."""
    if beta.ndim != 1 or not _are_vectors(of_norm, len(beta)):
        return None
    mean, gamma, variance = of_norm
    return beta - _product(mean, _scale(gamma, variance))


def _are_vectors(arrays: Sequence[NDArray[np.float32]], length: int) -> bool:
    return all(one.shape == (length,) for one in arrays)


def _scale(gamma: NDArray[np.float32], variance: NDArray[np.float32]) -> NDArray[np.float32]:
    return _product(gamma, 1 / np.sqrt(variance + np.float32(GOOGLENET_EPSILON)))


def _product(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # infinite numbers are refused
        return np.multiply(one, other)


Modules: TypeAlias = Iterator[tuple[str, str]]
"""Pairs of one of our layers and torchvision's module."""


def _resnet(depths: tuple[int, ...], _network: Sequential) -> Modules:
    yield from {"conv2d_1": "conv1", "batchnorm_1": "bn1", "affine_1": "fc"}.items()
    blocks = [f"layer{stage}.{block}" for stage, depth in enumerate(depths, 1) for block in range(depth)]
    for number, theirs in enumerate(blocks, 1):
        for part in (1, 2, 3):
            yield f"residual_{number}.body.conv2d_{part}", f"{theirs}.conv{part}"
            yield f"residual_{number}.body.batchnorm_{part}", f"{theirs}.bn{part}"
        yield f"residual_{number}.shortcut.conv2d_1", f"{theirs}.downsample.0"
        yield f"residual_{number}.shortcut.batchnorm_1", f"{theirs}.downsample.1"


def _features_and_classifier(network: Sequential) -> Modules:
    """Yield our layers as torchvision numbers them: from 0 before and after the flattening, without normalizations."""
    part, number = "features", 0
    for name, layer in network.stack.members:
        if isinstance(layer, Flatten):
            part, number = "classifier", 0
        elif not isinstance(layer, LocalResponseNorm):
            yield name, f"{part}.{number}"
            number += 1


def _googlenet(_network: Sequential) -> Modules:
    yield from {"conv2d_1": "conv1", "conv2d_2": "conv2", "conv2d_3": "conv3", "affine_1": "fc"}.items()
    branches = {
        "branch_1.conv2d_1": "branch1",
        "branch_2.conv2d_1": "branch2.0",
        "branch_2.conv2d_2": "branch2.1",
        "branch_3.conv2d_1": "branch3.0",
        "branch_3.conv2d_2": "branch3.1",
        "branch_4.conv2d_1": "branch4.1",
    }
    for number, module in enumerate(MODULES, 1):
        for ours, theirs in branches.items():
            yield f"branches_{number}.{ours}", f"inception{module}.{theirs}"


#: The models of torchvision: which of their modules our layers are.
TORCHVISION: dict[str, Callable[[Sequential], Modules]] = {
    "resnet18": partial(_resnet, (2, 2, 2, 2)),
    "resnet50": partial(_resnet, (3, 4, 6, 3)),
    "vgg11": _features_and_classifier,
    "vgg16": _features_and_classifier,
    "alexnet": _features_and_classifier,
    "googlenet": _googlenet,
}
