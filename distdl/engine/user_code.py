"""Code of the user's own: what a flag names as ``file.py:function`` or as ``package.module:function``.

`--model` names a function of the shape (H, W, C) of an image and the number of classes, which every rank calls and
which returns a `Sequential` in float32. `--dataset` names a function of the folder of `--data-dir`, or None, which
rank 0 calls and which returns a `Dataset`. Whatever is wrong with either is one line, a `UserError` that names file,
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from distdl.config import is_own
from distdl.data import Dataset, sources
from distdl.errors import PeerLost, UserError
from distdl.model_settings import parse_model_settings
from distdl.nn import Sequential, build_model
from distdl.nn.layers import Layer, Shape, show_shape
from distdl.parallel import Communicator, together
from distdl.rng import Key

#: Builds a network for inputs (H, W, C) and a number of outputs.
BuildNetwork = Callable[[tuple[int, int, int], int], Sequential]
#: What the function of each flag must be.
EXPECTED = {
    "--model": "expected a function(input_shape, classes) that returns nn.Sequential(layers, input_shape)",
    "--dataset": "expected a function(data_dir) that returns a distdl.data.sources.Dataset",
}


@dataclass(frozen=True)
class OwnFunction:
    """A function that a flag names."""

    flag: str
    named: str
    """As the command line has it."""
    function: Callable[..., object]
    file: str | None
    """The file of its module."""

    def __str__(self) -> str:
        return f"{self.flag} {self.named}"

    def __call__(self, *arguments: Any, **settings: Any) -> object:
        """Return what the function returns; raise `UserError` in one line for whatever it raises."""
        with _as_imported(self.file):
            try:
                return self.function(*arguments, **settings)
            except (MemoryError, PeerLost):
                raise
            except UserError as error:
                raise UserError(f"{self}: {error}{_line_of(error, self.file)}") from None
            except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises is theirs to mend
                raise UserError(f"{self} raised {_said(error, self.file)}: mend it; {EXPECTED[self.flag]}") from None


def network_builder(model: str, model_settings: str | None = None, given: BuildNetwork | None = None) -> BuildNetwork:
    """Return what builds the network: what a script has `given`, or what `--model` names, one of ours or the user's.

    The function that `--model` names is given the settings of `--model-settings` besides. What is built, if it is not
    ours, is tried out. Raises `UserError`.
    """
    settings = parse_model_settings(model_settings)
    if "dtype" in settings:
        raise UserError("--model-settings dtype: trainings are in float32; leave it out")
    if given is not None:
        if settings:
            raise UserError(f"--model-settings {model_settings}: the network comes from a script; leave them out")
        if not callable(given) or isinstance(given, Sequential):
            raise UserError(f"build_network is {_kind(given)}; {EXPECTED['--model']}")
        return partial(_built, f"build_network ({model})", given, None)
    if not is_own(model):
        return partial(build_model, model, **settings)
    function = own_function("--model", model)
    return partial(_built, str(function), partial(function, **settings), function.file)


def load_dataset(dataset: str, data_dir: Path | None) -> Dataset:
    """Return the data set that `--dataset` names, one of ours or the user's; raise `UserError`."""
    if not is_own(dataset):
        return sources.load(dataset, data_dir)
    function = own_function("--dataset", dataset)
    loaded = function(data_dir)
    if not isinstance(loaded, Dataset):
        raise UserError(f"{function} returned {_kind(loaded)}; {EXPECTED['--dataset']}")
    try:
        return loaded.checked()
    except UserError as error:
        raise UserError(f"{function}: {error}") from None


def same_function(one: str, other: str) -> bool:
    """Whether two names may be those of one function: the folder of its file may differ, or a script be its module.

    >>> same_function("/home/ada/net.py:build", "net.py:build"), same_function("net.py:build", "net.py:make")
    (True, False)
    """
    (place, _, name), (other_place, _, other_name) = one.rpartition(":"), other.rpartition(":")
    modules = {
        Path(where).stem if where.endswith(".py") else where.rpartition(".")[2] for where in (place, other_place)
    }
    return name == other_name and len(modules - {"__main__"}) <= 1


def own_function(flag: str, named: str) -> OwnFunction:
    """Load the module in which a user's function is, and return the function; raise `UserError`."""
    place, _, name = named.rpartition(":")
    module = _module_of_file(flag, Path(place)) if place.endswith(".py") else _module_by_name(flag, place)
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"{flag} {named}: there is no function {name!r} in {place}{_functions_of(module, flag)}")
    if not callable(function):
        raise UserError(f"{flag} {named}: {name} is {_kind(function)}; {EXPECTED[flag]}")
    return OwnFunction(flag, named, function, getattr(module, "__file__", None))


def _built(what: str, build: Callable[..., object], file: str | None, input_shape: Shape, classes: int) -> Sequential:
    """Return the network that a function of the user's makes; raise `UserError` where it cannot be trained."""
    network = build(input_shape, classes)
    if not isinstance(network, Sequential):
        raise UserError(f"{what} returned {_kind(network)}; {EXPECTED['--model']}")
    if network.input_shape != tuple(input_shape):
        raise UserError(
            f"{what} returned a network for inputs of {show_shape(network.input_shape)}, and the images are "
            f"{show_shape(input_shape)}: hand on the input_shape that the function is given"
        )
    if network.dtype != np.float32:
        raise UserError(f"{what} returned a network in {network.dtype}, and trainings are in float32: leave dtype out")
    if not network.parameter_count:
        raise UserError(f"{what} returned a network without parameters: there is nothing to train; add an nn.Affine")
    for layer in network.every_layer():
        if type(layer).forward is not Layer.forward and type(layer).backward is Layer.backward:
            raise UserError(f"{what}: the layer {layer} has a forward of its own but no backward: write one")
    with _as_imported(file):
        try:
            _try_out(network)
        except (MemoryError, PeerLost):
            raise
        except Exception as error:  # noqa: BLE001  whatever the user's layers raise is theirs to mend
            raise UserError(f"{what}: the network cannot be trained: {_said(error, file)}; mend its layers") from None
    return network


def _try_out(network: Sequential) -> None:
    """Run two samples forwards and backwards, so that a layer that cannot is known before there is a run."""
    with np.errstate(all="ignore"):
        network.initialize(Key(0))
        x = np.zeros((2, *network.input_shape), np.float32)
        for training in (False, True):
            y = network.forward(x, training=training, key=Key(0))
            if y.shape != (2, *network.output_shape):
                raise ValueError(f"for 2 samples its output is {y.shape}, expected {(2, *network.output_shape)}")
        network.backward(np.zeros_like(y))


def _module_of_file(flag: str, file: Path) -> ModuleType:
    if not file.is_file():
        what = "is not a regular file" if file.exists() else "does not exist"
        raise UserError(f"{flag}: the file {file} {what} (looked in {Path.cwd()}): give the path of a Python file")
    # A name of its own, so that a file called random.py takes nobody's place.
    spec = importlib.util.spec_from_file_location(f"own_code_{file.stem}", file)
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses, among others, look for it
    try:
        with _as_imported(spec.origin):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises is theirs to mend
        del sys.modules[module.__name__]
        raise UserError(f"{flag}: the file {file} cannot be imported: {_said(error, spec.origin)}; mend it") from None
    return module


def _module_by_name(flag: str, name: str) -> ModuleType:
    try:
        with _as_imported(None):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"{flag}: there is no module {name} (no {error.name}): install its package, add its folder to "
                "PYTHONPATH, or give a file.py:function"
            ) from None
        raise UserError(f"{flag}: the module {name} cannot be imported: {_said(error, None)}; mend it") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's code raises is theirs to mend
        raise UserError(f"{flag}: the module {name} cannot be imported: {_said(error, None)}; mend it") from None


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


def _functions_of(module: ModuleType, flag: str) -> str:
    """Return a clause that names the functions which are written in a module."""
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    return f": it has {', '.join(own)}" if own else f": write one; {EXPECTED[flag]}"


def _kind(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"an {name}" if name[0] in "aeiou" else f"a {name}"


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
