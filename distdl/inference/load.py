"""Load trained networks from their run folders or checkpoints.

Rank 0 reads the files, and never writes to a run. The other ranks receive the weights and share the data.

The signature in a checkpoint describes inputs and outputs, so a network needs no data. Only a checkpoint of an older
version has no signature: then its training data gives it.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from distdl.config import DATASETS, FROM_PATH, TrainConfig, comes_from_script, is_own, names_match, reads_data_dir
from distdl.data import Dataset, PreparedDataset
from distdl.data.signature import Signature
from distdl.engine.kernels import compile_for_network, usable_kernels
from distdl.engine.requirements import check_outputs, outputs_of
from distdl.engine.state import TrainingState
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import FoundCheckpoint
from distdl.engine.storage.header import CheckpointHeader
from distdl.engine.storage.restoring import copy_tensors
from distdl.engine.storage.run_folder import find_checkpoint
from distdl.engine.user_code import (
    BuildNetwork,
    check_equal_networks,
    load_dataset,
    network_builder,
    read_data,
)
from distdl.errors import UserError
from distdl.inference.options import LoadOptions
from distdl.nn import Sequential
from distdl.optim import optimizer_class
from distdl.parallel import Communicator, from_rank_0, guard, on_rank_0, share_arrays, together, world


@dataclass(frozen=True)
class Trained:
    """A network with the weights of a checkpoint, and the data to score it on, if that is loaded."""

    given: Path
    """The run folder or checkpoint that the caller named."""
    path: Path
    """The checkpoint."""
    config: TrainConfig
    step: int
    weights_sha256: str
    network: Sequential
    signature: Signature
    complaints: tuple[str, ...]
    """The damage of newer checkpoints."""
    data_sha256: str
    """The hash of the data that it was trained on, with its split."""
    notes: tuple[str, ...] = ()
    """Warnings about the kernels."""
    loaded: PreparedDataset | None = None

    @property
    def warnings(self) -> list[str]:
        """The warnings for the user."""
        return [
            *(f"{complaint}; the one before it is used" for complaint in self.complaints),
            *(f"{self.given}: {note}" for note in self.notes),
        ]

    @property
    def data(self) -> PreparedDataset:
        """The data that it was trained on, or other data to score it on."""
        assert self.loaded is not None, f"{self.given} was loaded without data"
        return self.loaded

    @property
    def loss_name(self) -> str:
        """The name of the loss that the network was trained with."""
        return self.signature.loss_named(self.config.loss)

    def in_units_of_labels(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Return the outputs of a regression in the units of the labels, if it was trained on standardized targets."""
        targets = self.signature.target_normalization
        return numbers if targets is None else targets.undo(numbers)


@dataclass(frozen=True)
class _Source:
    """A checkpoint and its settings, on rank 0."""

    given: Path
    found: FoundCheckpoint
    header: CheckpointHeader
    config: TrainConfig

    def to_json(self) -> list[Any]:
        """Return the facts for the other ranks."""
        (path, _, complaints), signature = self.found, self.header.signature
        described = None if signature is None else signature.to_json()
        config = self.config.to_json()
        hashed = self.header.data_sha256
        return [str(self.given), str(path), config, self.header.step, complaints, described, hashed, self.preparation]

    @property
    def preparation(self) -> str:
        """A text that is the same for runs that prepare a dataset in the same way."""
        names = ("seed", "standardize_targets", "validation_share", "test_share", "loss")
        return " ".join([*(str(getattr(self.config, name)) for name in names), self.header.data_sha256, ""])


def load(
    given: Sequence[Path],
    communicator: Communicator | None = None,
    *,
    best: bool = False,
    data_dir: Path | None = None,
    build_network: BuildNetwork | None = None,
    dataset: Dataset | str | None = None,
    models: Sequence[str] = (),
    with_data: bool = True,
    data_gigabytes: float | None = None,
) -> list[Trained]:
    """Return the networks of checkpoints, or of run folders: of each the newest intact checkpoint, or the `best`.

    - `communicator`: `world()` by default. Only rank 0 reads files and dataset.
    - `with_data`: also load the data that they were trained on. It must be one dataset. `data_gigabytes`: see
      `data.room.Room`.
    - `data_dir` and `dataset` replace the settings of the run. `dataset` may be a name as for ``--dataset``.
    - `build_network` builds a network from user code. Without it, one of the functions `models`
      (``file.py:function``) does, if the run was trained with it. No code runs because a file names it.

    Collective. Raises `UserError` on every rank if a checkpoint, its data or its network is not available,
    `DamagedFileError` if a file is damaged.
    """
    communicator = world() if communicator is None else communicator
    with guard(communicator):
        sources = on_rank_0(communicator, lambda: [_read(path, best=best) for path in given]) or []
        facts = from_rank_0(communicator, lambda: [one.to_json() for one in sources])
        configs = [TrainConfig.from_json(config) for _, _, config, *_ in facts]
        together(communicator, lambda: _refuse_unused_models(models, configs))
        preparations = [preparation for *_, preparation in facts]
        data = _share_data(sources, communicator, preparations, data_dir, dataset, data_gigabytes, with_data=with_data)
        signatures = [
            Signature.from_json(facts[i][5]) if facts[i][5] is not None else data[i].signature()
            for i in range(len(facts))
        ]
        networks = together(
            communicator,
            lambda: [_build(configs[i], facts[i][1], signatures[i], build_network, models) for i in range(len(facts))],
        )
        for config, network in zip(configs, networks, strict=True):
            check_equal_networks(communicator, config.model, network)
        receipts = from_rank_0(communicator, lambda: list(map(_restore, sources, networks)))
        notes = []
        for network, config in zip(networks, configs, strict=True):
            communicator.bcast(network.parameters)
            communicator.bcast(network.buffers)
            kernels, note = usable_kernels(config.kernels, communicator)
            network.use(kernels)
            notes.append([*([] if note is None else [note]), *compile_for_network(network, communicator)])
    return [
        Trained(
            *(Path(name), Path(path), configs[i], step, receipts[i], networks[i], signatures[i], tuple(complaints)),
            data_sha256=data_sha256,
            notes=tuple(notes[i]),
            loaded=data[i] if with_data else None,
        )
        for i, (name, path, _, step, complaints, _, data_sha256, _) in enumerate(facts)
    ]


def load_without_data(
    given: Sequence[Path], communicator: Communicator, options: LoadOptions, *, best: bool
) -> list[Trained]:
    """Return the networks that the flags of a command name, without the data that they were trained on: see `load`."""
    return load(
        given,
        communicator,
        best=best,
        data_dir=options.data_dir,
        data_gigabytes=options.data_gigabytes,
        dataset=options.dataset,
        models=options.model,
        with_data=False,
    )


def refuse_unlike_members(trained: Sequence[Trained]) -> None:
    """Raise `UserError` unless the networks can be used as an ensemble: no run twice, and all with one signature."""
    first, seen = trained[0], dict[str, Path]()
    for one in trained:
        if one.weights_sha256 in seen:
            raise UserError(
                f"{seen[one.weights_sha256]} and {one.given} have the same weights: an ensemble needs different "
                "networks; leave one out"
            )
        seen[one.weights_sha256] = one.given
        for name in ("task", "outputs", "names", "image_shape", "pixels", "resize"):
            its, expected = getattr(one.signature, name), getattr(first.signature, name)
            if its != expected:
                what = "names of the classes" if name == "names" else name.replace("_", " ")
                raise UserError(
                    f"{one.given} has other {what} than {first.given}: {_shown(its)}, expected {_shown(expected)}; use "
                    "them one by one"
                )


def _shown(value: object) -> str:
    text = "x".join(map(str, value)) if isinstance(value, tuple) and isinstance(value[0], int) else str(value)
    return text if len(text) < 80 else text[:79] + "…"


def _read(given: Path, *, best: bool) -> _Source:
    """Read the newest or the best checkpoint, and check its settings."""
    try:
        if best and given.is_file():
            raise UserError(f"--best looks for the best checkpoint of a run folder; {given} is a file: leave it out")
        found = find_checkpoint(given, str(given))
        header = found.header()
        if best:
            if header.progress.best_step is None:
                raise UserError(f"--best: {given} has no best checkpoint yet, because no epoch is validated")
            path = checkpoints.path_of_step(found.path.parent, header.progress.best_step)
            found = found._replace(path=path, checkpoint=checkpoints.read(path, follow=False))
            header = found.header()
    except OSError as error:
        raise UserError(f"cannot access {error.filename}: {error.strerror}; give another run folder") from None
    return _Source(given, found, header, config_in(header, found.path))


def config_in(header: CheckpointHeader, path: Path) -> TrainConfig:
    """Return the checked config in the header of the checkpoint at `path`; raise `UserError` if it cannot be used."""
    try:
        config = TrainConfig.from_json(header.config)
        return replace(config, config=None, run_dir=None, resume=None, prove=False, trace=None).checked()
    except (LookupError, TypeError) as error:
        raise UserError(f"{path} has settings that this version of distdl does not know: {error}") from None
    except UserError as error:
        raise UserError(f"the settings in {path} are invalid: {error}") from None


def _share_data(
    sources: Sequence[_Source],
    communicator: Communicator,
    preparations: Sequence[str],
    data_dir: Path | None,
    dataset: Dataset | str | None,
    data_gigabytes: float | None,
    *,
    with_data: bool,
) -> list[PreparedDataset]:
    """Return the data of each run on every rank; none if it is needed neither for itself nor for a signature."""

    def read() -> dict[str, NDArray[Any]]:
        old = [one for one in sources if one.header.signature is None]
        if with_data:
            return _data_arrays(sources, data_dir, dataset, data_gigabytes)
        if not old:
            return {}
        try:
            return _data_arrays(sources, data_dir, dataset, data_gigabytes)
        except UserError as error:
            raise type(error)(
                f"{old[0].found.path} is of an older version of distdl, which stored no signature, so it needs its "
                f"data: {error}; or resume it for one more epoch, which stores the signature"
            ) from None

    shared = share_arrays(communicator, on_rank_0(communicator, read) or {})
    return [PreparedDataset.from_arrays(shared, one) for one in preparations] if shared else []


def _data_arrays(
    sources: Sequence[_Source], data_dir: Path | None, dataset: Dataset | str | None, data_gigabytes: float | None
) -> dict[str, NDArray[Any]]:
    """Load the dataset, split it as each run did, and compare it with the data that each run was trained on."""
    first = sources[0]
    for other in sources[1:]:
        if other.config.dataset != first.config.dataset:
            raise UserError(
                f"{other.given} was trained on {other.config.dataset}, {first.given} on {first.config.dataset}: "
                "expected one dataset; evaluate them one by one"
            )
    given = first.given, first.config
    loaded = dataset_of(*given, data_dir, dataset, data_gigabytes, is_needless=first.header.signature is not None)
    prepared: dict[str, PreparedDataset] = {}
    for one in sources:
        name = one.preparation
        if name not in prepared:
            prepared[name] = read_data(one.config, loaded, one.header.data_sha256)
        if one.header.data_sha256 != prepared[name].sha256():
            flag = "--dataset" if one.config.dataset.startswith(FROM_PATH) else "--data-dir"
            raise UserError(
                f"{one.found.path} was trained on other images or labels than {loaded.name} has here, or with another "
                f"split: give the same data by {flag}"
            )
        if prepared[name].class_names != prepared[first.preparation].class_names:
            raise UserError(
                f"{one.given} numbers the classes in another order than {first.given}, because a version of distdl "
                "before the natural order trained one of them: evaluate them one by one"
            )
    arrays: dict[str, NDArray[Any]] = {}
    for name, data in prepared.items():
        arrays |= data.to_arrays(name)
    return arrays


def dataset_of(
    run: Path,
    config: TrainConfig,
    data_dir: Path | None,
    dataset: Dataset | str | None,
    data_gigabytes: float | None,
    *,
    is_needless: bool = False,
) -> Dataset:
    """Return the given dataset, or load the one that a run was trained on; raise `UserError` if it is not available.

    `is_needless`: other commands can use the run without it.
    """
    if isinstance(dataset, Dataset):
        return dataset
    trained_on = config.dataset
    if dataset is not None and trained_on in DATASETS and dataset != trained_on:
        raise UserError(f"{run} was trained on {trained_on}: leave --dataset {dataset} out")
    if dataset is None and comes_from_script(trained_on):
        score = ", or in a script score other data with distdl.load(…).evaluate(dataset)" if is_needless else ""
        raise UserError(
            f"{run} was trained on the dataset {trained_on!r} of a script: give the same data by --dataset "
            f"npz:FILE.npz, or by --dataset SCRIPT.py:FUNCTION, a function(data_dir) that returns it{score}"
        )
    if dataset is None and is_own(trained_on):  # no code runs because a checkpoint names it
        what = f"{run} was trained on a dataset from user code"
        raise UserError(f"{what}; if you trust that code, add --dataset {trained_on}")
    if data_dir is not None and not reads_data_dir(trained_on):
        raise UserError(f"--data-dir has no effect with {trained_on}, which {run} was trained on: leave it out")
    name, folder = dataset or trained_on, data_dir or config.data_dir
    prefix = next((prefix for prefix in FROM_PATH if name.startswith(prefix)), None)
    place = folder if prefix is None else Path(name.removeprefix(prefix))
    if place is not None and not place.exists():
        flag = "--data-dir FOLDER" if prefix is None else f"--dataset {prefix}PATH"
        hint = "; distdl.predict, and distdl.evaluate --on other data, do not need it" if is_needless else ""
        raise UserError(
            f"the data of {run} ({name}) is not here: there is no {place.absolute()}; give its place by {flag}{hint}"
        )
    options = config.image_options
    if data_gigabytes is not None:
        options = replace(options, data_gigabytes=data_gigabytes)
    if options.cache is not None and not options.cache.is_dir():  # the run has moved: make no cache elsewhere
        options = replace(options, cache=None)
    return load_dataset(name, folder, options)


def _build(
    config: TrainConfig,
    path: str,
    signature: Signature,
    build_network: BuildNetwork | None,
    models: Sequence[str],
) -> Sequential:
    given = build_network if is_own(config.model) else None
    name = config.model if given is not None else model_named(config.model, path, models, or_load=True)
    try:
        build = network_builder(name, config.model_settings, given)
        network = build(signature.image_shape, outputs_of(config, signature)[-1])
        check_outputs(config, network.output_shape, signature)
    except MemoryError:
        shape = "x".join(map(str, signature.image_shape))
        raise UserError(
            f"there is not enough memory for the network of {path}, {name} on images of {shape}: use a machine with "
            "more memory, or fewer ranks"
        ) from None
    except UserError as error:
        raise UserError(
            f"cannot build the network of {path}: {error}; evaluate a network from a script in that script, with "
            "distdl.load(…, build_network=…)"
        ) from None
    return network


def model_named(trained_with: str, path: str, models: Sequence[str], *, or_load: bool = False) -> str:
    """Return the name of the model that the checkpoint at `path` was trained with: ours, or the user's in `models`.

    Raises `UserError` if the user has not named it: no code runs because a checkpoint names it. With `or_load` the
    error also names `distdl.load`, which takes the function itself.
    """
    if not is_own(trained_with):
        return trained_with
    name = next((model for model in models if names_match(model, trained_with)), None)
    if name is None:
        load = f", or in a script distdl.load(…, build_network={trained_with.rpartition(':')[2]})" if or_load else ""
        raise UserError(
            f"cannot build the network of {path}: it was trained with a model from user code; if you trust that code, "
            f"add {model_flag(trained_with)}{load}"
        )
    return name


def model_flag(trained_with: str) -> str:
    """Return the flag that names a model from user code, for a line that the user copies.

    >>> model_flag("net.py:build"), model_flag("__main__:build")
    ('--model net.py:build', '--model SCRIPT.py:build')
    """
    return f"--model {shlex.quote(trained_with.replace('__main__:', 'SCRIPT.py:'))}"


def user_code_flags(model: str, dataset: str) -> str:
    """Return the flags that a command needs for a run whose model and dataset come from user code; "" if none does.

    >>> user_code_flags("net.py:build", "mine"), user_code_flags("mlp", "digits")
    ('--model net.py:build --dataset SCRIPT.py:FUNCTION', '')
    """
    flags = [model_flag(model)] if is_own(model) else []
    if comes_from_script(dataset):
        flags.append("--dataset SCRIPT.py:FUNCTION")
    elif is_own(dataset):
        flags.append(f"--dataset {shlex.quote(dataset)}")
    return " ".join(flags)


def _refuse_unused_models(models: Sequence[str], configs: Sequence[TrainConfig]) -> None:
    """Raise `UserError` for a model that none of the runs was trained with."""
    for model in models:
        if not any(is_own(config.model) and names_match(model, config.model) for config in configs):
            trained_with = ", ".join(sorted({config.model for config in configs}))
            raise UserError(
                f"--model {model}: the runs were trained with {trained_with}; name the function of a run, or "
                "leave the flag out for a model of distdl"
            )


def _restore(source: _Source, network: Sequential) -> str:
    """Copy the weights of the checkpoint into the network, and return the receipt."""
    state = TrainingState(network, optimizer_class(source.config.optimizer)(network.parameters.size))
    copy_tensors(source.found.checkpoint, state.named_arrays(), str(source.found.path))
    return state.weights_sha256()
