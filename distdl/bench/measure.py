"""Time the engine's training steps in worlds of 1, 2, 4 … of the job's ranks.

A *case* is a kind of scaling, a number of ranks and a batch:

- strong: the batch size is fixed, so each rank's part shrinks;
- weak: the batch grows with the ranks, so each rank's part is fixed;
- share: one rank computes only the micro-batches that it would have in a larger world. These cases show how compute
  depends on a rank's part of the batch. The projection needs them.

Each case is measured several times. The cases take turns, so a change of the machine's speed affects all of them.
Every measurement starts from the same weights and takes the same steps. So strong scaling must end with the same
weights on any number of ranks. Unused ranks sleep in a barrier.
"""

import os
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distdl.bench.settings import SCALINGS, BenchSettings
from distdl.config import TrainConfig
from distdl.data import MicroBatches, PreparedDataset, sources
from distdl.data.batch_order import BatchOrder
from distdl.engine.checks.nonfinite import FiniteCheck
from distdl.engine.kernels import agreed_kernels, compile_for_network
from distdl.engine.requirements import check_outputs
from distdl.engine.state import TrainingState
from distdl.engine.step import OptimizerStep, supervised
from distdl.engine.timing.timeline import Spent, Timeline
from distdl.engine.timing.trace import Trace
from distdl.engine.user_code import check_equal_networks, network_builder
from distdl.errors import UserError
from distdl.nn import Sequential, make_loss
from distdl.nn.kernels.choice import kernels_named
from distdl.optim import optimizer_class
from distdl.parallel import Communicator, on_rank_0, share_arrays, together
from distdl.rng import Key

#: Ranks that wake up may share a core until the scheduler moves one of them.
WARM_UP_SHARE, LEAST_WARM_UP_STEPS = 1 / 3, 3
MEASUREMENT_SECONDS = 1.0
TRIAL_STEPS = 5
CLASSES = 10
RANDOM_IMAGES = 1024
MOST_RANDOM_BYTES = 2**26
#: Longest sleep of an unused rank before it looks again.
IDLE_PAUSE_SECONDS = 0.02
KEY = Key(0).of("bench")


@dataclass(frozen=True)
class ScalingCase:
    """A kind of scaling, a number of ranks and a batch."""

    kind: str
    ranks: int
    batch_size: int
    micro_batches: int


@dataclass(frozen=True)
class Measurement:
    """One measurement of a case: seconds over all its steps. The lists have one number per rank, in rank order."""

    seconds: float
    step_seconds: list[float]
    """One number per step, on rank 0."""
    compute_seconds: list[float]
    reduction_seconds: list[float]
    wait_seconds: list[float]
    compute_deviation: list[float]
    """Standard deviation of a rank's compute seconds over the steps."""
    weights_sha256: str


@dataclass(frozen=True)
class MeasuredCase:
    """A case and its measurements."""

    case: ScalingCase
    oversubscribed: bool
    steps: int
    measurements: list[Measurement] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Return the samples per second of each measurement."""
        return [self.steps * self.case.batch_size / one.seconds for one in self.measurements]

    @property
    def spent(self) -> Spent:
        """The seconds of all measurements together."""

        def of_ranks(name: str) -> tuple[float, ...]:
            return tuple(map(sum, zip(*(getattr(one, name) for one in self.measurements), strict=True)))

        return Spent(of_ranks("compute_seconds"), of_ranks("reduction_seconds"), of_ranks("wait_seconds"))

    def median_per_step(self, read: Callable[[Measurement], float]) -> float:
        """Return the median of `read(measurement)` over the measurements, divided by the number of steps."""
        return statistics.median(map(read, self.measurements)) / self.steps

    def to_json(self) -> dict[str, Any]:
        """Return the entry in ``bench.json``."""
        return {
            "setup": asdict(self.case),
            "oversubscribed": self.oversubscribed,
            "steps": self.steps,
            "samples": [asdict(one) for one in self.measurements],
            "samples_per_second": self.rates(),
            "shares": dict(zip(("compute", "reduction", "wait"), self.spent.shares(), strict=True)),
            "slowest_rank": self.spent.slowest,
        }


def scaling_cases(settings: BenchSettings, ranks: Sequence[int]) -> list[ScalingCase]:
    """Return the cases to measure; strong scaling stops at one micro-batch per rank."""
    micro_batches, size = settings.micro_batches, settings.micro_batch_size
    cases = []
    for kind in SCALINGS[settings.scaling]:
        for count in ranks:
            factor = count if kind == "weak" else 1
            if count <= micro_batches * factor:
                cases.append(ScalingCase(kind, count, settings.batch_size * factor, micro_batches * factor))
    share = micro_batches // 2 if cases else 0
    while share:
        cases.append(ScalingCase("share", 1, share * size, share))
        share //= 2
    return cases


def oversubscribed(cores_of_ranks: Sequence[tuple[str, Sequence[int]]], ranks: int) -> bool:
    """Return whether the first `ranks` ranks outnumber their cores on any host."""
    by_host: dict[str, list[Sequence[int]]] = {}
    for host, cores in cores_of_ranks[:ranks]:
        by_host.setdefault(host, []).append(cores)
    return any(len(of_ranks) > len(set().union(*of_ranks)) for of_ranks in by_host.values())


class TrainingSteps:
    """A trainer's steps without a trainer: no coordinator, validation or checkpoints, but the observers of every run.

    Each step has the same bits as a trainer's step with a constant learning rate. Collective.
    """

    def __init__(
        self, config: TrainConfig, communicator: Communicator, dataset: PreparedDataset, state: TrainingState
    ) -> None:
        self.config = config
        self.state = state
        self.timeline = Timeline(communicator)
        check = FiniteCheck(config, state, save=lambda fault: None)  # noqa: ARG005
        self._step = OptimizerStep(
            communicator,
            state.network,
            state.optimizer,
            micro_batch_size=config.micro_batch_size,
            reduction=config.reduction,
            observers=[self.timeline, check],
        )
        row_loader = state.network.stack.kernels.row_loader
        self._micro_batches = MicroBatches(dataset, config.micro_batch_size, row_loader=row_loader)
        self._loss = state.network.stack.kernels.loss(make_loss(dataset.default_loss))
        self._key = Key(config.seed)
        self._batch_order = BatchOrder(dataset.parts.training, config.batch_size, self._key)

    def take(self, count: int) -> None:
        """Take `count` steps."""
        state = self.state
        for step in range(state.step, state.step + count):
            rows = self._batch_order.rows(step)
            load = partial(self._micro_batches.load, rows)
            compute = supervised(state.network, self._loss, load, self._key.of("training", step))
            rate = self.config.learning_rate
            self._step.take(compute, samples=len(rows), learning_rate=rate, update_number=step + 1)
            state.step_array += 1


class Workbench:
    """The network, the images and the worlds of a benchmark. Making one and every method are collective.

    Raises `UserError` on every rank if the network cannot be built or the dataset cannot be read.
    """

    def __init__(self, settings: BenchSettings, communicator: Communicator, ranks: Sequence[int]) -> None:
        self.settings = settings
        self.communicator = communicator
        arrays = on_rank_0(communicator, lambda: _dataset(settings).to_arrays()) or {}
        self._dataset = PreparedDataset.from_arrays(share_arrays(communicator, arrays))
        self.kernels = agreed_kernels(settings.kernels, communicator)
        self.network = together(communicator, self._build)
        check_equal_networks(communicator, settings.model, self.network)
        compile_for_network(self.network, communicator, training=True)
        self.worlds = {count: communicator.split(0 if communicator.rank < count else None) for count in ranks}
        #: Each rank's host and the cores it may run on.
        self.cores_of_ranks = communicator.allgather_json([socket.gethostname(), sorted(os.sched_getaffinity(0))])
        self._first_weights, self._first_buffers = self.network.parameters.copy(), self.network.buffers.copy()
        self._steps: dict[ScalingCase, TrainingSteps] = {}
        self.steps = settings.steps or self._steps_in(MEASUREMENT_SECONDS)

    def _build(self) -> Sequential:
        _, height, width, channels = self._dataset.images.shape
        build = network_builder(self.settings.model)
        try:
            network = build((height, width, channels), self._dataset.classes)
            network.use(kernels_named(self.kernels))
            network.initialize(KEY.of("initialization"))
        except MemoryError:
            raise UserError(
                f"there is not enough memory for --model {self.settings.model} on {height}x{width}x{channels}: "
                "give smaller images"
            ) from None
        config = TrainConfig(model=self.settings.model, dataset=self.settings.dataset or "the benchmark")
        check_outputs(config, network.output_shape, self._dataset)
        return network

    @property
    def warm_up_steps(self) -> int:
        """Number of steps before a measurement."""
        return max(LEAST_WARM_UP_STEPS, round(self.steps * WARM_UP_SHARE))

    def _steps_in(self, seconds: float) -> int:
        """Return how many steps one rank takes in that time, at least `TRIAL_STEPS`."""
        self.steps = TRIAL_STEPS
        trial = self.measure(ScalingCase("strong", 1, self.settings.batch_size, self.settings.micro_batches))
        self._steps.clear()
        steps = 0 if trial is None else round(seconds * TRIAL_STEPS / trial.seconds)
        return int(self.communicator.bcast_json(max(TRIAL_STEPS, steps)))

    @contextmanager
    def world(self, ranks: int) -> Iterator[Communicator | None]:
        """Yield the world of the first `ranks` ranks; yield None on the other ranks, which then sleep until the end."""
        self.communicator.waiting.oversubscribed = oversubscribed(self.cores_of_ranks, ranks)
        yield self.worlds[ranks]
        self.communicator.barrier(longest_pause_seconds=IDLE_PAUSE_SECONDS)

    def warmed_up(self, case: ScalingCase, world: Communicator) -> TrainingSteps:
        """Return the steps of a case after the warm-up steps. All cases share one network and its buffers."""
        if case not in self._steps:
            self._steps[case] = self._make_steps(case, world)
        steps = self._steps[case]
        state = steps.state
        state.network.parameters[...] = self._first_weights
        state.network.buffers[...] = self._first_buffers
        for vector in state.optimizer.state.values():
            vector[...] = 0
        state.step_array[...] = 0
        steps.take(self.warm_up_steps)
        steps.timeline.spent()
        return steps

    def _make_steps(self, case: ScalingCase, world: Communicator) -> TrainingSteps:
        settings = self.settings
        config = TrainConfig(
            model=settings.model,
            batch_size=case.batch_size,
            micro_batch_size=settings.micro_batch_size,
            optimizer=settings.optimizer,  # type: ignore[arg-type]  # checked by name
            reduction=settings.reduction,  # type: ignore[arg-type]
        ).checked()
        count = case.batch_size * (self.warm_up_steps + self.steps)  # one epoch; images repeat if there are fewer
        rows = np.arange(count, dtype=np.int64) % len(self._dataset.images)
        fused = self.network.stack.kernels.optimizer_rule(config.optimizer)
        optimizer = optimizer_class(config.optimizer)(self.network.parameters.size, fused=fused)
        state = TrainingState(self.network, optimizer)
        return TrainingSteps(config, world, self._dataset.with_training_rows(rows), state)

    def measure(self, case: ScalingCase) -> Measurement | None:
        """Measure a case once; return None on ranks outside its world."""
        marks: list[NDArray[np.float64]] = []
        with self.world(case.ranks) as world:
            if world is None:
                return None
            steps = self.warmed_up(case, world)
            timeline = steps.timeline
            timeline.on_steps = marks.append
            world.barrier()
            started = timeline.clock()
            steps.take(self.steps)
            seconds = timeline.clock() - started
            spent = timeline.spent()
            timeline.on_steps = None
            begin, enter, _, leave, end = np.concatenate(marks).T
            compute = end - begin - (leave - enter)
            of_ranks = world.allgather_json([seconds, float(compute.std())])
        return Measurement(
            seconds=max(of_rank[0] for of_rank in of_ranks),
            step_seconds=(end - begin).tolist(),
            compute_seconds=list(spent.compute),
            reduction_seconds=list(spent.reduction),
            wait_seconds=list(spent.waiting),
            compute_deviation=[of_rank[1] for of_rank in of_ranks],
            weights_sha256=steps.state.weights_sha256(),
        )

    def record_trace(self) -> dict[str, Any] | None:
        """Return a trace of one measurement on as many ranks as the batch allows; None on ranks above 0."""
        settings = self.settings
        ranks = max(count for count in self.worlds if count <= settings.micro_batches)
        with self.world(ranks) as world:
            if world is None:
                return None
            steps = self.warmed_up(ScalingCase("strong", ranks, settings.batch_size, settings.micro_batches), world)
            trace = Trace(steps.timeline)
            steps.take(self.steps)
            steps.timeline.spent()
            steps.timeline.on_steps = None
            return trace.gather(steps.state.step)


def measure_scaling(
    bench: Workbench, cases: Sequence[ScalingCase], print_line: Callable[[str], None]
) -> list[MeasuredCase]:
    """Measure each case `--repetitions` times, in turns. The result is complete on rank 0 only. Collective."""
    repetitions = bench.settings.repetitions if cases else 0
    measured = [MeasuredCase(case, oversubscribed(bench.cores_of_ranks, case.ranks), bench.steps) for case in cases]
    for repetition in range(repetitions):
        print_line(f"measuring, repetition {repetition + 1} of {repetitions}")
        for one in measured:
            measurement = bench.measure(one.case)
            if measurement is not None:
                one.measurements.append(measurement)
    return measured


def _dataset(settings: BenchSettings) -> PreparedDataset:
    """Return the dataset, or random pixels of the given shape, all for training."""
    if settings.dataset is not None:
        dataset = sources.load(settings.dataset, settings.data_dir)
        return PreparedDataset.for_training_only(dataset.images, dataset.labels, dataset.classes)
    pixels = int(np.prod(settings.input_shape, dtype=np.int64))
    count = max(1, min(RANDOM_IMAGES, MOST_RANDOM_BYTES // pixels))
    if count * pixels > 4 * MOST_RANDOM_BYTES:
        shape = "x".join(map(str, settings.input_shape))
        raise UserError(
            f"--input {shape} is too large: an image may have at most {4 * MOST_RANDOM_BYTES:,} numbers; "
            "give a smaller shape"
        )
    words = KEY.of("pixels").words(-(-count * pixels // 8))
    images = words.view(np.uint8)[: count * pixels].reshape(count, *settings.input_shape)
    return PreparedDataset.for_training_only(images, np.arange(count, dtype=np.int64) % CLASSES, CLASSES)
