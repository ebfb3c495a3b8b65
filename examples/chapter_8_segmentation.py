"""Semantic segmentation: a fully convolutional network predicts a label for each pixel (section 8.4, FCN).

    python examples/chapter_8_segmentation.py
    mpirun -n 2 python examples/chapter_8_segmentation.py --dataset mnist --data-dir FOLDER

The label of an ink pixel is the digit that it belongs to; all other pixels are background. With two poolings a pixel's
output depends on the whole digit. Transposed convolutions restore the size of the image.
"""

from dataclasses import replace

import chapter
import numpy as np

from distdl import nn
from distdl.config import TrainConfig
from distdl.data import sources
from distdl.engine import train
from distdl.inference.load import load
from distdl.parallel import together

BACKGROUND, SHOWN = 10, 6


def fully_convolutional(input_shape, classes):
    """Return a small FCN with outputs (H, W, classes); H and W must be multiples of 4."""
    layers = [nn.Conv2d(32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 3, padding=1), nn.ReLU()]
    layers += [nn.ConvTranspose2d(32, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(32, 2, stride=2), nn.ReLU()]
    return nn.Sequential([*layers, nn.Conv2d(classes, 1)], input_shape)


def with_labels_per_pixel(data):
    """Return the dataset with labels (N, H, W): the digit for ink, otherwise the background."""
    ink = data.images[..., 0] > data.images.max() // 4
    labels = np.where(ink, data.labels[:, None, None], BACKGROUND)
    return replace(data, name=f"{data.name}, a label a pixel", labels=labels, classes=BACKGROUND + 1)


def first_of_test_part(trained, count):
    """Return the first test images, their labels and the predicted labels, each (count, H, W)."""
    rows = trained.data.parts.test[:count]
    images = trained.data.images[rows]
    predicted = trained.network.forward(trained.data.normalization.apply(images)).argmax(axis=-1)
    return images[..., 0], trained.data.labels[rows], predicted


def main(options):
    """Train, and draw a few test images with their labels and predictions."""
    loaded = together(options.communicator, lambda: sources.load(options.dataset, options.data_dir))
    data = with_labels_per_pixel(loaded)
    config = TrainConfig(
        epochs=1 if options.quick else 40 if options.dataset == "digits" else 4,
        lr=0.003,
        seed=options.seed,
        run_dir=chapter.new_folder(options),
    )
    summary = train(config, options.communicator, dataset=data, build_network=fully_convolutional)
    [trained] = load([config.run_dir], options.communicator, build_network=fully_convolutional, dataset=data)

    if options.communicator.rank == 0:
        figure, axes = chapter.axes(3, SHOWN)
        for place, kind in enumerate(first_of_test_part(trained, SHOWN)):
            for number, image in enumerate(kind):
                ax = axes[place * SHOWN + number]
                ax.imshow(image, cmap="tab20" if place else "gray", vmin=0, vmax=None if not place else BACKGROUND)
                ax.set_axis_off()
        chapter.save(figure, options)
    options.print(f"accuracy on test pixels: {summary.test_accuracy:.4f} (the book shows a picture)")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
