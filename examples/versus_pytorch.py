"""Compare the training speed of distdl with that of PyTorch on your machine; print a table in Markdown.

    python examples/versus_pytorch.py
    python examples/versus_pytorch.py --torch-python ~/torch-venv/bin/python --rows mlp-2,simple_convnet-2

A step is: pick the batch's rows from a dataset in memory, forward, backward, sum the gradients over the ranks, Adam.
The data are random pixels in MNIST's shape, and random labels.

- distdl: the trainer's steps, with one BLAS thread per rank. Each micro-batch is converted from bytes to normalized
  pixels on the way.
- PyTorch: `pytorch_ddp.py` next to this file, with one thread per rank. Its pixels are normalized in advance.

Both stay alive and take turns of a few seconds, so other load on the machine affects both. The waiting side is blocked
in a read. Both are started several times, because a process can be lucky or unlucky with its memory for all its life.
PyTorch first tries all its forms. The fastest form of each layout takes part in the rounds, and the better of these is
compared with distdl. Each round gives a ratio of samples per second. The table shows its median and quartiles.
"""

import contextlib
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from distdl import cli
from distdl.bench.measure import TrainingSteps
from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.engine.environment import kernel_family, numerics
from distdl.engine.state import TrainingState
from distdl.errors import UserError, unknown_name
from distdl.job.mpirun_command import environment_for, mpirun_command
from distdl.nn import build_model
from distdl.optim import optimizer_class
from distdl.parallel import world
from distdl.rng import Key

PYTORCH_DDP = Path(__file__).with_name("pytorch_ddp.py")
PIP = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
SECONDS_TO_START = 120
TRIALS = 3
#: These make NumPy and its BLAS use slower kernels than the CPU has, and have no effect on PyTorch.
SLOWER_KERNELS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "NPY_DISABLE_CPU_FEATURES")


TITLES = {
    "mlp": "MLP 784-100-10",
    "simple_convnet": "SimpleConvNet",
    "deep_convnet": "DeepConvNet",
    "resnet20": "ResNet-20",
}


@dataclass(frozen=True)
class Job:
    """A row of the table: the training that both sides do."""

    model: str
    ranks: int
    batch_size: int
    micro_batch_size: int
    samples: int = 0

    @property
    def title(self):
        return f"{TITLES[self.model]}, {self.ranks} rank{'s' if self.ranks > 1 else ''}, batch {self.batch_size}"


#: PyTorch has no micro-batches. Of the sizes that divide a rank's share evenly, these were the fastest on one machine:
#: large ones suit affine layers, and small ones stay in the cache.
ROWS = {
    "simple_convnet-2": Job("simple_convnet", ranks=2, batch_size=128, micro_batch_size=64),
    "deep_convnet-2": Job("deep_convnet", ranks=2, batch_size=128, micro_batch_size=32),
    "simple_convnet-1": Job("simple_convnet", ranks=1, batch_size=100, micro_batch_size=100),
    "deep_convnet-1": Job("deep_convnet", ranks=1, batch_size=100, micro_batch_size=100),
    "mlp-2": Job("mlp", ranks=2, batch_size=128, micro_batch_size=64),
    "resnet20-2": Job("resnet20", ranks=2, batch_size=128, micro_batch_size=64),
}


# --------------------------------------------------------------------------------------------------- distdl


def random_data(samples):
    """Return random pixels and labels, all for training."""
    key = Key(0)
    pixels = key.of("pixels").words(samples * 28 * 28 // 8).astype("<u8", copy=False)
    images = pixels.view(np.uint8).reshape(samples, 28, 28, 1)
    labels = (key.of("labels").words(samples) % np.uint64(10)).astype(np.int64)
    return PreparedDataset.for_training_only(images, labels, classes=10)


def training_steps(job, communicator):
    """Return the trainer's steps of a job."""
    config = TrainConfig(model=job.model, batch_size=job.batch_size, micro_batch_size=job.micro_batch_size).checked()
    data = random_data(job.samples)
    network = build_model(job.model, data.images.shape[1:], data.classes)
    network.initialize(Key(0).of("initialization"))
    optimizer = optimizer_class("adam")(network.parameters.size, decay_slices=network.decay_slices)
    return TrainingSteps(config, communicator, data, TrainingState(network, optimizer))


def our_side(address, job):
    """Run one rank of distdl: connect to the socket, introduce this rank, and take steps until the socket closes."""
    communicator = world()
    with numerics(threads=1), socket.socket(socket.AF_UNIX) as channel:
        training = training_steps(job, communicator)
        channel.connect(address)
        with channel.makefile("rw") as lines:
            about = f"distdl on NumPy {np.__version__} ({kernel_family()}), {communicator.description}"
            answer = {
                "rank": communicator.rank,
                "about": about,
                "forms": ["distdl"],
                "parameters": training.state.network.parameter_count,
            }
            while True:
                print(json.dumps(answer), file=lines, flush=True)
                command = lines.readline()
                if not command:
                    break
                _, steps = json.loads(command)
                started = time.perf_counter()
                training.take(steps)
                answer = time.perf_counter() - started


# ------------------------------------------------------------------------------------------------ both sides


class Side:
    """The processes of one side, ready to take steps.

    Raises `UserError` if one of them ends. It prints its own reason.
    """

    def __init__(self, name, job, command_lines):
        """Start the processes of `command_lines(address of the socket)`, which are pairs of argv and environment."""
        self.name, self.job = name, job
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="distdl-"))
            address = f"{folder}/socket"
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(address)
            server.listen(job.ranks)
            server.settimeout(0.2)
            self._processes = []
            stack.callback(self._end)
            for argv, environment in command_lines(address):
                self._processes.append(subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL))
            channels = {}
            deadline = time.monotonic() + SECONDS_TO_START
            while len(channels) < job.ranks:
                with contextlib.suppress(TimeoutError):
                    channel = stack.enter_context(server.accept()[0])
                    channel.settimeout(None)
                    lines = stack.enter_context(channel.makefile("rw"))
                    hello = self._answer(lines)
                    channels[hello["rank"]] = lines
                if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                    raise self._failed()
            self.about, self.forms, self.parameters = hello["about"], hello["forms"], hello["parameters"]
            self._channels = list(channels.values())
            self._stack = stack.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stack.close()

    def samples_per_second(self, form, steps):
        """Take steps on all ranks, and return the rate of the slowest."""
        for lines in self._channels:
            print(json.dumps([form, steps]), file=lines, flush=True)
        return steps * self.job.batch_size / max(self._answer(lines) for lines in self._channels)

    def steps_in(self, form, seconds):
        """Return how many steps the form takes in about that time, which also warms it up."""
        steps = 1
        while True:
            took = steps * self.job.batch_size / self.samples_per_second(form, steps)
            if took >= seconds / 4:
                return max(1, round(steps * seconds / took))
            steps *= 2

    def _answer(self, lines):
        answer = lines.readline()
        if not answer:
            raise self._failed()
        return json.loads(answer)

    def _failed(self):
        return UserError(f"{self.name}'s side of {self.job.title} did not stay alive: see its output above")

    def _end(self):
        """Wait for the processes to end, because their sockets are closed; kill those that do not."""
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def distdl_side(job):
    def command_lines(address):
        program = [sys.executable, str(Path(__file__).resolve()), "--our-side", address, json.dumps(asdict(job))]
        environment = dict(os.environ)
        if job.ranks > 1:
            launch = mpirun_command(job.ranks, program)
            program, environment = launch.argv, environment_for(launch)
        return [(program, {name: value for name, value in environment.items() if name not in SLOWER_KERNELS})]

    return Side("distdl", job, command_lines)


def pytorch_side(job, python):
    def command_lines(address):
        # Its libraries read these when they are loaded. Our PYTHONPATH is not for another interpreter.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return [
            ([python, str(PYTORCH_DDP), address, str(rank), json.dumps(asdict(job))], environment)
            for rank in range(job.ranks)
        ]

    return Side("PyTorch", job, command_lines)


# --------------------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Result:
    """Samples per second of each form in each round."""

    job: Job
    ours: list[float]
    theirs: dict[str, list[float]]

    @property
    def better(self):
        return max(self.theirs, key=lambda form: statistics.median(self.theirs[form]))

    @property
    def ratio(self):
        return middle([ours / theirs for ours, theirs in zip(self.ours, self.theirs[self.better], strict=True)])

    def cells(self):
        of_layout = {form.split(",")[0]: form for form in self.theirs}
        theirs = ["–"] * 2
        for column, layout in enumerate(("default", "channels-last")):
            if layout in of_layout:
                adam = of_layout[layout].split(", ")[1].removesuffix(" Adam")
                theirs[column] = f"{speed(self.theirs[of_layout[layout]])} ({adam})"
        low, median, high = self.ratio
        return [self.job.title, speed(self.ours), *theirs, f"**{median:.2f} ×** ({low:.2f} to {high:.2f})"]


HEADER = ["", "distdl", "PyTorch", "PyTorch, channels-last", "ratio to the better"]


def middle(values):
    """Return the first quartile, the median, and the third quartile."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def speed(values):
    low, median, high = middle(values)
    return f"{median:,.0f} ±{(high - low) / 2 / median:.0%}"


def compare(job, python, starts, rounds, seconds):
    """Start both sides `starts` times, and let them take turns; return the result and a description of each side."""
    measured = {}
    for start in range(starts):
        with distdl_side(job) as ours, pytorch_side(job, python) as theirs:
            assert ours.parameters == theirs.parameters, "both sides train the same network"
            if start == 0:
                measured = {form: [] for form in ("distdl", *best_of_each_layout(theirs, seconds / 2))}
            turns = [(ours if form == "distdl" else theirs, form) for form in measured]
            steps = {form: side.steps_in(form, seconds) for side, form in turns}
            for number in range(rounds):
                # Every other round is in reverse order, so that the order does not favor one side.
                for side, form in turns if number % 2 == 0 else reversed(turns):
                    measured[form].append(side.samples_per_second(form, steps[form]))
    return Result(job, measured.pop("distdl"), measured), (ours.about, theirs.about)


def best_of_each_layout(side, seconds):
    """Try all forms in turns; return the fastest of each layout."""
    steps = {form: side.steps_in(form, seconds) for form in side.forms}
    tried = {form: [] for form in side.forms}
    for _ in range(TRIALS):
        for form in side.forms:
            tried[form].append(side.samples_per_second(form, steps[form]))
    fastest = {}
    for form in sorted(side.forms, key=lambda form: statistics.median(tried[form])):
        fastest[form.split(",")[0]] = form
    return list(fastest.values())


def table(rows):
    """Return the lines of a Markdown table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return [head, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines]


def cpu():
    """Return the name of the CPU, and the number of cores that this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


# ----------------------------------------------------------------------------------------------- command line


def parse_rows(text):
    """Return the rows of a text such as mlp-1,mlp-2; raise `UserError`."""
    for name in text.split(","):
        if name not in ROWS:
            raise unknown_name("row", name, ROWS)
    return tuple(text.split(","))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the comparison."""

    torch_python: str | None = None
    """Python interpreter that has PyTorch; by default this one."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows of the table, separated by commas; by default all."""
    starts: int = 3
    """Number of starts of both programs."""
    rounds: int = 4
    """Turns of each after a start."""
    seconds: float = 2.0
    """Length of a turn."""
    micro_batch_size: int | None = None
    """Our micro-batch size, for all rows; by default that of each row."""
    quick: bool = False
    """Two very short rounds, to see whether the comparison runs."""


COMMAND = cli.Command(
    program="python examples/versus_pytorch.py",
    summary="Compare the speed of this trainer with that of PyTorch on this machine.",
    settings=Options,
    examples=(
        "python examples/versus_pytorch.py",
        "python examples/versus_pytorch.py --rows mlp-2,simple_convnet-2",
        "python examples/versus_pytorch.py --torch-python ~/torch/bin/python",
    ),
    groups={"flags": [field.name for field in fields(Options)]},
    flags={
        "torch_python": cli.Flag(value="PYTHON"),
        "rows": cli.Flag(value="ROWS", names=ROWS, parse=parse_rows),
    },
)


def parse(arguments):
    """Return the options of a command line; raise `UserError`."""
    options = COMMAND.parse(arguments)
    if min(options.starts, options.rounds) < 1 or not 0 < options.seconds < math.inf:
        given = f"--starts {options.starts} --rounds {options.rounds} --seconds {options.seconds:g}"
        raise UserError(f"{given} given: all must be above 0")
    for name in options.rows:
        size, row = options.micro_batch_size, ROWS[name]
        if size is not None and not 1 <= size <= row.batch_size // row.ranks:
            raise UserError(
                f"--micro-batch-size {size} does not fit {name}: expected 1 to {row.batch_size // row.ranks}, at least "
                "one micro-batch per rank"
            )
    return options


def check_torch(python):
    """Raise `UserError` unless the interpreter has PyTorch."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        missing = subprocess.run([python, "-c", look], check=False).returncode != 0
    except OSError as error:
        raise UserError(f"cannot run {python}: {error.strerror}; give an interpreter by --torch-python") from None
    if missing:
        raise UserError(f"{python} has no PyTorch: {PIP}, or give an interpreter that has it by --torch-python")


def main(arguments):
    """Measure row by row, then print the table."""
    if arguments[:1] == ["--our-side"]:
        our_side(arguments[1], Job(**json.loads(arguments[2])))
        return 0
    options = parse(arguments)
    torch_python = options.torch_python or sys.executable
    check_torch(torch_python)
    starts, rounds, seconds, steps_per_epoch = options.starts, options.rounds, options.seconds, 400
    if options.quick:
        starts, rounds, seconds, steps_per_epoch = 1, 2, 0.02, 4
    results, sizes = [], []
    for name in options.rows:
        row = ROWS[name]
        micro_batch_size = options.micro_batch_size or row.micro_batch_size
        job = Job(row.model, row.ranks, row.batch_size, micro_batch_size, samples=row.batch_size * steps_per_epoch)
        result, abouts = compare(job, torch_python, starts, rounds, seconds)
        results.append(result)
        sizes.append(f"{name} {micro_batch_size}")
        low, median, high = result.ratio
        print(f"{job.title}: {median:.2f} × PyTorch, {result.better} ({low:.2f} to {high:.2f})", flush=True)
    print()
    print("\n".join(table([HEADER, *(result.cells() for result in results)])))
    print()
    print(
        f"Samples per second, medians of {starts} x {rounds} interleaved turns of {seconds:g} s (both started "
        f"{starts} times), one thread per rank; {cpu()}."
    )
    print(f"{'; '.join(abouts)}. Micro-batches: {', '.join(sizes)}.")
    for variable in SLOWER_KERNELS:
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]} is set here; distdl was measured without it.")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
