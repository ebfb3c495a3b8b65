"""TwoLayerNet, 784-50-10 on MNIST, trained with mini-batches by the library's trainer (sections 4.5 and 5.7.4).

    python examples/chapter_4_two_layer_net.py
    mpirun -n 2 python examples/chapter_4_two_layer_net.py --dataset mnist --data-dir FOLDER

SGD with batches of 100 and learning rate 0.1, for about 10,000 steps of MNIST. The accuracies on training and on
validation data rise together, so the network does not overfit. Section 4.5 of the book differentiates numerically,
which takes hours. This example uses backpropagation, as section 5.7 does.
"""

import chapter

from distdl import nn
from distdl.config import TrainConfig
from distdl.engine import train
from distdl.inference import figures


def two_layer_net(input_shape, classes):
    """Return the network with 50 hidden units; the loss contains the softmax."""
    initializer = nn.Normal(0.01)
    layers = [nn.Flatten(), nn.Affine(50, initializer), nn.Sigmoid(), nn.Affine(classes, initializer)]
    return nn.Sequential(layers, input_shape)


def main(options):
    """Train, and draw loss and accuracy of each epoch."""
    epochs = 100 if options.dataset == "digits" else 19  # 19 epochs of 54,000 images are 10,260 steps
    config = TrainConfig(
        dataset=options.dataset,
        data_dir=options.data_dir,
        optimizer="sgd",
        lr=0.1,
        batch_size=100,
        micro_batch_size=25,
        epochs=2 if options.quick else epochs,
        seed=options.seed,
        run_dir=chapter.new_folder(options),
    )
    summary = train(config, options.communicator, build_network=two_layer_net)

    if options.communicator.rank == 0:
        chapter.save(figures.curves(config.run_dir / "metrics.jsonl"), options)
    options.print(
        f"test accuracy after {summary.steps} steps: {summary.test_accuracy:.4f} (the book, on MNIST: about 0.94)"
    )


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
