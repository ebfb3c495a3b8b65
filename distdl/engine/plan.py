"""The plan of a run: ``--dry-run`` checks everything that a start checks, writes nothing, and prints the plan.

It prepares the run as a training does, up to the first step. It then takes a few real steps to estimate the time, and
throws the result away.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from distdl.config import TrainConfig
from distdl.data import Dataset, PreparedDataset
from distdl.data.split import Rows
from distdl.engine.console import Console
from distdl.engine.coordinator import RunFacts
from distdl.engine.environment import numerics
from distdl.engine.kernels import compile_for
from distdl.engine.memory import PROGRAM_BYTES, Need, gigabytes, need_of
from distdl.engine.prepare import Preparation
from distdl.engine.printed_lines import banner_of, duration, lines_of, shares_of
from distdl.engine.proving import with_proof
from distdl.engine.stop import StopRequest
from distdl.engine.storage.files import try_folder
from distdl.engine.storage.run_folder import StartingPoint
from distdl.engine.table import shortened, table
from distdl.engine.trainer import Trainer
from distdl.engine.user_code import BuildNetwork, agree_on_config
from distdl.errors import UserError, one_line
from distdl.host_memory import available_bytes
from distdl.mapped_files import release_pages
from distdl.parallel import Communicator, guard, on_rank_0, world

#: The measurement of the time ends after these seconds, but not before the second step, unless a step is very slow.
SECONDS, SLOW_SECONDS = 2.0, 60.0
#: Rows of the table of classes.
MOST_ROWS = 20
LONGEST_NAME = 32
#: A class with so many times fewer training images than another one is worth a hint.
IMBALANCE = 10
PARTS = ("training", "validation", "test")


def dry_run(
    config: TrainConfig,
    communicator: Communicator | None = None,
    *,
    build_network: BuildNetwork | None = None,
    dataset: Dataset | None = None,
    console: Console | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Check what a training checks, and print its plan. The arguments are those of `distdl.engine.train`.

    Collective. Raises `UserError` on every rank for errors in what the user gave.
    """
    communicator = world() if communicator is None else communicator
    stop, console = StopRequest(), console or Console(live=False)
    with stop.listening(), guard(communicator):
        config = agree_on_config(config, build_network, dataset, communicator)
        with numerics(config.threads_per_rank):
            preparation = Preparation(config, build_network, dataset, console, stop)
            trainer, facts, start = preparation.build(communicator)
            on_rank_0(communicator, lambda: _check_folder(start))
            lines = banner_of(trainer.config, trainer.data, trainer.state.network, facts.environment, communicator)
            lines += ["", *memory_lines(trainer, facts)]

            def describe_data() -> None:
                _print(console, [*lines, "", *data_lines(trainer.data)])
                for warning in (*trainer.data.notes, *preparation.warnings):
                    console.warning(warning)

            stop.on_rank_0(communicator, describe_data)
            warnings = compile_for(trainer, console)
            if config.prove:
                with_proof(facts, trainer, start, console)
            found = time_lines(trainer, clock)
            if communicator.rank == 0:
                for warning in warnings:
                    console.warning(warning)
                hints = suggestions(config, trainer.data, communicator.size)
                _print(console, ["", *found, *hints, "nothing was written; to start, leave out --dry-run"])


def _print(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        for part in lines_of([line]) or [""]:
            console.line(part)


def _check_folder(start: StartingPoint | None) -> None:
    """Raise `UserError` if the run folder could not be made."""
    assert start is not None
    try:
        try_folder(start.folder)
    except OSError as error:
        raise UserError(f"cannot use the run folder {start.folder}: {error.strerror or error}") from None


def memory_lines(trainer: Trainer, facts: RunFacts) -> list[str]:
    """Return the lines on the memory of the ranks and their hosts. Collective."""
    communicator, data = trainer.communicator, trainer.data
    need = need_of(trainer.config, data, trainer.state, ranks=communicator.size, rank=communicator.rank)
    everyone = communicator.allgather_json([vars(need), min(available_bytes(), 2.0**62)])
    needs, left = [Need(**one) for one, _ in everyone], min(bytes_left for _, bytes_left in everyone)
    largest = max(needs, key=lambda one: one.bytes)
    in_memory = not isinstance(data.images, np.memmap)
    dataset = f"{gigabytes(data.images.nbytes)} {'of memory per host' if in_memory else 'in a mapped file'}"
    of_rank = largest.bytes + PROGRAM_BYTES
    of_a_host = max(facts.environment["hosts"].values()) * of_rank
    return [
        f"memory per rank, an estimate: {gigabytes(of_rank)} (layers {gigabytes(largest.working)})",
        f"memory per host: {gigabytes(of_a_host)}; available: {gigabytes(left)}",
        f"dataset: {dataset}",
    ]


def data_lines(data: PreparedDataset) -> list[str]:
    """Return the tables of the data: the samples of each class in each part, or the range of each number."""
    parts = [getattr(data.parts, name) for name in PARTS]
    if data.task == "regression":
        targets = data.labels[data.parts.training]
        head = ["number", "least", "mean", "greatest"]
        columns = [targets.min(axis=0), targets.mean(axis=0, dtype=np.float64), targets.max(axis=0)]
        rows = [[_name(data, k), *(f"{column[k]:.4g}" for column in columns)] for k in range(data.classes)]
    else:
        head = ["class" if data.task == "classification" else "class (pixels)", *PARTS]
        counts = [_counts(data, rows) for rows in parts]
        rows = [[_name(data, k), *(f"{count[k]:,}" for count in counts)] for k in range(data.classes)]
    more = len(rows) - MOST_ROWS
    if more > 0:
        rows = [*rows[: MOST_ROWS - 1], [f"… {more + 1} more", *[""] * (len(head) - 1)]]
    return [*table([head, *rows], "<"), "", *repeated_lines(data)]


def _name(data: PreparedDataset, output: int) -> str:
    return str(output) if data.class_names is None else shortened(one_line(data.class_names[output]), LONGEST_NAME)


def _counts(data: PreparedDataset, rows: Rows) -> Sequence[int]:
    """Return the number of labels of each class in some samples; pixels without a label do not count."""
    counts = np.zeros(data.classes, np.int64)
    for row in np.array_split(rows, max(1, len(rows) // 1024)):
        labels = data.labels[row].reshape(-1)
        counts += np.bincount(labels[labels >= 0], minlength=data.classes)
    found: list[int] = counts.tolist()
    return found


def repeated_lines(data: PreparedDataset) -> list[str]:
    """Return the lines on identical images: those of other parts that are in training too, and those within it."""
    digests = {name: list(_digests(data, getattr(data.parts, name))) for name in PARTS}
    trained = set(digests["training"])
    lines = [
        f"identical images in training and {name}: {sum(digest in trained for digest in digests[name]):,} "
        f"(of {len(digests[name]):,})"
        for name in ("validation", "test")
    ]
    again, images = len(digests["training"]) - len(trained), len(digests["training"])
    return [*lines, f"identical images within training: {again:,} (of {images:,})"]


def _digests(data: PreparedDataset, rows: Rows) -> Iterator[bytes]:
    for row in rows:
        yield hashlib.blake2b(np.ascontiguousarray(data.images[row]).data, digest_size=16).digest()
    release_pages(data.images)


def time_lines(trainer: Trainer, clock: Callable[[], float]) -> list[str]:
    """Take some steps and return the lines on steps and time. The state is of no use afterwards. Collective."""
    config, communicator, first = trainer.config, trainer.communicator, trainer.state.step
    remaining = trainer.last_step - first
    epochs = -(-remaining // trainer.steps_per_epoch)
    after = f", continuing after step {first:,}" if first else ""
    lines = [
        f"steps: {trainer.steps_per_epoch:,} per epoch, {remaining:,} in all{after}",
        f"micro-batches per step: {config.micro_batches}, {shares_of(config.micro_batches, communicator.size)}",
    ]
    if remaining < 1:
        return [*lines, "the training is complete"]
    of_a_step = _measured(trainer, trainer.take_step, clock, remaining)
    validation = trainer.data.parts.validation
    rows = validation[: config.batch_size]
    of_a_row = _measured(trainer, lambda: trainer.evaluate(rows), clock, len(validation)) / len(rows)
    of_training, of_validation = of_a_step * remaining, of_a_row * len(validation) * epochs
    rate = config.batch_size / of_a_step if of_a_step else 0
    whole = f"{duration(of_training + of_validation)} in all (validation {duration(of_validation)})"
    return [*lines, f"time, from a short measurement: {rate:,.0f} samples/s, {whole}"]


def _measured(trainer: Trainer, work: Callable[[], object], clock: Callable[[], float], most: int) -> float:
    """Return the seconds of a call, the mean of the later half of at most `most` calls. Collective."""
    communicator, begun, times = trainer.communicator, clock(), [0.0]
    while len(times) <= most and (times[-1] < SECONDS or (len(times) == 2 and times[-1] < SLOW_SECONDS)):
        work()
        trainer.stop.stop_if_asked(communicator)
        times.append(communicator.bcast_json(clock() - begun))
    half = len(times) // 2
    return (times[-1] - times[half]) / (len(times) - 1 - half) if half < len(times) - 1 else times[-1]


def suggestions(config: TrainConfig, data: PreparedDataset, ranks: int) -> list[str]:
    """Return hints that may help."""
    hints = []
    if data.task == "classification":
        counts = _counts(data, data.parts.training)
        least, most = min(counts), max(counts)
        if least and most >= IMBALANCE * least and config.class_weights == "none":
            rare, frequent = counts.index(least), counts.index(most)
            hints.append(
                f"the class {_name(data, frequent)} has {most // least} times the images of {_name(data, rare)}: "
                "consider --class-weights balanced"
            )
    cores = min(len(os.sched_getaffinity(0)), config.micro_batches)
    if ranks == 1 and cores > 1:
        hints.append(f"there are {len(os.sched_getaffinity(0))} cores: consider python -m distdl.mpirun -n {cores}")
    return [f"suggestion: {hint}" for hint in hints]
