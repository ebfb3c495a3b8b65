"""The first way of `versus_pytorch.py`: both sides stay alive, and take turns of a few seconds.

So other load on the machine affects both. The waiting side is blocked in a read. On our side are the trainer's steps
alone (`distdl.bench.measure.TrainingSteps`). Each micro-batch is converted from bytes to normalized pixels on the way.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from versus_results import Job, Result

from distdl import cli
from distdl.bench.measure import TrainingSteps
from distdl.config import TrainConfig
from distdl.data import PreparedDataset
from distdl.engine.environment import kernel_family, numerics
from distdl.engine.kernels import agreed_kernels
from distdl.engine.state import TrainingState
from distdl.errors import UserError
from distdl.job.mpirun_command import environment_for, mpirun_command
from distdl.nn import build_model
from distdl.nn.kernels.choice import kernels_named
from distdl.optim import optimizer_class
from distdl.parallel import world
from distdl.rng import Key

PYTORCH_DDP = Path(__file__).with_name("pytorch_ddp.py")
SECONDS_TO_START = 120
TRIALS = 3
#: These make NumPy and its BLAS use slower kernels than the CPU has, and have no effect on PyTorch.
SLOWER_KERNELS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "NPY_DISABLE_CPU_FEATURES")


# --------------------------------------------------------------------------------------------------- distdl


def random_images(samples):
    """Return random pixels (N, 28, 28) and labels."""
    key = Key(0)
    pixels = key.of("pixels").words(samples * 28 * 28 // 8).astype("<u8", copy=False)
    labels = (key.of("labels").words(samples) % np.uint64(10)).astype(np.int64)
    return pixels.view(np.uint8).reshape(samples, 28, 28), labels


def training_steps(job, communicator):
    """Return the trainer's steps of a job."""
    config = TrainConfig(model=job.model, batch_size=job.batch_size, micro_batch_size=job.micro_batch_size).checked()
    images, labels = random_images(job.batch_size * job.steps)
    data = PreparedDataset.for_training_only(images[..., np.newaxis], labels, classes=10)
    network = build_model(job.model, data.images.shape[1:], data.classes)
    kernels = kernels_named(agreed_kernels(job.kernels or "auto", communicator))
    network.use(kernels)
    network.initialize(Key(0).of("initialization"))
    optimizer = optimizer_class("adam")(
        network.parameters.size, decay_slices=network.decay_slices, fused=kernels.optimizer_rule("adam")
    )
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
                "kernels": training.state.network.stack.kernels.name,
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
    return 0


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
            self.kernels = hello.get("kernels")  # of distdl
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
        self.samples_per_second(form, 1)  # the first step also allocates, and may compile kernels
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


def distdl_command(ranks, program):
    """Return the command line and the environment that start a Python program of distdl, with this interpreter."""
    argv, environment = [sys.executable, *program], dict(os.environ)
    if ranks > 1:
        launch = mpirun_command(ranks, argv)
        argv, environment = launch.argv, environment_for(launch)
    return argv, {name: value for name, value in environment.items() if name not in SLOWER_KERNELS}


def pytorch_commands(job, python, function, meeting, *words):
    """Return the command line and the environment of each rank of PyTorch; see `pytorch_ddp.main`."""
    # Its libraries read these when they are loaded. Our PYTHONPATH is not for another interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    program, words = [python, str(PYTORCH_DDP), function, meeting], [json.dumps(asdict(job)), *map(str, words)]
    return [([*program, str(rank), *words], environment) for rank in range(job.ranks)]


def distdl_side(job):
    program = [str(Path(__file__).resolve())]
    return Side(
        "distdl", job, lambda address: [distdl_command(job.ranks, [*program, address, json.dumps(asdict(job))])]
    )


def pytorch_side(job, python):
    return Side(
        "PyTorch", job, lambda address: pytorch_commands(job, python, "take_turns", f"{address}.ranks", address)
    )


# --------------------------------------------------------------------------------------------- the comparison


def compare_turns(job, python, starts, rounds, seconds):
    """Start both sides `starts` times, let them take `rounds` turns of some seconds each, and return the result."""
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
    return Result(job, "turns", ours.kernels, measured.pop("distdl"), measured, f"{ours.about}; {theirs.about}")


def best_of_each_layout(side, seconds):
    """Try all forms in turns; return the fastest of each layout."""
    steps = {form: side.steps_in(form, seconds) for form in side.forms}
    tried = {form: [] for form in side.forms}
    for _ in range(TRIALS):
        for form in side.forms:
            tried[form].append(side.samples_per_second(form, steps[form]))
    return fastest_of_each_layout(tried)


def fastest_of_each_layout(measured):
    """Return the form with the highest median of samples per second, for each layout."""
    fastest = {}
    for form in sorted(measured, key=lambda form: statistics.median(measured[form])):
        fastest[form.split(",")[0]] = form
    return list(fastest.values())


if __name__ == "__main__":
    sys.exit(cli.run(lambda arguments: our_side(arguments[0], Job(**json.loads(arguments[1])))))
