"""Filters of a convolution before and after training, and their feature maps of an image (section 7.6).

    python examples/chapter_7_filters.py
    mpirun -n 2 python examples/chapter_7_filters.py --dataset mnist --data-dir FOLDER

Before training the filters of the first layer are noise. Afterwards they are edges and blobs. A second figure, in the
same folder, shows the feature maps of a test image: the places at which each filter responds.
"""

import tempfile
from pathlib import Path

import chapter

from distdl import nn
from distdl.config import TrainConfig
from distdl.engine import train
from distdl.inference import figures
from distdl.inference.load import load
from distdl.rng import Key


def main(options):
    """Train SimpleConvNet; draw its filters and the feature maps of one test image."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            dataset=options.dataset,
            data_dir=options.data_dir,
            model="simple_convnet",
            epochs=1 if options.quick else {"digits": 60}.get(options.dataset, 3),
            seed=options.seed,
            run_dir=Path(folder, "run"),
        )
        summary = train(config, options.communicator)
        [trained] = load([config.run_dir], options.communicator)

    # The initial weights are a function of the seed, so they can be computed again.
    data = trained.data
    untrained = nn.build_model(config.model, data.images.shape[1:], data.classes)
    untrained.initialize(Key(config.seed).of("initialization"))

    if options.communicator.rank == 0:
        image = data.normalization.apply(data.images[data.parts.test[0]])
        maps = options.out.with_stem(f"{options.out.stem}_maps")
        chapter.write(figures.feature_maps(trained.network, image, "relu_1"), maps)
        chapter.save(figures.filters({"before training": untrained, "after training": trained.network}), options)
    options.print(f"test accuracy: {summary.test_accuracy:.4f} (the book's SimpleConvNet on MNIST, 20 epochs: 0.9896)")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
