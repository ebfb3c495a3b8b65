"""The effect of --augment on an image, and on a network with few training images (section 8.1.2).

    python examples/chapter_8_augmentation.py
    mpirun -n 2 python examples/chapter_8_augmentation.py --dataset mnist --data-dir FOLDER

The figure has a row for each transform: one image, with eight changes as in training. Then SimpleConvNet is trained on
300 images twice, without and with augmentation, and scored on test images.
"""

import dataclasses
import tempfile
from pathlib import Path

import chapter
import numpy as np

from distdl.config import TrainConfig
from distdl.data import sources
from distdl.data.augmentation import Augmentation
from distdl.engine import train
from distdl.parallel import together

DRAWS = 8
FEW = 333  # a tenth of them, rounded down, is the validation part, so 300 remain for training
SHOWN = ["rotate=20", "scale=0.3", "flip", "brightness=0.5"]
#: More transforms; training uses the last. A digit of 8x8 pixels fills its frame, so large shifts cut it off.
DIGITS = ["shift=1", "rotate=10,scale=0.1,crop=1", "crop=1"]
MNIST = ["shift=3", "crop=3", "rotate=10,shift=2,scale=0.1"]


def with_few_images(data):
    """Return the dataset with only `FEW` images before its test part."""
    start = FEW if data.test_start is None else data.test_start
    rows = np.r_[:FEW, start : len(data.images)]
    return dataclasses.replace(data, images=data.images[rows], labels=data.labels[rows], test_start=FEW)


def draw(image, texts, options):
    """Draw an image (H, W, C) with each of the transforms, and print how many pixels each changes."""
    figure, axes = chapter.axes(len(texts), DRAWS + 1)
    figure.set_size_inches(1.1 * (DRAWS + 1), 1.3 * len(texts))
    copies = np.repeat(image[None], DRAWS, axis=0)
    for row, text in enumerate(texts):
        # The trainer's key names the step and the micro-batch. Here the text is enough.
        changed = Augmentation.parse(text).apply(copies, options.key.of("example", text))
        first, *others = axes[row * (DRAWS + 1) : (row + 1) * (DRAWS + 1)]
        first.set_title("the image" if row == 0 else "", fontsize=8)
        others[0].set_title(text, fontsize=8, loc="left")
        for ax, pixels in zip([first, *others], [image, *changed], strict=True):
            ax.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1.5 * image.max())
            ax.set_axis_off()
        options.print(f"{text}: {np.mean(changed != copies):.0%} of the pixels change")
    chapter.save(figure, options)


def main(options):
    """Draw, train twice, and print the accuracies."""
    data = together(options.communicator, lambda: sources.load(options.dataset, options.data_dir))
    texts = SHOWN + (DIGITS if options.dataset == "digits" else MNIST)
    draw(data.images[np.argmax(data.labels == 3)], texts, options)  # the mirror image of a 3 differs from it

    few, accuracies = with_few_images(data), []
    epochs = 10 if options.quick else 80
    settings = {"epochs": epochs, "batch_size": 30, "micro_batch_size": 10, "lr": 0.003, "seed": options.seed}
    with tempfile.TemporaryDirectory() as folder:
        for augment in (None, texts[-1]):
            config = TrainConfig(augment=augment, run_dir=Path(folder, str(augment)), **settings)
            accuracies.append(train(config, options.communicator, dataset=few).test_accuracy)
    plain, augmented = accuracies
    options.print(
        f"test accuracy, trained on 300 images: {plain:.4f} without augmentation, {augmented:.4f} with {texts[-1]} "
        "(the book, from all of MNIST: best known then 0.9979, its DeepConvNet 0.9938)"
    )


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
