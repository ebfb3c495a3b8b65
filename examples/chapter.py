"""What the examples of the chapters share: their flags, pixels, a network, one step of training, the picture.

An example is a function of its options, started by `run`. It also runs on several ranks (`mpirun -n 2 python
examples/…`), where every rank runs all of it, rank 0 alone speaks and draws, and the figures are the same.
"""

import itertools
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from distdl import cli, nn
from distdl.config import DATASETS
from distdl.data import sources, split
from distdl.engine.environment import numerics
from distdl.errors import UserError
from distdl.inference import figures
from distdl.parallel import REDUCTIONS, Field, Layout, contiguous_shards, guard, together, world
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
    """File of the picture."""


def run(example, description, *, has_data=False, options=Options):
    """Run `example(options)` with the flags of the command line, and end with its exit code."""
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
        given.say = print if communicator.rank == 0 else lambda *_: None
        together(communicator, lambda: check_picture(given.out) if communicator.rank == 0 else None)
        with guard(communicator), numerics(threads=1):
            example(given)
        return 0

    sys.exit(cli.run(main))


def check_picture(out):
    """Raise `UserError` where the picture could not be written in the end."""
    figures.need_matplotlib()
    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected a file name that ends in .png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another file") from error


def axes(rows, columns, **settings):
    """Return a figure and its axes, row by row in one list."""
    from matplotlib.figure import Figure  # noqa: PLC0415  matplotlib is an extra

    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **settings).flat)


def save(figure, options):
    """Write the picture, on rank 0 alone, and say where it is."""
    if options.communicator.rank == 0:
        write(figure, options.out)


def write(figure, out):
    """Write a picture, and say where it is."""
    try:
        figure.savefig(out, dpi=100)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; give another file") from error
    print(f"picture: {out}")


def new_folder(options):
    """Return a folder for a run beside the picture, which none has used yet; the same on every rank."""
    names = (options.out.with_name(f"{options.out.stem}-{number}") for number in itertools.count(1))
    return Path(options.communicator.bcast_json(str(next(name for name in names if not name.exists()))))


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
    """Return the book's MultiLayerNet, or MultiLayerNetExtend, for such data (chapter 6)."""
    return nn.multilayer_net(data.images.shape[1:], 10, hidden, initializer=initializer, **settings)


def batches(data, batch_size, epochs, key):
    """Yield the images and labels of each batch; every epoch has an order of its own."""
    for epoch in range(epochs):
        order = split.epoch_order(key, epoch, len(data.labels))
        for step in range(split.steps_per_epoch(len(order), batch_size)):
            rows = split.batch_rows(order, step, batch_size)
            yield data.images[rows], data.labels[rows]


class Training:
    """What `distdl.engine` does in a step, in a few lines: the same bits on any number of ranks."""

    def __init__(self, options, network, optimizer, learning_rate, **settings):
        self.communicator, self.key, self.network = options.communicator, options.key, network
        network.initialize(options.key.of("initialization"))
        self.optimizer = optimizer(network.parameters.size, decay_slices=network.decay_slices, **settings)
        self.learning_rate, self.steps, self.loss = learning_rate, 0, nn.SoftmaxCrossEntropy()
        sizes = [("gradient", "f4", network.gradients.size), ("statistics", "f8", network.statistics.size)]
        fields = [Field(*size) for size in [*sizes, ("loss", "f8", 1)] if size[2]]
        self.reduction = REDUCTIONS["tree"](self.communicator, Layout(fields))

    def step(self, images, labels, micro_batch_size=64):
        """Take one step on a batch and return its mean loss. Collective."""
        network = self.network
        self.steps += 1
        shards = contiguous_shards(split.micro_batch_count(len(labels), micro_batch_size), self.communicator.size)
        self.reduction.begin(shards)
        for index in shards[self.communicator.rank]:
            part = slice(index * micro_batch_size, (index + 1) * micro_batch_size)
            logits = network.forward(images[part], training=True, key=self.key.of("training", self.steps, index))
            loss = self.loss.forward(logits, labels[part])  # summed over the samples, as the gradients are
            network.backward(self.loss.backward())
            leaf = {"gradient": network.gradients, "statistics": network.statistics, "loss": np.array([loss])}
            self.reduction.add(index, leaf)
        total = self.reduction.total()
        network.update_buffers(total.get("statistics", network.statistics))
        np.divide(total["gradient"], len(labels), out=network.gradients)
        self.optimizer.update(network.parameters, network.gradients, self.learning_rate, self.steps)
        return float(total["loss"][0]) / len(labels)


def accuracy(network, images, labels, block=1000):
    """Return the share of the images that the network names right."""
    right = (
        nn.count_correct(network.forward(images[start : start + block]), labels[start : start + block])
        for start in range(0, len(labels), block)
    )
    return sum(right) / len(labels)
