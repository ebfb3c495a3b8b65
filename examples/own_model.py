"""Train your own network: with the trainer's command, or from Python in fifteen lines.

python -m distdl.train --model examples/own_model.py:network --epochs 20
python examples/own_model.py
mpirun -n 2 python examples/own_model.py
"""

import sys

from distdl import cli, nn
from distdl.config import TrainConfig
from distdl.engine import train


def network(input_shape, classes):
    """Return a network for images (H, W, C); its output is one logit per class."""
    layers = [nn.Conv2d(16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Affine(classes)]
    return nn.Sequential(layers, input_shape)


def main(_arguments):
    """Train it on the digits, and return the exit code. Rank 0 prints the progress and the receipt."""
    train(TrainConfig(epochs=20), build_network=network)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, trains=True))
