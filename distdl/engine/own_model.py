"""A user's own model: the function that ``--model file.py:function`` or ``--model package.module:function`` names.

It is called as ``function(input_shape, classes)``, with the shape (H, W, C) of an image and the number of classes, on
every rank, and returns a `Sequential` in float32. Whatever is wrong with it is one line, a `UserError` that names file,
line and function. Code is only ever run that the command line, or a script, has named (see `distdl.config`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from distdl.config import is_own_model
from distdl.errors import PeerLost, UserError
from distdl.nn import Sequential, build_model
from distdl.nn.layers import Shape, show_shape
from distdl.parallel import Communicator, together
from distdl.rng import Key

EXPECTED = "expected a function(input_shape, classes) that returns nn.Sequential(layers, input_shape)"


def network_builder(model: str) -> Callable[[Shape, int], Sequential]:
    """Return what builds the network that `--model` names, one of ours or the user's; raise `UserError`."""
    if not is_own_model(model):
        return partial(build_model, model)
    place, _, name = model.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_by_name(place)
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"--model {model}: there is no function {name!r} in {place}{_functions_of(module)}")
    if not callable(function):
        raise UserError(f"--model {model}: {name} is {_kind(function)}; {EXPECTED}")
    return partial(_built, model, function, getattr(module, "__file__", None))


def _built(
    model: str, function: Callable[[Shape, int], object], file: str | None, input_shape: Shape, classes: int
) -> Sequential:
    """Return the network that the user's function makes."""
    with _as_imported(file):
        try:
            network = function(input_shape, classes)
        except (MemoryError, PeerLost):
            raise
        except UserError as error:
            raise UserError(f"--model {model}: {error}{_line_of(error, file)}") from None
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises is theirs to mend
            raise UserError(f"--model {model} raised {_said(error, file)}: mend it; {EXPECTED}") from None
    if not isinstance(network, Sequential):
        raise UserError(f"--model {model} returned {_kind(network)}; {EXPECTED}")
    if network.input_shape != tuple(input_shape):
        raise UserError(
            f"--model {model} returned a network for inputs of {show_shape(network.input_shape)}, and the images are "
            f"{show_shape(input_shape)}: hand on the input_shape that the function is given"
        )
    if network.dtype != np.float32:
        raise UserError(
            f"--model {model} returned a network in {network.dtype}, and trainings are in float32: leave dtype out"
        )
    with _as_imported(file):
        try:
            _tried(network)
        except (MemoryError, PeerLost):
            raise
        except Exception as error:  # noqa: BLE001  whatever the user's layers raise is theirs to mend
            raise UserError(
                f"--model {model}: the network cannot be trained: {_said(error, file)}; mend its layers"
            ) from None
    return network


def _tried(network: Sequential) -> None:
    """Run one sample forwards and backwards, so that a layer that cannot is known before there is a run."""
    with np.errstate(all="ignore"):
        x = np.zeros((1, *network.input_shape), np.float32)
        network.backward(np.zeros_like(network.forward(x, training=True, key=Key(0))))
        network.forward(x)


def _module_of_file(file: Path) -> ModuleType:
    if not file.is_file():
        what = "is not a regular file" if file.exists() else "does not exist"
        raise UserError(f"--model: the file {file} {what} (looked in {Path.cwd()}): give the path of a Python file")
    # A name of its own, so that a file called random.py takes nobody's place.
    spec = importlib.util.spec_from_file_location(f"own_model_{file.stem}", file)
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses, among others, look for it
    try:
        with _as_imported(spec.origin):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises is theirs to mend
        del sys.modules[module.__name__]
        raise UserError(f"--model: the file {file} cannot be imported: {_said(error, spec.origin)}; mend it") from None
    return module


def _module_by_name(name: str) -> ModuleType:
    try:
        with _as_imported(None):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"--model: there is no module {name} (no {error.name}): install its package, add its folder to "
                "PYTHONPATH, or give a file.py:function"
            ) from None
        raise UserError(f"--model: the module {name} cannot be imported: {_said(error, None)}; mend it") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises is theirs to mend
        raise UserError(f"--model: the module {name} cannot be imported: {_said(error, None)}; mend it") from None


@contextmanager
def _as_imported(file: str | None) -> Iterator[None]:
    """Let what runs inside import the neighbours of `file`, and leave no compiled files in the user's folders."""
    before, writes_none = list(sys.path), sys.dont_write_bytecode
    if file is not None:
        sys.path.append(str(Path(file).absolute().parent))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = before, writes_none


def _said(error: BaseException, file: str | None) -> str:
    """Return an exception's kind and message, with the line of the user's file that it comes from."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return text if isinstance(error, SyntaxError) else text + _line_of(error, file)  # it names its line by itself


def _line_of(error: BaseException, file: str | None) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    if file is None:
        frames = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
    else:
        frames = [frame for frame in frames if frame.filename == file]
    return f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""


def _functions_of(module: ModuleType) -> str:
    """Return a clause that names the functions which are written in a module."""
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    return f": it has {', '.join(own)}" if own else f": write one; {EXPECTED}"


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def layout_of(network: Sequential) -> str:
    """Return a hash of a network's layers and the shapes of its parameters, to hold against that of other ranks."""
    layers: Sequence[Any] = network.layers
    shapes = [(name, view.shape) for name, view in network.named_parameters()]
    return hashlib.sha256(repr(([str(layer) for layer in layers], shapes)).encode()).hexdigest()


def agree_on(communicator: Communicator, model: str, network: Sequential) -> None:
    """Raise `UserError`, on every rank, where ranks have built different networks. Collective."""
    layouts = communicator.allgather_json(layout_of(network))
    together(communicator, lambda: check_same(model, layouts))


def check_same(model: str, layouts: Sequence[str]) -> None:
    """Raise `UserError` where ranks have built different networks: files differ between hosts."""
    others = [rank for rank, layout in enumerate(layouts) if layout != layouts[0]]
    if others:
        raise UserError(
            f"the network {model} of rank {others[0]} is not that of rank 0: give every host the same files"
        )
