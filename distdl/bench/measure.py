"""Training steps of the engine, timed in worlds of 1, 2, 4 … of the ranks there are.

A *setup* is a kind of scaling, a number of ranks and a batch:

- strong: the batch stays, each rank gets less of it;
- weak: the batch grows with the ranks, each rank's part stays;
- share: one rank, with no more micro-batches than it would have in a larger world. These are the points that
  show how compute depends on a rank's part of the batch alone, which the projection needs.

Each setup is measured several times, all of them in turn, so that a machine that changes its speed does so for
all. Every measurement begins with the same weights and takes the same steps; so strong scaling must also end
with the same weights, whatever the ranks. Ranks that have no part sleep in a barrier.
"""

from __future__ import annotations

import os
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.bench.settings import SCALINGS, Settings
from distdl.config import TrainConfig
from distdl.data import PreparedDataset, sources
from distdl.engine.prepare import check_outputs
from distdl.engine.state import TrainingState
from distdl.engine.stop import StopRequest
from distdl.engine.timing.trace import Trace
from distdl.engine.trainer import Trainer
from distdl.engine.user_code import check_equal_networks, network_builder
from distdl.errors import UserError
from distdl.nn import Sequential
from distdl.optim import optimizer_class
from distdl.parallel import Communicator, share_arrays, together
from distdl.rng import Key

#: Ranks that have slept may share a core at first, until the scheduler has moved one of them.
WARM_UP_SHARE, LEAST_WARM_UP_STEPS = 1 / 3, 3
MEASUREMENT_SECONDS = 1.0
TRIAL_STEPS = 5
CLASSES = 10
RANDOM_PICTURES = 1024
MOST_RANDOM_BYTES = 2**26
#: How long ranks sleep that have no part in a measurement, before they look again.
IDLE_PAUSE_SECONDS = 0.02
KEY = Key(0).of("bench")


@dataclass(frozen=True)
class Setup:
    """What is measured at once."""

    kind: str
    ranks: int
    batch_size: int
    micro_batches: int

    @property
    def largest_shard(self) -> int:
        """Micro-batches of the rank that has most."""
        return -(-self.micro_batches // self.ranks)


@dataclass(frozen=True)
class Sample:
    """One measurement of a setup: seconds over all its steps; lists have one number a rank, in rank order."""

    seconds: float
    step_seconds: list[float]
    """Of each step, on rank 0."""
    compute_seconds: list[float]
    reduction_seconds: list[float]
    wait_seconds: list[float]
    compute_deviation: list[float]
    """Standard deviation of a rank's seconds of compute from step to step."""
    weights_sha256: str


@dataclass(frozen=True)
class Measured:
    """A setup, and what was measured of it."""

    setup: Setup
    oversubscribed: bool
    steps: int
    samples: list[Sample] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Return samples a second of each measurement."""
        return [self.steps * self.setup.batch_size / sample.seconds for sample in self.samples]

    def shares(self) -> tuple[float, float, float]:
        """Return the parts of compute, reduction and waiting in the time of all ranks."""
        parts = [
            sum(sum(getattr(sample, name)) for sample in self.samples)
            for name in ("compute_seconds", "reduction_seconds", "wait_seconds")
        ]
        whole = sum(parts) or 1.0
        return parts[0] / whole, parts[1] / whole, parts[2] / whole

    def slowest(self) -> int:
        """Return the rank that computed longest."""
        sums = [sum(of_rank) for of_rank in zip(*(sample.compute_seconds for sample in self.samples), strict=True)]
        return sums.index(max(sums))

    def a_step(self, read: Callable[[Sample], float]) -> float:
        """Return the median over the measurements of what `read` takes from each, for one step."""
        return statistics.median(read(sample) for sample in self.samples) / self.steps


def setups_of(settings: Settings, ranks: Sequence[int]) -> list[Setup]:
    """Return what there is to measure; strong scaling ends at one micro-batch a rank."""
    micro_batches, size = settings.micro_batches, settings.micro_batch_size
    setups = []
    for kind in SCALINGS[settings.scaling]:
        for count in ranks:
            if kind == "strong" and count <= micro_batches:
                setups.append(Setup(kind, count, settings.batch_size, micro_batches))
            if kind == "weak":
                setups.append(Setup(kind, count, settings.batch_size * count, micro_batches * count))
    if setups:
        share = micro_batches // 2
        while share:
            setups.append(Setup("share", 1, share * size, share))
            share //= 2
    return setups


def places(communicator: Communicator) -> list[tuple[str, list[int]]]:
    """Return each rank's host and the cores it may run on. Collective."""
    found = communicator.allgather_json([socket.gethostname(), sorted(os.sched_getaffinity(0))])
    return [(host, cores) for host, cores in found]


def oversubscribed(where: Sequence[tuple[str, Sequence[int]]], ranks: int) -> bool:
    """Return whether the first `ranks` ranks have fewer cores than they are, on any host.

    >>> oversubscribed([("a", [0, 1])] * 4, 2), oversubscribed([("a", [0, 1])] * 4, 3)
    (False, True)
    >>> oversubscribed([("a", [0]), ("b", [0])], 2), oversubscribed([("a", [0]), ("a", [0])], 2)
    (False, True)
    """
    cores: dict[str, set[int]] = {}
    count: dict[str, int] = {}
    for host, of_rank in where[:ranks]:
        cores.setdefault(host, set()).update(of_rank)
        count[host] = count.get(host, 0) + 1
    return any(count[host] > len(cores[host]) for host in count)


class Bench:
    """The network, the pictures and the worlds that are measured. Collective, like every method.

    Raises `UserError`, on every rank, for what cannot be built or read.
    """

    def __init__(self, settings: Settings, communicator: Communicator, ranks: Sequence[int]) -> None:
        self.settings = settings
        self.communicator = communicator
        arrays = together(communicator, lambda: _pictures(settings).to_arrays() if communicator.rank == 0 else {})
        self._dataset = PreparedDataset.from_arrays(share_arrays(communicator, arrays))
        self.network = together(communicator, self._build)
        check_equal_networks(communicator, settings.model, self.network)
        self.worlds = {count: communicator.split(0 if communicator.rank < count else None) for count in ranks}
        self.places = places(communicator)
        self._first_weights, self._first_buffers = self.network.parameters.copy(), self.network.buffers.copy()
        self._trainers: dict[Setup, Trainer] = {}
        self.steps = settings.steps or self._steps_in(MEASUREMENT_SECONDS)

    def _build(self) -> Sequential:
        _, height, width, channels = self._dataset.images.shape
        build = network_builder(self.settings.model)
        try:
            network = build((height, width, channels), self._dataset.classes)
            network.initialize(KEY.of("initialization"))
        except MemoryError:
            raise UserError(
                f"there is not enough memory for --model {self.settings.model} on {height}x{width}x{channels}: "
                "give smaller images"
            ) from None
        what = TrainConfig(model=self.settings.model, dataset=self.settings.dataset or "the benchmark")
        check_outputs(what, network.output_shape, self._dataset)
        return network

    @property
    def warm_up_steps(self) -> int:
        """Steps before those of a measurement."""
        return max(LEAST_WARM_UP_STEPS, round(self.steps * WARM_UP_SHARE))

    def _steps_in(self, seconds: float) -> int:
        """Return how many steps of the whole batch one rank takes in that time, some at least. Collective."""
        self.steps = TRIAL_STEPS
        trial = self.sample(Setup("strong", 1, self.settings.batch_size, self.settings.micro_batches))
        self._trainers.clear()
        steps = 0 if trial is None else round(seconds * TRIAL_STEPS / trial.seconds)
        return int(self.communicator.bcast_json(max(TRIAL_STEPS, steps)))

    def trainer(self, setup: Setup, world: Communicator) -> Trainer:
        """Return the trainer of a setup, made on first use. All share one network and its buffers."""
        if setup not in self._trainers:
            settings, network = self.settings, self.network
            config = TrainConfig(
                model=settings.model,
                batch_size=setup.batch_size,
                micro_batch_size=settings.micro_batch_size,
                optimizer=settings.optimizer,  # type: ignore[arg-type]  # checked by name
                reduction=settings.reduction,  # type: ignore[arg-type]
            ).checked()
            optimizer = optimizer_class(config.optimizer)(network.parameters.size)
            data = self._data(setup.batch_size * (self.warm_up_steps + self.steps))
            self._trainers[setup] = Trainer(config, world, data, TrainingState(network, optimizer), StopRequest())
        return self._trainers[setup]

    def _data(self, count: int) -> PreparedDataset:
        """Return so many training samples, all of one epoch; pictures come again if there are fewer."""
        return self._dataset.with_training_rows(np.arange(count, dtype=np.int64) % len(self._dataset.images))

    def start_again(self, trainer: Trainer) -> None:
        """Put a trainer's state back to before the first step."""
        state = trainer.state
        state.network.parameters[...] = self._first_weights
        state.network.buffers[...] = self._first_buffers
        for vector in state.optimizer.state.values():
            vector[...] = 0
        state.step_array[...] = 0
        state.epoch_sums.set(0.0, 0, 0)

    def sample(self, setup: Setup) -> Sample | None:
        """Measure a setup once; None on ranks that have no part in it, which sleep meanwhile."""
        with self.world(setup.ranks) as world:
            return None if world is None else self._sample(setup, world)

    @contextmanager
    def world(self, ranks: int) -> Iterator[Communicator | None]:
        """Give the first `ranks` ranks their world, and the machine to themselves: the others, who get None, sleep."""
        self.communicator.oversubscribed = oversubscribed(self.places, ranks)
        yield self.worlds[ranks]
        self.communicator.barrier(longest_pause_seconds=IDLE_PAUSE_SECONDS)

    def _sample(self, setup: Setup, world: Communicator) -> Sample:
        trainer, steps = self.trainer(setup, world), self.steps
        timeline = trainer.timeline
        self.start_again(trainer)
        for _ in range(self.warm_up_steps):
            trainer.step()
        timeline.spent()
        marks: list[NDArray[np.float64]] = []
        timeline.on_steps = marks.append
        world.barrier()
        started = timeline.clock()
        for _ in range(steps):
            trainer.step()
        seconds = timeline.clock() - started
        spent = timeline.spent()
        timeline.on_steps = None
        begin, enter, _, leave, end = np.concatenate(marks).T
        compute = end - begin - (leave - enter)
        of_ranks = world.allgather_json([seconds, float(compute.std())])
        return Sample(
            seconds=max(of_rank[0] for of_rank in of_ranks),
            step_seconds=(end - begin).tolist(),
            compute_seconds=list(spent.compute),
            reduction_seconds=list(spent.reduction),
            wait_seconds=list(spent.waiting),
            compute_deviation=[of_rank[1] for of_rank in of_ranks],
            weights_sha256=trainer.state.weights_sha256(),
        )


def measure_scaling(bench: Bench, setups: Sequence[Setup], say: Callable[[str], None]) -> list[Measured]:
    """Measure every setup as often as the settings say, in turn. What it returns is whole on rank 0. Collective."""
    settings = bench.settings
    measured = [Measured(setup, oversubscribed(bench.places, setup.ranks), bench.steps) for setup in setups]
    for repetition in range(settings.repetitions if setups else 0):
        say(f"measuring, repetition {repetition + 1} of {settings.repetitions}")
        for one in measured:
            sample = bench.sample(one.setup)
            if sample is not None:
                one.samples.append(sample)
    return measured


def traced(bench: Bench) -> dict[str, Any] | None:
    """Return the trace of one measurement on as many ranks as share the batch, on rank 0 alone. Collective."""
    settings = bench.settings
    ranks = max(count for count in bench.worlds if count <= settings.micro_batches)
    with bench.world(ranks) as world:
        if world is None:
            return None
        trainer = bench.trainer(Setup("strong", ranks, settings.batch_size, settings.micro_batches), world)
        bench.start_again(trainer)
        for _ in range(bench.warm_up_steps):
            trainer.step()
        trainer.timeline.spent()
        trace = Trace(trainer.timeline)
        for _ in range(bench.steps):
            trainer.step()
        trainer.timeline.spent()
        trainer.timeline.on_steps = None
        return trace.gather(bench.warm_up_steps + bench.steps)


def _pictures(settings: Settings) -> PreparedDataset:
    """Return the dataset, or random pixels of the given shape, all for training."""
    if settings.dataset is not None:
        dataset = sources.load(settings.dataset, settings.data_dir)
        images, labels, classes = dataset.images, dataset.labels, dataset.classes
    else:
        pixels = int(np.prod(settings.input_shape, dtype=np.int64))
        count = max(1, min(RANDOM_PICTURES, MOST_RANDOM_BYTES // pixels))
        if count * pixels > 4 * MOST_RANDOM_BYTES:
            raise UserError(f"--input {'x'.join(map(str, settings.input_shape))} is too large a picture: give less")
        words = KEY.of("pixels").words(-(-count * pixels // 8))
        images = words.view(np.uint8)[: count * pixels].reshape(count, *settings.input_shape)
        labels = np.arange(count, dtype=np.int64) % CLASSES
        classes = CLASSES
    return PreparedDataset.for_training_only(images, labels, classes)
