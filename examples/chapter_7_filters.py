"""What a convolution learns: its filters before and after training, and what they make of an image (section 7.6).

    python examples/chapter_7_filters.py
    mpirun -n 2 python examples/chapter_7_filters.py --dataset mnist --data-dir FOLDER

Before training the filters of the first layer are noise; after it they are edges and blobs, and the maps beside an
image show where in it each of them is found.
"""

import sys
import tempfile
from pathlib import Path

from distdl import figures, nn, startup
from distdl.config import TrainConfig
from distdl.engine import train
from distdl.engine.evaluation import load
from distdl.parallel import world
from distdl.rng import Key


def options_of(arguments):
    """Return the flags of the command line."""
    parser = startup.OneLineParser(description=__doc__.splitlines()[0], advice="--help lists all flags")
    add = parser.add_argument
    add("--dataset", default="digits", help="digits or mnist (default: %(default)s)")
    add("--data-dir", type=Path, help="folder with the data set's files")
    add("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    add("--quick", action="store_true", help="a single epoch, to see whether it runs")
    add("--out", type=Path, default=Path("runs/chapter_7_filters.png"), help="the picture (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments):
    """Train SimpleConvNet, draw its filters and the feature maps of one test image; return the exit code."""
    options = options_of(arguments)
    figures.need_matplotlib()
    communicator = world()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            dataset=options.dataset,
            data_dir=options.data_dir,
            model="simple_convnet",
            epochs=1 if options.quick else {"digits": 60}.get(options.dataset, 3),
            seed=options.seed,
            run_dir=Path(folder, "run"),
        )
        summary = train(config, communicator)
        [trained] = load([config.run_dir], communicator)

    # The weights that training began with: a function of the seed, so they need not have been kept.
    data = trained.data
    untrained = nn.build_model(config.model, data.images.shape[1:], data.classes)
    untrained.initialize(Key(config.seed).of("initialization"))

    if communicator.rank == 0:
        image = data.normalization.apply(data.images[data.parts.test[0]])
        pictures = {
            options.out: figures.filters({"before training": untrained, "after training": trained.network}),
            options.out.with_stem(options.out.stem + "_maps"): figures.feature_maps(trained.network, image, "relu_1"),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for path, figure in pictures.items():
            figure.savefig(path)
            print(f"picture: {path}")
        print(f"test accuracy: {summary.test_accuracy:.4f} (the book's SimpleConvNet on MNIST, 20 epochs: 0.9896)")
    return 0


if __name__ == "__main__":
    sys.exit(startup.run(main))
