"""Trained networks, from their checkpoints, and their score: each alone, and all together as an ensemble.

`load` reads checkpoints, and never writes to a run; `evaluate` scores a part of their dataset on all ranks. A network
is given the micro-batches that its training gave it, so its score is that of the run's own summary, bit for bit.

N samples of the part, K classes, ``...`` the places of a label: none for one a sample, (H, W) for one a pixel; where
answers are numbers (regression), K of them, they take the place of labels, probabilities and predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distdl.config import DATASETS, FROM_PATH, TrainConfig, is_own, reads_data_dir
from distdl.data import Dataset, MicroBatches, PreparedDataset
from distdl.engine.environment import numerics
from distdl.engine.metrics import METRIC_FIELDS, Sums
from distdl.engine.prepare import check_outputs, outputs_of, read_data
from distdl.engine.state import TrainingState
from distdl.engine.storage import checkpoints
from distdl.engine.storage.checkpoints import Checkpoint
from distdl.engine.storage.header import CheckpointHeader
from distdl.engine.storage.run_folder import find_checkpoint
from distdl.engine.user_code import BuildNetwork, agree_on, load_dataset, network_builder, same_function
from distdl.errors import UserError
from distdl.nn import Sequential, make_loss
from distdl.nn.between import half_precision
from distdl.optim import optimizer_class
from distdl.parallel import REDUCTIONS, Communicator, Layout, contiguous_shards, guard, share_arrays, together, world

Part = Literal["validation", "test"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Trained:
    """A network as its checkpoint has it, and the data it was trained on."""

    given: Path
    """The run folder or checkpoint that was asked for."""
    path: Path
    config: TrainConfig
    step: int
    weights_sha256: str
    network: Sequential
    data: PreparedDataset
    complaints: tuple[str, ...]
    """What was wrong with newer checkpoints."""


@dataclass(frozen=True)
class Score:
    """Mean loss of a sample, and how many answers were right, of how many; of none where answers are numbers."""

    loss: float
    correct: int
    targets: int

    @property
    def accuracy(self) -> float | None:
        """The share of right answers; None where no answer is right or wrong."""
        return self.correct / self.targets if self.targets else None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores on a part: of each network by itself, and of the mean of their probabilities."""

    rows: NDArray[np.int64]
    """(N,), the part's rows in the dataset."""
    labels: NDArray[Any]
    """(N, ...), the true classes; for regression numbers (N, K)."""
    scores: list[Score]
    ensemble: Score
    probabilities: NDArray[np.float64]
    """(N, ..., K), the ensemble's; for regression the mean of the outputs, (N, K)."""
    predictions: NDArray[Any]
    """(N, ...), the ensemble's most probable class, the first if several are; for regression as `probabilities`."""


@dataclass(frozen=True)
class _Found:
    """A checkpoint that was read, as rank 0 has it."""

    given: Path
    path: Path
    checkpoint: Checkpoint
    header: CheckpointHeader
    config: TrainConfig
    complaints: Sequence[str]


def load(
    given: Sequence[Path],
    communicator: Communicator | None = None,
    *,
    best: bool = False,
    data_dir: Path | None = None,
    build_network: BuildNetwork | None = None,
    dataset: Dataset | str | None = None,
    models: Sequence[str] = (),
) -> list[Trained]:
    """Return the networks of run folders (each one's newest intact checkpoint, or the `best`) or checkpoints.

    `communicator` is `world()` if not given. `data_dir` takes the place of the folder that the run had its data from,
    `dataset`, which may be a name like that of ``--dataset``, that of the dataset that its config names. Networks that
    are not ours are built by `build_network`, or by that of the functions `models` (``file.py:function``) which the
    run was trained with: none is called because a file names it. Only rank 0 looks at files and dataset. Collective.
    Raises `UserError` on every rank where a checkpoint, its data or its network cannot be had,
    `DamagedFileError` where a file is damaged.
    """
    communicator = world() if communicator is None else communicator
    reads = communicator.rank == 0
    with guard(communicator):
        found = together(communicator, lambda: [_found(path, best=best) for path in given] if reads else [])
        described = communicator.bcast_json(
            [[str(one.given), str(one.path), one.config.to_json(), one.header.step, one.complaints] for one in found]
        )
        configs = [TrainConfig.from_json(config) for _, _, config, _, _ in described]
        together(communicator, lambda: _refuse_strangers(models, configs))
        arrays = together(communicator, lambda: _arrays(found, data_dir, dataset) if reads else {})
        shared = share_arrays(communicator, arrays)
        data = [PreparedDataset.from_arrays(shared, _prefix(config.seed)) for config in configs]
        networks = together(
            communicator,
            lambda: [_network(configs[i], described[i][1], data[i], build_network, models) for i in range(len(data))],
        )
        for config, network in zip(configs, networks, strict=True):
            agree_on(communicator, config.model, network)
        receipts = together(communicator, lambda: list(map(_restored, found, networks)))  # nothing on other ranks
        receipts = communicator.bcast_json(receipts)
        for network in networks:
            communicator.bcast(network.parameters)
            communicator.bcast(network.buffers)
    return [
        Trained(Path(asked), Path(path), configs[i], step, receipts[i], networks[i], data[i], tuple(complaints))
        for i, (asked, path, _, step, complaints) in enumerate(described)
    ]


def evaluate(trained: Sequence[Trained], part: Part, communicator: Communicator | None = None) -> Evaluation:
    """Return the scores of networks, and of all of them as an ensemble, on a part of their dataset.

    An ensemble's probabilities are the mean of its members' (softmax, or sigmoid for logistic regression), in float64
    and in the order given; its loss is the mean of ``-log(probability of the label)``. Of numbers the outputs' mean is
    taken, with its squared error. An ensemble of one scores as its member. Source: section 8.1.2.

    Any number of ranks gives the same bits. Collective. Every rank holds the outputs for all samples. Raises
    `UserError` where the networks' parts have other samples.
    """
    communicator = world() if communicator is None else communicator
    with guard(communicator):
        rows = [np.asarray(getattr(one.data.parts, part)) for one in trained]
        together(communicator, lambda: _refuse_other_rows(trained, part, rows))
        labels = trained[0].data.labels[rows[0]]
        scored = [_scored(one, rows[0], communicator) for one in trained]
    scores = [score for score, _ in scored]
    mean = _probabilities(trained[0], scored[0][1])
    for one, (_, outputs) in zip(trained[1:], scored[1:], strict=True):
        mean += _probabilities(one, outputs)
    mean /= len(trained)
    if len(trained) == 1:
        return Evaluation(rows[0], labels, scores, scores[0], mean, _predictions(trained[0], scored[0][1]))
    if not trained[0].data.targets_per_sample:
        error = mean - labels
        return Evaluation(rows[0], labels, scores, Score(float((error * error).mean()), 0, 0), mean, mean)
    predictions = mean.argmax(axis=-1)
    of_labels = np.take_along_axis(mean, labels[..., np.newaxis], axis=-1)
    with np.errstate(divide="ignore"):  # a probability of 0 is a loss without bound
        loss = -float(np.log(of_labels).sum()) / labels.size
    ensemble = Score(loss, int((predictions == labels).sum()), labels.size)
    return Evaluation(rows[0], labels, scores, ensemble, mean, predictions)


def in_half_precision(trained: Sequence[Trained]) -> list[Trained]:
    """Return the same networks with weights and activations stored as float16: see `half_precision`."""
    return [replace(one, network=half_precision(one.network)) for one in trained]


def _scored(one: Trained, rows: NDArray[np.int64], communicator: Communicator) -> tuple[Score, NDArray[np.float32]]:
    """Return the score of a network on some rows, and its outputs (N, ..., K), on every rank. Collective."""
    size, data, loss = one.config.micro_batch_size, one.data, make_loss(one.data.loss_named(one.config.loss))
    batches = MicroBatches(data, size)
    shards = contiguous_shards(batches.count(len(rows)), communicator.size)
    reduction = REDUCTIONS["tree"](communicator, Layout(METRIC_FIELDS))
    outputs = np.empty((len(rows), *one.network.output_shape), np.float32)
    leaf, sums = Sums(), Sums(targets_per_sample=data.targets_per_sample)
    with numerics(one.config.threads_per_rank), one.network.constant_parameters():
        reduction.begin(shards)
        for index in shards[communicator.rank]:
            images, labels = batches.load(rows, index)
            own = outputs[index * size : (index + 1) * size]
            own[...] = one.network.forward(images)
            leaf.set(loss.forward(own, labels), loss.count_correct(own, labels), len(labels))
            reduction.add(index, vars(leaf))
        sums.add(reduction.total())
    rows_until = [min(shard.stop * size, len(rows)) for shard in shards]
    counts = np.diff([0, *rows_until]) * outputs[:1].nbytes
    communicator.allgatherv(outputs.reshape(-1).view(np.uint8), counts.tolist())
    return Score(sums.loss, int(sums.counts[0]), sums.samples * data.targets_per_sample), outputs


def _probabilities(one: Trained, outputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the probability of each class, (N, ..., K); numbers as they are, in float64."""
    exact = outputs.astype(np.float64)
    if one.data.loss_named(one.config.loss) == "mean_squared_error":
        return exact
    if one.data.loss_named(one.config.loss) == "binary_cross_entropy":
        exact = np.concatenate([np.zeros_like(exact), exact], axis=-1)  # the sigmoid is the softmax of 0 and the logit
    with np.errstate(invalid="ignore"):  # of logits that are infinite in half precision
        exponentials = np.exp(exact - exact.max(axis=-1, keepdims=True))
        probabilities: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def _predictions(one: Trained, outputs: NDArray[np.float32]) -> NDArray[Any]:
    """Return what a single network says: the class of the greatest output, (N, ...), or the numbers."""
    if one.data.loss_named(one.config.loss) == "mean_squared_error":
        return outputs
    if one.data.loss_named(one.config.loss) == "binary_cross_entropy":
        return np.greater(outputs[:, 0], 0).astype(np.int64)
    classes: NDArray[np.int64] = outputs.argmax(axis=-1)
    return classes


def _refuse_other_rows(trained: Sequence[Trained], part: Part, rows: Sequence[NDArray[np.int64]]) -> None:
    first = trained[0]
    for other, its_rows in zip(trained[1:], rows[1:], strict=True):
        if not np.array_equal(its_rows, rows[0]):
            raise UserError(
                f"the {part} part of {other.given} (--seed {other.config.seed}) has other samples than that of "
                f"{first.given} (--seed {first.config.seed}): expected one split; train with one --seed, or score the "
                "test part of a dataset that has one of its own"
            )


# ------------------------------------------------------------------------------------------- reading, on rank 0 alone


def _found(given: Path, *, best: bool) -> _Found:
    """Read the checkpoint that is asked for."""
    try:
        if best and given.is_file():
            raise UserError(
                f"--best looks for the best checkpoint of a run folder, and {given} is a file: leave it out"
            )
        newest, checkpoint, complaints = find_checkpoint(given, str(given))
        found = _checked(given, newest, checkpoint, complaints)
        if not best:
            return found
        step = found.header.progress.best_step
        if step is None:
            raise UserError(f"--best: {given} has no best checkpoint yet, since no epoch of it was validated")
        path = checkpoints.path_of_step(newest.parent, step)
        return _checked(given, path, checkpoints.read(path, follow=False), found.complaints)
    except OSError as error:
        raise UserError(f"cannot look into {error.filename}: {error.strerror}; give another run folder") from None


def _checked(given: Path, path: Path, checkpoint: Checkpoint, complaints: Sequence[str]) -> _Found:
    """Return the checkpoint with its config; raise where its header, which anybody may have made, is none of ours."""
    header = CheckpointHeader.parse(checkpoint.header, path, checkpoint.tensors)
    try:
        config = TrainConfig.from_json(header.config)
        config = replace(config, config=None, run_dir=None, resume=None, trace=None).checked()
    except (LookupError, TypeError) as error:
        raise UserError(f"{path} has settings that this version of distdl does not know: {error}") from None
    except UserError as error:
        raise UserError(f"the settings in {path} cannot be: {error}") from None
    return _Found(given, path, checkpoint, header, config, complaints)


def _arrays(found: Sequence[_Found], data_dir: Path | None, dataset: Dataset | str | None) -> dict[str, NDArray[Any]]:
    """Load the dataset, split it as each run did, and hold it against what each checkpoint was trained on."""
    first = found[0]
    for other in found[1:]:
        if other.config.dataset != first.config.dataset:
            raise UserError(
                f"{other.given} was trained on {other.config.dataset}, {first.given} on {first.config.dataset}: "
                "expected one dataset; evaluate them one by one"
            )
    loaded = _loaded(first, data_dir, dataset)
    of_seed: dict[int, PreparedDataset] = {}
    for one in found:
        if one.config.seed not in of_seed:
            of_seed[one.config.seed] = read_data(one.config, loaded)
        if one.header.data_sha256 != of_seed[one.config.seed].sha256():
            raise UserError(
                f"{one.path} was trained on other images, labels or split than {loaded.name} has here: give the "
                f"same data by {'--dataset' if one.config.dataset.startswith(FROM_PATH) else '--data-dir'}"
            )
    arrays: dict[str, NDArray[Any]] = {}
    for seed, data in of_seed.items():
        arrays |= data.to_arrays(_prefix(seed))
    return arrays


def _loaded(first: _Found, data_dir: Path | None, dataset: Dataset | str | None) -> Dataset:
    """Return the dataset that is given, or load the one that the first run was trained on."""
    if isinstance(dataset, Dataset):
        return dataset
    trained_on = first.config.dataset
    if dataset is not None and trained_on in DATASETS and dataset != trained_on:
        raise UserError(f"{first.given} was trained on {trained_on}: leave --dataset {dataset} out")
    if dataset is None and is_own(trained_on):  # no file is run because a checkpoint names it
        raise UserError(
            f"{first.given} was trained on a dataset of its own; if you trust that code, add --dataset {trained_on}"
        )
    if data_dir is not None and not reads_data_dir(trained_on):
        raise UserError(f"--data-dir does nothing for {trained_on}, which {first.given} was trained on: leave it out")
    return load_dataset(dataset or trained_on, data_dir or first.config.data_dir)


def _prefix(seed: int) -> str:
    """Return the start of the names of the arrays that depend on the seed."""
    return f"{seed} "


# ---------------------------------------------------------------------------------------------------------- networks


def _network(
    config: TrainConfig, path: str, data: PreparedDataset, build_network: BuildNetwork | None, models: Sequence[str]
) -> Sequential:
    """Build the network that a config names."""
    height, width, channels = data.images.shape[1:]
    named, given = config.model, build_network if is_own(config.model) else None
    if is_own(named) and given is None:
        named = next((model for model in models if same_function(model, config.model)), "")
        if not named:  # no file is run because a checkpoint names it
            raise UserError(
                f"cannot build the network of {path}: it was trained with a model of its own; if you trust that code, "
                f"add --model {config.model}, or from a script give build_network to load() of "
                "distdl.inference.evaluation"
            )
    try:
        build = network_builder(named, config.model_settings, given)
        network = build((height, width, channels), outputs_of(config, data)[-1])
        check_outputs(config, network.output_shape, data)
    except UserError as error:
        raise UserError(
            f"cannot build the network of {path}: {error}; one from a script can be evaluated from a script, "
            "with load(…, build_network=…) of distdl.inference.evaluation"
        ) from None
    return network


def _refuse_strangers(models: Sequence[str], configs: Sequence[TrainConfig]) -> None:
    """Raise `UserError` for a model that none of the runs was trained with."""
    for model in models:
        if not any(is_own(config.model) and same_function(model, config.model) for config in configs):
            trained_with = ", ".join(sorted({config.model for config in configs}))
            raise UserError(
                f"--model {model}: no run was trained with it, but with {trained_with}; name that function, or leave "
                "out what is a model of ours"
            )


def _restored(found: _Found, network: Sequential) -> str:
    """Put the checkpoint's numbers into the network, and return the receipt."""
    state = TrainingState(network, optimizer_class(found.config.optimizer)(network.parameters.size))
    checkpoints.restore(found.checkpoint, state.named_arrays(), str(found.path))
    return state.weights_sha256()
