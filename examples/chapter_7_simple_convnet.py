"""SimpleConvNet, the book's first convolutional network, trained by the library's trainer (section 7.5).

    python examples/chapter_7_simple_convnet.py
    mpirun -n 2 python examples/chapter_7_simple_convnet.py --dataset mnist --data-dir FOLDER

A convolution with 30 filters of 5x5, ReLU, pooling, and two affine layers, all from Normal(0.01). Adam with learning
rate 0.001 and batches of 100, for 20 epochs of MNIST, or 60 of the digits, which are fewer. The training accuracy is
that of an epoch's batches, each before its step.
"""

import chapter

from distdl.config import TrainConfig
from distdl.engine import train
from distdl.inference import figures


def main(options):
    """Train, and draw loss and accuracy of each epoch."""
    config = TrainConfig(
        dataset=options.dataset,
        data_dir=options.data_dir,
        model="simple_convnet",
        optimizer="adam",
        lr=0.001,
        batch_size=100,
        micro_batch_size=50,
        epochs=2 if options.quick else None,
        seed=options.seed,
        run_dir=chapter.new_folder(options),
    )
    summary = train(config, options.communicator)

    if options.communicator.rank == 0:
        epochs = figures.epochs_of(config.run_dir / "metrics.jsonl")
        chapter.save(figures.curves(epochs), options)
        options.print(
            f"accuracy after {len(epochs)} epochs: train {epochs[-1]['train_accuracy']:.4f}, "
            f"test {summary.test_accuracy:.4f} (the book, on MNIST, 20 epochs: train 0.9982, test 0.9896)"
        )


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
