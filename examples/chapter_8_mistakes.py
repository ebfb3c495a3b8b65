"""Misclassified images of a network (section 8.1.1), and its accuracy in half precision (section 8.3.4).

    python examples/chapter_8_mistakes.py
    mpirun -n 2 python examples/chapter_8_mistakes.py --dataset mnist --data-dir FOLDER

DeepConvNet is trained, and scored twice: with its float32 numbers, and with weights and activations stored as float16.
Most of the misclassified images are difficult for people too. A second figure, in the same folder, shows the confusion
matrix.
"""

import tempfile
from pathlib import Path

import chapter

from distdl.config import TrainConfig
from distdl.engine import train
from distdl.engine.pictures import confusion_matrix
from distdl.inference import figures
from distdl.inference.load import load
from distdl.inference.score import evaluate, in_half_precision


def main(options):
    """Train DeepConvNet, draw its misclassified test images, and score it in half precision."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            dataset=options.dataset,
            data_dir=options.data_dir,
            model="deep_convnet",
            epochs=1 if options.quick else {"digits": 60}.get(options.dataset, 3),
            seed=options.seed,
            run_dir=Path(folder, "run"),
        )
        train(config, options.communicator)
        trained = load([config.run_dir], options.communicator)

    full = evaluate(trained, "test", options.communicator)
    half = evaluate(in_half_precision(trained), "test", options.communicator)

    if options.communicator.rank == 0:
        data = trained[0].data
        confusion = options.out.with_stem(f"{options.out.stem}_confusion")
        matrix = confusion_matrix(full.labels, full.predictions, data.classes)
        chapter.write(figures.confusion(matrix), confusion)
        chapter.save(figures.misclassified(data.images[full.rows], full.labels, full.predictions), options)
    changed = int((full.predictions != half.predictions).sum())
    options.print(f"float16 changes {changed} of {len(full.rows)} predictions")
    options.print(
        f"test accuracy: {full.ensemble.accuracy:.4f}, in float16 {half.ensemble.accuracy:.4f} "
        "(the book's DeepConvNet on MNIST, 20 epochs: 0.9938, in float16 the same)"
    )


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
