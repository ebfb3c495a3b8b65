"""What --augment does to an image, and to a network that has few images to learn from (section 8.1.2).

    python examples/augmentation.py
    mpirun -n 2 python examples/augmentation.py --dataset mnist --data-dir FOLDER

Draws a picture with a row for each transform: one image, as training would see it eight times. Then SimpleConvNet
learns from 300 images twice, without and with augmentation, and is tested on images it has never seen.
"""

import dataclasses
import sys
from pathlib import Path

import common
import numpy as np

from distdl import startup
from distdl.config import TrainConfig
from distdl.data import sources
from distdl.data.augmentation import Augmentation
from distdl.engine import train
from distdl.parallel import guard, together, world
from distdl.rng import Key

DRAWS = 8
FEW = 333  # a tenth of them, rounded down, is for validation, so 300 are left to learn from
#: What to show and what to train with; a digit of 8x8 pixels fills its frame and is soon moved too far.
ROWS = {
    "digits": ["rotate=20", "shift=1", "scale=0.3", "crop=1", "flip", "brightness=0.5", "rotate=10,scale=0.1,crop=1"],
    "mnist": ["rotate=20", "shift=3", "scale=0.3", "crop=3", "flip", "brightness=0.5", "rotate=10,shift=2,scale=0.1"],
}
TRAINED_WITH = {"digits": "crop=1", "mnist": "rotate=10,shift=2,scale=0.1"}


def parsed(arguments):
    """Return the options of the command line."""
    parser = startup.OneLineParser(description=__doc__.splitlines()[0], advice="--help lists all flags")
    parser.add_argument("--dataset", choices=sorted(ROWS), default="digits", help="default: %(default)s")
    parser.add_argument("--data-dir", type=Path, help="folder with the files of mnist")
    parser.add_argument("--epochs", type=int, default=80, help="of each training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs", "augmentation.png"), help="default: %(default)s")
    return parser.parse_args(arguments)


def few_to_learn_from(data):
    """Return the data set with no more than `FEW` images before its test part."""
    start = FEW if data.test_start is None else data.test_start
    rows = np.r_[:FEW, start : len(data.images)]
    return dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows], test_start=FEW)


def draw(image, texts, out):
    """Write the picture of an image (H, W, C) under each of the texts, and print how many pixels each changes."""
    from matplotlib.figure import Figure  # noqa: PLC0415  an extra, and slow to import

    figure = Figure(figsize=(1.1 * (DRAWS + 1), 1.3 * len(texts)), layout="constrained")
    copies = np.repeat(image[None], DRAWS, axis=0)
    for text, axes in zip(texts, figure.subplots(len(texts), DRAWS + 1), strict=True):
        # The trainer draws from a key that names the step and the micro-batch; here the text will do.
        changed = Augmentation.parse(text).apply(copies, Key(0).of("example", text))
        axes[0].set_title("the image" if text is texts[0] else "", fontsize=8)
        axes[1].set_title(text, fontsize=8, loc="left")
        for ax, pixels in zip(axes, [image, *changed], strict=True):
            ax.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1.5 * image.max())
            ax.set_axis_off()
        print(f"{text}: {np.mean(changed != copies):.0%} of the pixels are others than before")
    common.write(figure, out)


def main(arguments):
    """Draw, train twice, say what came out, and return the exit code."""
    options, communicator = parsed(arguments), world()
    coordinates = communicator.rank == 0
    with guard(communicator):
        together(communicator, lambda: common.check_picture(options.out) if coordinates else None)
        settings = TrainConfig(epochs=options.epochs, batch_size=30, micro_batch_size=10, lr=0.003)
        together(communicator, settings.checked)
        data = together(communicator, lambda: sources.load(options.dataset, options.data_dir))
        image = data.images[np.argmax(data.labels == 3)]  # not the same in a mirror
        together(communicator, lambda: draw(image, ROWS[options.dataset], options.out) if coordinates else None)

    few, accuracies = few_to_learn_from(data), []
    for augment in (None, TRAINED_WITH[options.dataset]):
        few = dataclasses.replace(few, name=f"{options.dataset}-{'plain' if augment is None else 'augmented'}")
        accuracies.append(
            train(dataclasses.replace(settings, augment=augment), communicator, dataset=few).test_accuracy
        )
    if coordinates:
        plain, augmented = accuracies
        said = f"{plain:.2%} without augmentation, {augmented:.2%} with {TRAINED_WITH[options.dataset]}"
        print(f"right of {len(few.images) - FEW:,} test images, learned from 300: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(startup.run(main, trains=True))
