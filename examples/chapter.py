"""The code that the examples of the chapters share: flags, data, a network, a training loop's step, and the figure.

An example is a function of its options, and `run` starts it. On several ranks (`mpirun -n 2 python examples/…`) every
rank runs all of it, rank 0 alone prints and draws, and the results are the same.
"""

import itertools
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from distdl import cli, nn
from distdl.config import DATASETS
from distdl.data import batch_order, sources, split
from distdl.engine.environment import numerics
from distdl.engine.step import OptimizerStep, supervised
from distdl.errors import UserError
from distdl.inference import figures
from distdl.parallel import from_rank_0, guard, on_rank_0, together, world
from distdl.rng import Key


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of an example. An example with a flag of its own derives its options from them."""

    dataset: str = "digits"
    """Dataset with pixels like those of the book."""
    data_dir: Path | None = None
    """Folder of the dataset's files."""
    seed: int = 0
    """Seed of all random numbers."""
    quick: bool = False
    """Take a few steps only, to see whether the example runs."""
    out: Path = Path("runs", f"{Path(sys.argv[0]).stem}.png")
    """File of the figure."""


def run(example, description, *, has_data=False, options=Options):
    """Run `example(options)` with the flags of the command line, and exit with its exit code."""
    names = [field.name for field in fields(options) if has_data or field.name not in {"dataset", "data_dir"}]
    program = f"python examples/{Path(sys.argv[0]).name}"
    command = cli.Command(
        program=program,
        summary=description.splitlines()[0],
        settings=options,
        examples=(program, f"{program} --quick", f"mpirun -n 2 {program}"),
        groups={"flags": names},
        flags={"dataset": cli.Flag(value="NAME", names=DATASETS)},
    )

    def main(arguments):
        given = SimpleNamespace(**vars(command.parse(arguments)))
        given.communicator = communicator = world()
        given.key = Key(given.seed)
        given.print = print if communicator.rank == 0 else lambda *_: None
        on_rank_0(communicator, lambda: check_file(given.out))
        with guard(communicator), numerics(threads=1):
            example(given)
        return 0

    sys.exit(cli.run(main))


def check_file(out):
    """Raise `UserError` if the figure could not be drawn or written."""
    figures.need_matplotlib()
    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected a file name that ends in .png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another file") from error


def axes(rows, columns, **settings):
    """Return a figure, and a list of its axes, row by row."""
    from matplotlib.figure import Figure  # noqa: PLC0415  matplotlib is an extra

    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **settings).flat)


def save(figure, options):
    """Write the figure on rank 0, and print its file name."""
    if options.communicator.rank == 0:
        write(figure, options.out)


def write(figure, out):
    """Write a figure, and print its file name."""
    try:
        figure.savefig(out, dpi=100)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another file") from error
    print(f"figure: {out}")


def new_folder(options):
    """Return an unused folder for a run next to the figure, the same on every rank."""
    names = (options.out.with_name(f"{options.out.stem}-{number}") for number in itertools.count(1))
    return Path(from_rank_0(options.communicator, lambda: str(next(name for name in names if not name.exists()))))


def pixels(options):
    """Return training and test images (N, H, W, C), float32 from 0 to 1 as in the book, and their labels (N,)."""
    data = together(options.communicator, lambda: sources.load(options.dataset, options.data_dir))
    parts = split.split(data.labels, data.test_start, options.key)
    images = data.images.astype(np.float32) / np.float32(data.images.max())
    train, test = (parts.training[:1000], parts.test[:200]) if options.quick else (parts.training, parts.test)
    return SimpleNamespace(
        images=images[train], labels=data.labels[train], test_images=images[test], test_labels=data.labels[test]
    )


def multi_layer_net(data, hidden, initializer, **settings):
    """Return the book's MultiLayerNet or MultiLayerNetExtend for the data (chapter 6)."""
    return nn.multilayer_net(data.images.shape[1:], 10, hidden, initializer=initializer, **settings)


def batches(data, batch_size, epochs, key):
    """Yield the images and labels of each batch; every epoch has its own order."""
    for epoch in range(epochs):
        order = batch_order.epoch_order(key, epoch, len(data.labels))
        for step in range(batch_order.steps_per_epoch(len(order), batch_size)):
            rows = batch_order.batch_rows(order, step, batch_size)
            yield data.images[rows], data.labels[rows]


class Training:
    """Trains a network with the engine's step, so the bits are the same on any number of ranks."""

    def __init__(self, options, network, optimizer, learning_rate, *, micro_batch_size=64, **settings):
        network.initialize(options.key.of("initialization"))
        optimizer = optimizer(network.parameters.size, decay_slices=network.decay_slices, **settings)
        self._step = OptimizerStep(options.communicator, network, optimizer, micro_batch_size=micro_batch_size)
        self.network, self.key, self.learning_rate = network, options.key, learning_rate
        self.steps, self.loss = 0, nn.SoftmaxCrossEntropy()

    def step(self, images, labels):
        """Take one step on a batch and return its mean loss. Collective."""
        self.steps += 1
        load = partial(self._micro_batch, images, labels)
        compute = supervised(self.network, self.loss, load, self.key.of("training", self.steps))
        samples = len(labels)
        total = self._step.take(compute, samples=samples, learning_rate=self.learning_rate, update_number=self.steps)
        return float(total["loss_sum"][0]) / samples

    def _micro_batch(self, images, labels, index):
        part = slice(index * self._step.micro_batch_size, (index + 1) * self._step.micro_batch_size)
        return images[part], labels[part]


def accuracy(network, images, labels, block=1000):
    """Return the share of correct predictions."""
    correct = (
        nn.count_correct(network.forward(images[start : start + block]), labels[start : start + block])
        for start in range(0, len(labels), block)
    )
    return sum(correct) / len(labels)
