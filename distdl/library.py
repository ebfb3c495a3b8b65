"""The library: `distdl.train` and `distdl.load`, for scripts and notebooks (docs/library.md).

This module imports neither NumPy nor MPI: the functions import the engine when they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distdl.config import TrainConfig

if TYPE_CHECKING:
    from distdl.data import Dataset
    from distdl.engine import Summary
    from distdl.engine.callbacks import Callback
    from distdl.engine.console import Console
    from distdl.engine.stop import StopRequest
    from distdl.engine.trainer import Trainer
    from distdl.engine.user_code import BuildNetwork
    from distdl.inference.model import Model
    from distdl.nn import Sequential
    from distdl.parallel import Communicator

#: The description of the record of an epoch in ``metrics.jsonl``.
EPOCH = {"step": int, "epoch": int, "train_loss": float, "validation_loss": float}


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a training; the same on every rank, except for `rank`."""

    history: list[dict[str, float]]
    """The record of each epoch since the start of the run, as in ``metrics.jsonl``: ``step``, ``epoch``,
    ``train_loss``, ``train_accuracy``, ``validation_loss``, ``validation_accuracy``. Regression has no accuracies."""
    network: Sequential
    """The network with the last weights. It takes normalized images; `distdl.load` also normalizes them."""
    run_dir: Path
    receipt: str
    """The sha256 of the weights."""
    summary: Summary
    """All other results, such as ``test_accuracy``."""
    rank: int
    """The number of this process among the ranks that are alive. To print once, print if it is 0."""


def train(
    config: TrainConfig | None = None,
    *,
    dataset: Dataset | None = None,
    build_network: BuildNetwork | None = None,
    callbacks: Sequence[Callback] = (),
    communicator: Communicator | None = None,
) -> Result:
    """Train as `config` says, on all ranks of this job, and return the result.

    `dataset` and `build_network(input_shape, classes)` replace the dataset and the model that the config names. They
    must be the same on every rank. `callbacks`: see `Callback`. `communicator` holds other ranks than those of the job.

    >>> import tempfile
    >>> config = TrainConfig(model="mlp", epochs=1, run_dir=Path(tempfile.mkdtemp()))
    >>> result = train(config)  # doctest: +ELLIPSIS
    distdl ...
    >>> len(result.history), len(result.receipt), sorted(path.name for path in result.run_dir.glob("*.toml"))
    (1, 64, ['config.toml'])

    Collective. Raises `UserError` on every rank for errors in what the user gave, `Stopped` after a signal and a
    checkpoint. Any other exception on any rank ends the whole job.
    """
    result, _ = run_training(
        TrainConfig() if config is None else config,
        dataset=dataset,
        build_network=build_network,
        callbacks=callbacks,
        communicator=communicator,
    )
    return result


def run_training(
    config: TrainConfig,
    *,
    dataset: Dataset | None = None,
    build_network: BuildNetwork | None = None,
    callbacks: Sequence[Callback] = (),
    communicator: Communicator | None = None,
    console: Console | None = None,
    stop: StopRequest | None = None,
) -> tuple[Result, Communicator]:
    """Train as `train` does, and also return the ranks that are alive at the end. Collective.

    `console` prints. `stop` is a stop request that the caller keeps.
    """
    from distdl import engine  # noqa: PLC0415  see the docstring of this module
    from distdl.json_files import read_json_lines  # noqa: PLC0415
    from distdl.parallel import from_rank_0, guard  # noqa: PLC0415

    trainers: list[Trainer] = []
    summary = engine.train(
        config,
        communicator,
        build_network=build_network,
        dataset=dataset,
        callbacks=callbacks,
        console=console,
        stop=stop,
        attach=trainers.append,
    )
    trainer = trainers[-1]
    metrics, alive = trainer.folder / "metrics.jsonl", trainer.communicator
    with guard(alive):
        history = from_rank_0(alive, lambda: read_json_lines(metrics, EPOCH, having="validation_loss"))
    result = Result(history, trainer.state.network, trainer.folder, summary.weights_sha256, summary, alive.rank)
    return result, alive


def load(
    run: Path | str,
    *,
    best: bool = False,
    build_network: BuildNetwork | None = None,
    communicator: Communicator | None = None,
) -> Model:
    """Return the network of a run folder or checkpoint, for predictions and scores. The training data is not needed.

    A run folder stands for its newest intact checkpoint, or with `best` for that of the best validation. If the network
    was built by a function of the user, give that function: no code runs because a file names it.

    Collective. Raises `UserError` on every rank if there is no checkpoint or its network cannot be built,
    `DamagedFileError` if the file is damaged.
    """
    from distdl.inference.model import load_model  # noqa: PLC0415  see the docstring of this module

    return load_model(run, best=best, build_network=build_network, communicator=communicator)
