"""Transfer learning: a convolution trained on some digits helps with other digits (section 8.2).

    python examples/chapter_8_transfer.py
    mpirun -n 2 python examples/chapter_8_transfer.py --dataset mnist --data-dir FOLDER

SimpleConvNet learns the digits 0 to 4 from all their images. A second network, with a smaller hidden layer, learns 5 to
9 from a hundred images: from scratch, and with the convolution of the first network, frozen or trained further.
"""

import dataclasses
import tempfile
from pathlib import Path

import chapter
import numpy as np

from distdl import nn
from distdl.config import TrainConfig
from distdl.data import sources
from distdl.engine import train
from distdl.inference import figures
from distdl.parallel import together

LABELLED = 100
WAYS = ("from scratch", "frozen convolution of the first", "convolution of the first, trained further")


def simple_convnet(hidden):
    """Return a function that builds the book's SimpleConvNet with `hidden` hidden neurons."""

    def network(input_shape, classes):
        small = nn.Normal(0.01)
        layers = [nn.Conv2d(30, 5, initializer=small), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential([*layers, nn.Affine(hidden, small), nn.ReLU(), nn.Affine(classes, small)], input_shape)

    return network


def of_digits(data, digits):
    """Return the part of a dataset with these digits; the classes are 0 up to the last of them."""
    rows = np.flatnonzero(np.isin(data.labels, digits))
    test_start = None if data.test_start is None else int(np.searchsorted(rows, data.test_start))
    parts = {"images": data.images[rows], "labels": data.labels[rows], "classes": digits[-1] + 1}
    return dataclasses.replace(data, name=f"{data.name} {digits[0]}-{digits[-1]}", test_start=test_start, **parts)


def with_few(data, few, key):
    """Return a dataset with `few` training images, drawn by `key`; its test part is the old one, or the rest."""
    before = len(data.labels) if data.test_start is None else data.test_start
    drawn = key.of("labelled").permutation(before)
    test = drawn[few:] if data.test_start is None else np.arange(before, len(data.labels))
    rows = np.concatenate([drawn[:few], test])
    return dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows], test_start=few)


def main(options):
    """Train the first network, then the second one in three ways; draw the losses."""
    data = together(options.communicator, lambda: sources.load(options.dataset, options.data_dir))
    is_small = options.dataset == "digits"

    def trained(name, dataset, hidden, **settings):
        config = TrainConfig(run_dir=folder / name, seed=options.seed, **settings)
        return train(config, options.communicator, dataset=dataset, build_network=simple_convnet(hidden))

    scores, losses = {}, {}
    with tempfile.TemporaryDirectory() as own:
        folder = Path(own)
        first = trained("first", of_digits(data, range(5)), 100, epochs=1 if options.quick else 30 if is_small else 2)
        # A ninth more than the training images, because a tenth is the validation part.
        few = with_few(of_digits(data, range(5, 10)), LABELLED + LABELLED // 9, options.key)
        short = {"epochs": 2 if options.quick else 40 if is_small else 10, "batch_size": 20, "micro_batch_size": 5}
        initial = {"init_from": str(folder / "first")}
        for name, settings in zip(WAYS, ({}, {**initial, "freeze": "conv2d_1"}, initial), strict=True):
            scores[name] = trained(name, few, 50, **short, **settings).test_accuracy
            if options.communicator.rank == 0:
                losses[name] = [one["train_loss"] for one in figures.epochs_of(folder / name / "metrics.jsonl")]

    if options.communicator.rank == 0:
        figure, [axes] = chapter.axes(1, 1)
        for name, loss in losses.items():
            axes.plot(range(1, len(loss) + 1), loss, label=f"{name}: test {scores[name]:.3f}")
        axes.set(title=f"5 to 9, from {LABELLED} images", xlabel="epoch", ylabel="training loss")
        figure.legend(loc="outside lower center", fontsize="small")
        chapter.save(figure, options)
    options.print(f"0 to 4, from all images: test accuracy {first.test_accuracy:.4f}")
    for name, score in scores.items():
        options.print(f"5 to 9, from {LABELLED} images, {name}: test accuracy {score:.4f}")
    scratch, *_, best = scores.values()
    options.print(
        f"better than the training from scratch by {best - scratch:.4f} (the book: useful if there is little data)"
    )


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
