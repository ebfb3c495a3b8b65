"""The user's own code: functions that a flag names as ``file.py:function`` or ``package.module:function``.

- `--model` names a function of the shape (H, W, C) of an image and the number of classes. It returns a `Sequential` in
  float32. Every rank calls it.
- `--dataset` names a function of the folder of `--data-dir`, or None. It returns a `Dataset`. Rank 0 calls it.

A fault of the user's code becomes a `UserError` of one line. Code runs only if the command line, or a script, names it.
"""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from distdl.config import FROM_PATH, TrainConfig, is_own
from distdl.data import Dataset, PreparedDataset, sources
from distdl.engine.timing import balance
from distdl.errors import PeerLost, TooSmallError, UserError
from distdl.image_options import ImageOptions
from distdl.job.streams import say_line
from distdl.model_settings import parse_model_settings
from distdl.nn import Sequential, build_model
from distdl.nn.arguments import show_shape
from distdl.nn.layers import Layer, Shape
from distdl.parallel import Communicator, together
from distdl.parallel.communicator import SPIN_SECONDS
from distdl.rng import Key

#: Builds a network for inputs (H, W, C) and a number of outputs.
BuildNetwork = Callable[[tuple[int, int, int], int], Sequential]
#: The function that each flag expects.
EXPECTED = {
    "--model": "expected a function(input_shape, classes) that returns nn.Sequential(layers, input_shape)",
    "--dataset": "expected a function(data_dir) that returns a distdl.data.sources.Dataset",
}

#: The side of square images up to which the smallest that fits is searched.
LARGEST_SIDE_TRIED = 64

#: The start of the name of a module that a file became.
OWN_CODE = "own_code_"
#: The user's files whose import has begun and not ended.
_being_imported: list[Path] = []


@dataclass(frozen=True)
class UserFunction:
    """A function that a flag names."""

    flag: str
    name: str
    """As on the command line."""
    function: Callable[..., object]
    file: str | None
    """The file of its module."""
    folder: Path
    """The folder to import other modules from: that of the file, or the working folder for a module."""

    def __str__(self) -> str:
        return f"{self.flag} {self.name}"

    def __call__(self, *arguments: Any, **settings: Any) -> object:
        """Return the function's result; turn its exceptions into a `UserError` of one line."""
        with _importing_from(self.folder):
            try:
                return self.function(*arguments, **settings)
            except (MemoryError, PeerLost):
                raise
            except UserError as error:
                raise UserError(f"{self}: {error}{_line_of(error, self.file)}") from None
            except (Exception, SystemExit) as error:  # noqa: BLE001  the user's code may raise anything
                raise UserError(
                    f"{self} raised {describe_error(error, self.file)}: fix it; {EXPECTED[self.flag]}"
                ) from None


def network_builder(model: str, model_settings: str | None = None, given: BuildNetwork | None = None) -> BuildNetwork:
    """Return the function that builds the network: `given` by a script, or named by `--model`, ours or the user's.

    A function named by `--model` gets the settings of `--model-settings` as keywords. A user's network is tried once,
    on two samples. Raises `UserError`.
    """
    settings = parse_model_settings(model_settings)
    if "dtype" in settings:
        raise UserError("--model-settings dtype: training uses float32; leave it out")
    if given is not None:
        if settings:
            raise UserError(f"--model-settings {model_settings}: the network comes from a script; leave them out")
        if not callable(given) or isinstance(given, Sequential):
            raise UserError(f"build_network is {_kind(given)}; {EXPECTED['--model']}")
        return partial(_build_checked, f"build_network ({model})", given, None, None)
    if not is_own(model):
        return partial(_build_named, model, settings)
    function = find_function("--model", model)
    return partial(_build_checked, str(function), partial(function, **settings), function.file, function.folder)


def load_dataset(dataset: str, data_dir: Path | None, options: ImageOptions | None = None) -> Dataset:
    """Return the dataset that `--dataset` names, ours or the user's; raise `UserError`."""
    if not is_own(dataset):
        return sources.load(dataset, data_dir, options)
    function = find_function("--dataset", dataset)
    loaded = function(data_dir)
    if not isinstance(loaded, Dataset):
        raise UserError(f"{function} returned {_kind(loaded)}; {EXPECTED['--dataset']}")
    try:
        return loaded.checked()
    except UserError as error:
        raise UserError(f"{function}: {error}") from None


def names_from_script(config: TrainConfig, build_network: BuildNetwork | None, dataset: Dataset | None) -> TrainConfig:
    """Return the config with the names of the model and dataset that a script has given.

    Raises `UserError` for anything but a config and a dataset, or if a command imports that script for one of its
    functions: it would train once more.
    """
    if not isinstance(config, TrainConfig):
        raise UserError(f"the config is {_kind(config)}: expected distdl.TrainConfig(…), such as TrainConfig(epochs=5)")
    if _being_imported:
        raise UserError(
            f"{_being_imported[-1]} trains as soon as it is imported, and a command imports it for its functions: move "
            'the training into a block if __name__ == "__main__"'
        )
    if build_network is not None:
        config = replace(config, model=_name_of(build_network))
    if dataset is not None and not isinstance(dataset, Dataset):
        raise UserError(
            f"the dataset is a {type(dataset).__name__}, expected a distdl.data.sources.Dataset(name, images, labels, "
            "classes, test_start)"
        )
    return config if dataset is None else replace(config, dataset=dataset.name)


def agree_on_config(
    config: TrainConfig, build_network: BuildNetwork | None, dataset: Dataset | None, communicator: Communicator
) -> TrainConfig:
    """Return the checked config of rank 0 on all ranks, with the names that a script gave. Collective."""
    config = together(communicator, lambda: names_from_script(config, build_network, dataset).checked())
    communicator.waiting.spin_seconds = balance.SPIN_SECONDS if config.balance else SPIN_SECONDS
    return TrainConfig.from_json(communicator.bcast_json(config.to_json()))


def _name_of(build_network: BuildNetwork) -> str:
    """Return the name of a function that a script has given: package.module:function, or file.py:function."""
    kind = type(build_network)  # of an object that can be called, or that is a mistake
    place = getattr(build_network, "__module__", kind.__module__)
    name = getattr(build_network, "__qualname__", kind.__qualname__)
    if place.startswith(OWN_CODE):
        place = getattr(sys.modules.get(place), "__file__", None) or place
    return f"{place}:{name}"


def read_data(config: TrainConfig, dataset: Dataset | None, data_sha256: str | None = None) -> PreparedDataset:
    """Load the dataset, split it, and measure its training part; `data_sha256` is the hash in a checkpoint, if any."""
    if dataset is None and data_sha256 is not None:
        _check_place(config.dataset)
    options = replace(config.image_options, say=say_line)
    dataset = dataset.checked() if dataset else load_dataset(config.dataset, config.data_dir, options)
    return PreparedDataset.prepare(
        dataset.for_training(config.loss),
        config.seed,
        shares=(config.validation_share, config.test_share),
        data_sha256=data_sha256,
        standardize_targets=config.standardize_targets,
    )


def _check_place(name: str) -> None:
    """Raise `UserError` if the files of a run that continues have moved."""
    prefix = next((prefix for prefix in FROM_PATH if name.startswith(prefix)), None)
    if prefix is not None and not (place := Path(name.removeprefix(prefix))).exists():
        raise UserError(
            f"the data of the run ({name}) is not here: there is no {place.absolute()}; give its place by --dataset "
            f"{prefix}PATH"
        )


def find_function(flag: str, name: str) -> UserFunction:
    """Import the module of a user's function, and return the function; raise `UserError`."""
    place, _, attribute = name.rpartition(":")
    module = _import_file(flag, Path(place)) if place.endswith(".py") else _import_module(flag, place)
    function = getattr(module, attribute, None)
    if function is None:
        raise UserError(f"{flag} {name}: there is no function {attribute!r} in {place}{_functions_of(module, flag)}")
    if not callable(function):
        raise UserError(f"{flag} {name}: {attribute} is {_kind(function)}; {EXPECTED[flag]}")
    folder = Path(place).absolute().parent if place.endswith(".py") else Path.cwd()
    return UserFunction(flag, name, function, getattr(module, "__file__", None), folder)


def _build_named(model: str, settings: Mapping[str, Any], input_shape: Shape, classes: int) -> Sequential:
    """Return a network of ours; raise `UserError` with the smallest images that fit if these are too small."""

    def build(shape: Shape) -> Sequential:
        return build_model(model, shape, classes, **settings)

    try:
        return build(input_shape)
    except TooSmallError as error:
        height, width, channels = input_shape
        sides = range(min(height, width) + 1, LARGEST_SIDE_TRIED)
        larger = ((max(height, side), max(width, side), channels) for side in sides)
        smallest = next((shape for shape in larger if _fits(build, shape)), None)
        if smallest is None:
            raise
        why = str(error).partition(";")[0]
        raise TooSmallError(
            f"--model {model} takes images of at least {show_shape(smallest)}, not {show_shape(input_shape)} ({why}): "
            f"give larger images, with image files by --resize {smallest[0]}x{smallest[1]}, or a model for any size, "
            "such as mlp or resnet20"
        ) from error


def _fits(build: Callable[[Shape], Sequential], input_shape: Shape) -> bool:
    try:
        build(input_shape)
    except TooSmallError:
        return False
    return True


def _build_checked(
    what: str,
    build: Callable[..., object],
    file: str | None,
    folder: Path | None,
    input_shape: Shape,
    classes: int,
) -> Sequential:
    """Return the network that a user's function builds; raise `UserError` if it cannot be trained."""
    network = build(input_shape, classes)
    if not isinstance(network, Sequential):
        raise UserError(f"{what} returned {_kind(network)}; {EXPECTED['--model']}")
    if network.input_shape != tuple(input_shape):
        raise UserError(
            f"{what} returned a network for inputs of {show_shape(network.input_shape)}, and the images are "
            f"{show_shape(input_shape)}: use the input_shape that the function receives"
        )
    if network.dtype != np.float32:
        raise UserError(f"{what} returned a network in {network.dtype}; training uses float32: leave dtype out")
    if not network.parameter_count:
        raise UserError(f"{what} returned a network without parameters: there is nothing to train; add an nn.Affine")
    for layer in network.every_layer():
        if type(layer).forward is not Layer.forward and type(layer).backward is Layer.backward:
            raise UserError(f"{what}: the layer {layer} has a forward of its own but no backward: write one")
    with _importing_from(folder):
        try:
            _try(network)
        except (MemoryError, PeerLost):
            raise
        except Exception as error:  # noqa: BLE001  the user's layers may raise anything
            raise UserError(
                f"{what}: the network cannot be trained: {describe_error(error, file)}; fix its layers"
            ) from None
    return network


def _try(network: Sequential) -> None:
    """Run two samples forward and backward, so that a faulty layer is found before the run starts."""
    with np.errstate(all="ignore"):
        network.initialize(Key(0))
        x = np.zeros((2, *network.input_shape), np.float32)
        for training in (False, True):
            y = network.forward(x, training=training, key=Key(0))
            if y.shape != (2, *network.output_shape):
                raise ValueError(f"for 2 samples its output is {y.shape}, expected {(2, *network.output_shape)}")
        network.backward(np.zeros_like(y))


def _import_file(flag: str, file: Path) -> ModuleType:
    if not file.is_file():
        what = "is not a regular file" if file.exists() else "does not exist"
        raise UserError(f"{flag}: the file {file} {what} (looked in {Path.cwd()}): give the path of a Python file")
    # The prefix keeps a file called random.py from replacing the module random.
    spec = importlib.util.spec_from_file_location(f"{OWN_CODE}{file.stem}", file)
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses, for example, look for it there
    _being_imported.append(file)
    try:
        with _importing_from(file.absolute().parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the user's code may raise anything
        del sys.modules[module.__name__]
        raise UserError(
            f"{flag}: the file {file} cannot be imported: {describe_error(error, spec.origin)}; fix it"
        ) from None
    finally:
        _being_imported.pop()
    return module


def _import_module(flag: str, name: str) -> ModuleType:
    try:
        with _importing_from(Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001  the user's code may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(f"{missing}.")):
            raise UserError(
                f"{flag}: there is no module {name} (no {missing}): install its package, add its folder to "
                "PYTHONPATH, or give a file.py:function"
            ) from None
        raise UserError(
            f"{flag}: the module {name} cannot be imported: {describe_error(error, None)}; fix it"
        ) from None


@contextmanager
def _importing_from(folder: Path | None) -> Iterator[None]:
    """Allow imports from a folder, after all others, and write no compiled files into the user's folders."""
    path, writes_none = list(sys.path), sys.dont_write_bytecode
    if folder is not None:
        sys.path.append(str(folder))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, writes_none


def describe_error(error: BaseException, file: str | None) -> str:
    """Return an exception's kind and message, with the line of the user's file that raised it."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return text if isinstance(error, SyntaxError) else text + _line_of(error, file)  # a SyntaxError names its line


def _line_of(error: BaseException, file: str | None) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    ours = (__file__, importlib.__file__)
    frames = [one for one in frames if (one.filename not in ours if file is None else one.filename == file)]
    return f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""


def _functions_of(module: ModuleType, flag: str) -> str:
    """Return the end of a message: the names of the functions that the module defines."""
    names = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    return f": it has {', '.join(names)}" if names else f": write one; {EXPECTED[flag]}"


def _kind(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"an {name}" if name[0] in "aeiou" else f"a {name}"


def architecture_sha256(network: Sequential) -> str:
    """Return a hash of a network's layers and the shapes of its parameters."""
    shapes = [(name, view.shape) for name, view in network.named_parameters()]
    return hashlib.sha256(repr(([str(layer) for layer in network.layers], shapes)).encode()).hexdigest()


def check_equal_networks(communicator: Communicator, model: str, network: Sequential) -> None:
    """Raise `UserError`, on every rank, if ranks have built different networks. Collective."""
    hashes = communicator.allgather_json(architecture_sha256(network))
    others = [rank for rank, one in enumerate(hashes) if one != hashes[0]]
    if others:
        what = f"the network {model} of rank {others[0]} is not that of rank 0"
        raise UserError(f"{what}: give every host the same files", agreed=True)  # all ranks have the same hashes
