"""Which images a network gets wrong (section 8.1.1), and what half precision costs it (section 8.3.4).

    python examples/chapter_8_mistakes.py
    mpirun -n 2 python examples/chapter_8_mistakes.py --dataset mnist --data-dir FOLDER

DeepConvNet is trained and scored twice: with the numbers it was trained with, and with weights and activations stored
in half as many bits, as float16. Most of the images that are named wrong are hard to name for a person too.
"""

import sys
import tempfile
from pathlib import Path

from distdl import figures, startup
from distdl.config import TrainConfig
from distdl.engine import train
from distdl.engine.evaluation import evaluate, in_half_precision, load
from distdl.parallel import world


def options_of(arguments):
    """Return the flags of the command line."""
    parser = startup.OneLineParser(description=__doc__.splitlines()[0], advice="--help lists all flags")
    add = parser.add_argument
    add("--dataset", default="digits", help="digits or mnist (default: %(default)s)")
    add("--data-dir", type=Path, help="folder with the data set's files")
    add("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    add("--quick", action="store_true", help="a single epoch, to see whether it runs")
    add("--out", type=Path, default=Path("runs/chapter_8_mistakes.png"), help="the picture (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments):
    """Train DeepConvNet, draw its mistakes on the test part, score it in half precision; return the exit code."""
    options = options_of(arguments)
    figures.need_matplotlib()
    communicator = world()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            dataset=options.dataset,
            data_dir=options.data_dir,
            model="deep_convnet",
            epochs=1 if options.quick else {"digits": 60}.get(options.dataset, 3),
            seed=options.seed,
            run_dir=Path(folder, "run"),
        )
        train(config, communicator)
        trained = load([config.run_dir], communicator)

    full = evaluate(trained, "test", communicator)
    half = evaluate(in_half_precision(trained), "test", communicator)

    if communicator.rank == 0:
        data = trained[0].data
        names = [str(digit) for digit in range(data.classes)]
        matrix = figures.confusion_matrix(full.labels, full.predictions, data.classes)
        pictures = {
            options.out: figures.misclassified(data.images[full.rows], full.labels, full.predictions, names),
            options.out.with_stem(options.out.stem + "_confusion"): figures.confusion(matrix, names),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for path, figure in pictures.items():
            figure.savefig(path)
            print(f"picture: {path}")
        changed = int((full.predictions != half.predictions).sum())
        print(f"float16 changes {changed} of {len(full.rows)} answers")
        print(
            f"test accuracy: {full.ensemble.accuracy:.4f}, in float16 {half.ensemble.accuracy:.4f} "
            "(the book's DeepConvNet on MNIST, 20 epochs: 0.9938, in float16 the same)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(startup.run(main))
