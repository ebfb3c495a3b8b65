"""Train a network on handwritten digits, from a script of your own.

    python examples/train_digits.py
    mpirun -n 2 python examples/train_digits.py

Every rank runs this whole file. Each computes its share of every batch, and together they make the same
weights as one process does, to the last bit: both lines print the same receipt, and so does

    python -m distdl.train --epochs 20 --lr 0.005
"""

import sys

from distdl import cli
from distdl.config import TrainConfig
from distdl.engine import train
from distdl.parallel import world


def main(_arguments):
    """Train, say what came out, and return the exit code."""
    # The names are those of the flags that `python -m distdl.train --help` lists, and so are the defaults.
    config = TrainConfig(dataset="digits", model="simple_convnet", epochs=20, lr=0.005)

    communicator = world()  # all ranks that mpirun started, or this one process
    summary = train(config, communicator)

    # Every rank has this summary, the same but for the seconds each has counted. One of them is enough to print it.
    if communicator.rank == 0:
        print(f"{summary.test_accuracy:.1%} of the test images are named right after {summary.steps} steps")
        print(f"the receipt of {summary.ranks} rank(s) is {summary.weights_sha256}")
    return 0


if __name__ == "__main__":
    # `run` turns a wrong setting, or more ranks than the batch can feed, into one line and exit code 2.
    sys.exit(cli.run(main, trains=True))
