"""Numbers instead of classes: the identity as output, mean squared error as the loss (sections 3.5 and 4.2.1).

    python examples/chapter_3_regression.py
    mpirun -n 2 python examples/chapter_3_regression.py --dataset mnist --data-dir FOLDER

The targets of an image are two numbers: row and column of the ink's centre of mass, in units of their standard
deviation. A network that always returns the mean has an error of 1.
"""

from dataclasses import replace

import chapter
import numpy as np

from distdl import nn
from distdl.config import TrainConfig
from distdl.data import sources
from distdl.engine import train
from distdl.inference import figures
from distdl.parallel import together


def network(input_shape, numbers):
    """Return a network with 50 hidden units and no activation after the output."""
    return nn.Sequential([nn.Flatten(), nn.Affine(50), nn.ReLU(), nn.Affine(numbers)], input_shape)


def with_centres(data):
    """Return the dataset with float32 targets (N, 2): row and column of the centre of the ink, standardized."""
    images = data.images[..., 0].astype(np.float64)
    ink = images.sum(axis=(1, 2))
    rows = images.sum(axis=2) @ np.arange(images.shape[1]) / ink
    columns = images.sum(axis=1) @ np.arange(images.shape[2]) / ink
    centres = np.stack([rows, columns], axis=1)
    centres = (centres - centres.mean(axis=0)) / centres.std(axis=0)
    return replace(data, name=f"{data.name}, centres", labels=centres.astype(np.float32), classes=2)


def main(options):
    """Train, and draw the loss of each epoch."""
    loaded = together(options.communicator, lambda: sources.load(options.dataset, options.data_dir))
    data = with_centres(loaded)
    config = TrainConfig(
        epochs=2 if options.quick else 60 if options.dataset == "digits" else 5,
        lr=0.003,
        schedule="cosine",
        seed=options.seed,
        run_dir=chapter.new_folder(options),
    )
    summary = train(config, options.communicator, dataset=data, build_network=network)

    if options.communicator.rank == 0:
        figure = figures.curves(config.run_dir / "metrics.jsonl")
        figure.axes[0].set(yscale="log", title="mean squared error")
        chapter.save(figure, options)
    options.print(
        f"mean squared error on test data: {summary.test_loss:.4f} (the mean as prediction: about 1; the book has none)"
    )


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
